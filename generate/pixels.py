"""From decoded images to a model's input: what preprocessor_config.json asks for, in torch.

Equal to Hugging Face's image processors within one grey level, and many times faster: whole batches are resized
and normalised at once, on the model's device. For DINOv3 it is also the only way without torchvision.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common.errors import PipelineError

_RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    """What a model's preprocessor_config.json says; sizes in pixels."""

    shortest_edge: int | None  # resize this edge and keep the proportions, or
    exact_size: tuple[int, int] | None  # resize to this height and width, or (both None) not at all
    crop: tuple[int, int] | None  # height and width cut from the middle, padded with 0 where the image is smaller
    mode: str  # of the resize: "bicubic", "bilinear" or "nearest-exact"
    rescale_first: bool  # as DINOv3: the resize is not rounded to grey levels, as it is for the others
    scale: float  # 1/255
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> list[int]:
        """Height and width of the model's input."""
        size = self.crop or self.exact_size
        if size is None:
            raise PipelineError("preprocessor_config.json gives neither a crop nor an exact size for all images")
        return list(size)

    def __call__(self, images: list[np.ndarray], device: torch.device) -> torch.Tensor:
        """(N, 3, H, W) float32 on `device`, of N images, (h, w, 3) uint8 of any sizes."""
        if device.type == "cpu":
            return self.into(self.room(len(images)), images)
        return self.on_cuda(images, device)

    def on_cuda(self, images: Iterable[np.ndarray], device: torch.device) -> torch.Tensor:
        """The same as a call there, of images that come one by one."""
        runs = groupby(images, key=np.shape)  # neighbours of one size go together
        shrunk = [self._shrink(_to_cuda(list(run), device)) for _, run in runs]
        if not shrunk:
            return torch.empty((0, 3, *self.image_size), device=device)
        factor, offset = _factor_and_offset(self.scale, self.mean, self.std, device)
        return torch.cat(shrunk).float().mul_(factor[:, None, None]).sub_(offset[:, None, None])

    def room(self, count: int) -> torch.Tensor:
        """Memory for `count` images on the CPU, see `into`."""
        return torch.empty((count, *self.image_size, 3))

    def into(self, room: torch.Tensor, images: Iterable[np.ndarray]) -> torch.Tensor:
        """The same as a call on the CPU, in memory that was there before: new memory costs as much as normalising.

        Images are taken one by one as they come: what was just decoded is still in the core's cache.
        """
        factor, offset = _factor_and_offset(self.scale, self.mean, self.std, room.device)
        factor, offset = factor.repeat(room.shape[2]), offset.repeat(room.shape[2])  # of a row: faster than three
        count = 0
        for count, image in enumerate(images, 1):
            shrunk = self._shrink_one(image)[0].permute(1, 2, 0)  # (H, W, 3), as decoders have it
            room[count - 1].copy_(shrunk).flatten(1).mul_(factor).sub_(offset)
        return room[:count].permute(0, 3, 1, 2)

    def _shrink_one(self, image: np.ndarray) -> torch.Tensor:
        """An image on the CPU, (h, w, 3) uint8 -> (1, 3, H, W), grey levels."""
        if self.crop and self.mode == "bicubic" and not self.rescale_first:
            size = self._resized(*image.shape[:2])
            tall = image.shape[0] > 2 * image.shape[1]  # see _first_pass
            if not tall and all(a <= b < c for a, b, c in zip(self.crop, size, image.shape[:2], strict=True)):
                return resize_the_middle(image, size, self.crop)
        return self._shrink(torch.from_numpy(image[None]).permute(0, 3, 1, 2))

    def _shrink(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images of one size, (n, 3, h, w) uint8 -> (n, 3, H, W), grey levels."""
        pixels = self._resize(pixels.float() if self.rescale_first else pixels)
        return _center_crop(pixels, *self.crop) if self.crop else pixels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        if self.shortest_edge is None:
            return self.exact_size or (height, width)
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)

    def _resize(self, pixels: torch.Tensor) -> torch.Tensor:
        size = self._resized(*pixels.shape[-2:])
        if size == tuple(pixels.shape[-2:]):
            return pixels
        if pixels.dtype == torch.uint8 and pixels.device.type != "cpu":
            return resize_grey_levels(pixels, size, self.mode)
        antialias = self.mode != "nearest-exact"
        if pixels.dtype == torch.uint8:  # torch takes the rows first, and cuts off at 0 and 255 after them
            pixels = F.interpolate(pixels, _first_pass(pixels, size), mode=self.mode, antialias=antialias)
        return F.interpolate(pixels, size, mode=self.mode, antialias=antialias)


def read_preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing that a model's folder asks for. Raises PipelineError if it is absent or not known here."""
    path = folder / "preprocessor_config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(
            f"{path} does not exist: a model's folder needs it; copy it from the model that this one came from"
        ) from None
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path} is not valid JSON: {error}") from None
    try:
        return _preprocessing(config)
    except (KeyError, TypeError) as error:
        raise PipelineError(
            f"{path} cannot be used: it lacks {error}, or has it in a form not known here"
        ) from None


def _preprocessing(config: dict) -> Preprocessing:
    size = config["size"] if config.get("do_resize", True) else {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = config.get("crop_size") if config.get("do_center_crop", True) else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    normalize = config.get("do_normalize", True)
    return Preprocessing(
        shortest_edge=size.get("shortest_edge"),
        exact_size=(size["height"], size["width"]) if size and "shortest_edge" not in size else None,
        crop=(crop["height"], crop["width"]) if crop else None,
        mode=_RESAMPLING[config["resample"]] if size else "bilinear",
        rescale_first=config.get("image_processor_type", "").startswith("DINOv3"),
        scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=tuple(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
    )


def resize_grey_levels(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """What torch's resize of uint8 does on the CPU, for devices that have none: (n, 3, h, w) -> float32.

    Grey levels are rounded and cut to 0..255 after each of the two passes, as PIL does.
    """
    antialias = mode != "nearest-exact"
    pixels = F.interpolate(pixels.float(), _first_pass(pixels, size), mode=mode, antialias=antialias)
    pixels = F.interpolate(pixels.round_().clamp_(0, 255), size, mode=mode, antialias=antialias)
    return pixels.round_().clamp_(0, 255)


def _first_pass(pixels: torch.Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after the first pass of a resize to `size`: PIL resizes each row, then each column, but the
    columns first if an image is more than twice as high as wide. The order shows where a pass is cut off at white.
    """
    height, width = pixels.shape[-2:]
    return (size[0], width) if height > 2 * width else (height, size[1])


class _Run(NamedTuple):
    """The pixels of a source row (or column) that a crop of the resized one is made of."""

    start: int  # where the grids of source and resized pixels meet
    stop: int
    skipped: int  # resized pixels between `start` and the crop


@lru_cache(maxsize=1024)
def _run(length: int, resized: int, crop: int) -> _Run:
    """The run for the middle `crop` of `resized` pixels, which are made of `length`."""
    scale, meet = length / resized, math.gcd(length, resized)
    reach = 2 * max(scale, 1) + 1  # of a bicubic weight, in source pixels, and one for the rounding
    first = (resized - crop) // 2
    before = max(0, int((first + 0.5) * scale - reach) // (length // meet))  # meetings before what is needed
    stop = min(length, math.ceil((first + crop - 0.5) * scale + reach))
    return _Run(before * (length // meet), stop, first - before * (resized // meet))


def resize_the_middle(image: np.ndarray, size: tuple[int, int], crop: tuple[int, int]) -> torch.Tensor:
    """The middle `crop` of an image made smaller, to `size`: (h, w, 3) uint8 -> (1, 3, *crop) uint8.

    Equal to resizing the whole and cutting, in two thirds of the time (640 px to 256, 224 of them): nothing is
    computed that would be cut off. F.interpolate has no scale apart from the sizes, so its operator is called. (It
    leaves a pass out where that gives as many pixels as it gets, whatever the scale: hence only smaller.)
    """
    height, width, channels = image.shape
    y, x = _run(height, size[0], crop[0]), _run(width, size[1], crop[1])
    if y.stop == height and x.start:  # the shifted last row would end beyond the image
        x = _Run(0, x.stop, (size[1] - crop[1]) // 2)
    # Without a copy: rows of the full width from column x.start on, each ending in the beginning of the next. The
    # operator does not come to that end: it takes what it needs for the columns that are asked for.
    start, count = (y.start * width + x.start) * channels, (y.stop - y.start) * width * channels
    flat = torch.from_numpy(image).reshape(-1)
    rows = flat[start : start + count].view(1, y.stop - y.start, width, channels)
    resized = torch.ops.aten._upsample_bicubic2d_aa(
        rows.permute(0, 3, 1, 2),
        [y.skipped + crop[0], x.skipped + crop[1]],
        align_corners=False,
        scales_h=size[0] / height,
        scales_w=size[1] / width,
    )
    return resized[..., y.skipped :, x.skipped :]


@lru_cache
def _factor_and_offset(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grey level * scale - mean) / std as one factor and one offset, (3,) float32 each, for three colours.

    Made once: on CUDA each copy from the host would wait for the stream.
    """
    means, stds = torch.tensor(mean), torch.tensor(std)
    return (scale / stds).to(device), (means / stds).to(device)


def _to_cuda(images: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Images of one size as (n, 3, h, w) uint8 (a view of (n, h, w, 3)) on the device, by way of pinned memory."""
    batch = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=True)
    np.stack(images, out=batch.numpy())
    return batch.to(device, non_blocking=True).permute(0, 3, 1, 2)


def _center_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of (n, 3, h, w) as (n, 3, height, width), padded with zeros where the image is smaller."""
    pad_y, pad_x = max(0, height - pixels.shape[-2]), max(0, width - pixels.shape[-1])
    if pad_y or pad_x:  # an odd row or column of padding goes to the top and the left
        pixels = F.pad(pixels, [pad_x - pad_x // 2, pad_x // 2, pad_y - pad_y // 2, pad_y // 2])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
