"""How many images go through a model at once: a setting, found by itself on CUDA, halved where memory runs out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.errors import PipelineError
from common.sections import Infrastructure

CPU_IMAGES = 8  # "auto" there: larger batches are no faster, and 5 MB of pixels stay near the cores
LARGEST = 512  # "auto" on CUDA: a ViT-B/14 at 224 pixels is 130,000 tokens then, more than fills any card
MEMORY_SHARE = 0.6  # of the memory that is free, for the forward pass of "auto": the rest is for what comes ahead

Forward = Callable[[torch.Tensor], torch.Tensor]
log = logging.getLogger("pipeline")


@dataclass
class Size:
    """Images of a batch from now on."""

    images: int


def size_of(settings: Infrastructure, forward: Forward, image_size: list[int], device: torch.device) -> Size:
    """What infrastructure.embedding_batch_size means. `image_size`: height and width of the model's input."""
    if settings.embedding_batch_size != "auto":
        return Size(settings.embedding_batch_size)
    if device.type == "cpu":
        return Size(CPU_IMAGES)

    def peak_bytes(images: int) -> int:
        pixels = torch.zeros((images, 3, *image_size), device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(pixels)
        return torch.cuda.max_memory_allocated(device) - before

    size = Size(largest(peak_bytes, int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])))
    torch.cuda.empty_cache()
    log.info("batches of %d images", size.images)
    return size


def largest(peak_bytes: Callable[[int], int], budget: int) -> int:
    """The most images, a power of two up to LARGEST, whose forward pass stays within `budget` bytes.

    `peak_bytes`: what a pass of so many takes. Twice the images take twice as much at most, so nothing beyond the
    budget is tried.
    """
    images = 1
    try:
        while images < LARGEST and 2 * peak_bytes(images) <= budget:
            images *= 2
    except torch.OutOfMemoryError:  # others use the device too; the first batches find what fits
        pass
    return images


def forward(model: Forward, pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """model(pixels), in pieces of `size`. Where the memory does not suffice, `size` is halved, and that is said.

    Raises PipelineError if not even one image fits.
    """
    while True:
        try:
            return torch.cat([model(piece) for piece in pixels.split(size.images)])
        except torch.OutOfMemoryError:
            if size.images == 1:
                raise PipelineError(
                    "the device's memory does not suffice for the model and one image\n"
                    "free it, or set embedding_model.dtype to bfloat16, or infrastructure.device to another"
                ) from None
        size.images //= 2  # out here: while the error is being handled, it keeps the failed pass's tensors alive
        torch.cuda.empty_cache()
        log.warning("out of memory: going on with batches of %d images", size.images)
