"""JPEGs through the loop of generation, from memory: for the checks of on_gpu.py."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from gpu_rows import Gpu
from street_pairs import Settings, street_pairs

from common.sections import Infrastructure
from generate import loop
from generate.pixels import Preprocessing

IMAGE_PX = 640  # as the dataset's


@lru_cache
def photographs(gpu: Gpu) -> list[bytes]:
    """JPEGs of synthetic streets."""
    street = Settings(0, False, IMAGE_PX, targets_per_facade=(1, 3), facades_per_street=8, views=(2, 7))
    return [pair.image for number in range(gpu.sizes.streets) for pair in street_pairs(street, 0, number)]


def embed(
    images: list[bytes],
    count: int,
    model: Callable[[torch.Tensor], torch.Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    infrastructure: Infrastructure,
) -> np.ndarray:
    """The vectors (count, D) float16 of `count` images, these over and over, by the loop of generation."""
    job = loop.Job("benchmark", count, lambda start, stop: [images[n % len(images)] for n in range(start, stop)])
    forward = lambda pixels: model(pixels).half()  # noqa: E731 - as in generate_embeddings.py
    with loop.GenerationProgress("benchmark", "image", None, 3600) as progress:
        (result,) = loop.embed([job], forward, preprocessing, device, infrastructure, progress)
    assert not result.failed
    return result.vectors
