"""How many images go through a model at once: as set, or found automatically on CUDA; halved if out of memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common import devices
from common.errors import PipelineError, is_out_of_memory
from common.sections import Infrastructure

IMAGES = {"cpu": 8, "xpu": 32, "mps": 32}  # with "auto"; on a CPU larger batches are no faster
LARGEST = 512  # with "auto" on CUDA: 130,000 tokens a view for a ViT-B/14 at 224 pixels, more than any card needs
MEMORY_SHARE = 0.6  # of the free memory, for the forward pass with "auto": the rest is for images prepared ahead

Forward = Callable[[torch.Tensor], torch.Tensor]
log = logging.getLogger("pipeline")


@dataclass
class Size:
    images: int  # in a batch; `forward` reduces it in the course of a run


def size_of(settings: Infrastructure, forward: Forward, image_size: list[int], device: torch.device) -> Size:
    """The size by infrastructure.embedding_batch_size. `image_size`: height and width that `forward` takes."""
    if settings.embedding_batch_size != "auto":
        return Size(settings.embedding_batch_size)
    if device.type in IMAGES:
        return Size(IMAGES[device.type])

    def peak_bytes(images: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        pixels = torch.zeros((images, 3, *image_size), device=device)
        forward(pixels)
        ahead = 2 * pixels.nbytes  # of batches that are prepared meanwhile, see loop.py
        return torch.cuda.max_memory_allocated(device) - before + ahead

    size = Size(largest(peak_bytes, int(MEMORY_SHARE * devices.free_bytes(device))))
    torch.cuda.empty_cache()
    log.info("batches of %d images", size.images)
    return size


def largest(peak_bytes: Callable[[int], int], budget: int) -> int:
    """The most images, a power of two up to LARGEST, whose `peak_bytes` are within `budget`."""
    images = 1
    try:
        while images < LARGEST and 2 * peak_bytes(images) <= budget:  # no larger pass is tried
            images *= 2
    except torch.OutOfMemoryError:  # other processes use the device too; `forward` reduces the size if need be
        pass
    return images


def forward(model: Forward, pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """model(pixels), in pieces of `size`, halved when out of memory. Raises PipelineError if one does not fit."""
    while True:
        try:
            return torch.cat([model(piece) for piece in pixels.split(size.images)])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size.images == 1:
                advice = (
                    "free memory there, set embedding_model.dtype to bfloat16, or change infrastructure.device"
                )
                raise PipelineError(
                    f"out of memory: the model and one image do not fit on the device\n{advice}"
                ) from None
        # not in the handler: until it ends, the error keeps the failed pass's tensors alive
        size.images //= 2
        if pixels.device.type != "cpu":
            getattr(torch, pixels.device.type).empty_cache()
        log.warning("out of memory: continuing with batches of %d images", size.images)
