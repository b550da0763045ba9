"""From decoded images to pictures for a model: what preprocessor_config.json asks for, in torch.

Equal to Hugging Face's image processors within one grey level, and much faster. For DINOv3 those also need
torchvision.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common.errors import PipelineError
from generate import model_files
from generate.model_files import PREPROCESSING

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
        """Height and width of the pictures."""
        size = self.crop or self.exact_size
        if size is None:
            raise PipelineError("preprocessor_config.json gives neither a crop nor an exact size for all images")
        return list(size)

    def __call__(self, images: Iterable[np.ndarray], device: torch.device) -> torch.Tensor:
        """(N, 3, H, W) float32 of N images, (h, w, 3) uint8 of any sizes: on `device` if that is CUDA, which then
        resizes them, else on the CPU.
        """
        if device.type != "cuda":  # one by one as they come: what was just decoded is still in the core's cache
            device = torch.device("cpu")
            resized = [self._shrink(torch.from_numpy(image)[None].permute(0, 3, 1, 2)) for image in images]
        else:
            runs = groupby(images, key=np.shape)  # consecutive images of one size are resized together
            resized = [self._shrink(_to_cuda(list(run), device)) for _, run in runs]
        if not resized:
            return torch.empty((0, 3, *self.image_size), device=device)
        pixels = torch.cat(resized).permute(0, 2, 3, 1).float().contiguous()  # (N, H, W, 3)
        factor, offset = _factor_and_offset(self.scale, self.mean, self.std, pixels.shape[2], device)
        pixels.flatten(2).mul_(factor).sub_(offset)  # whole rows: faster than three channels
        return pixels.permute(0, 3, 1, 2)

    def _shrink(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images of one size, (n, 3, h, w) uint8, resized and cropped: (n, 3, H, W), grey levels."""
        size = self._resized(*pixels.shape[-2:])
        if size != tuple(pixels.shape[-2:]) and self.rescale_first:
            antialias = self.mode != "nearest-exact"
            pixels = F.interpolate(pixels.float(), size, mode=self.mode, antialias=antialias)
        elif size != tuple(pixels.shape[-2:]):  # only the CPU resizes uint8
            pixels = pixels if pixels.device.type == "cpu" else pixels.float()
            pixels = resize_grey_levels(pixels, size, self.mode)
        return _center_crop(pixels, *self.crop) if self.crop else pixels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        if self.shortest_edge is None:
            return self.exact_size or (height, width)
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)


def picture_side(px: int, share: float) -> int:
    """The side of a picture whose central `share` is `px` wide, even or odd as that is: they have one centre."""
    return px + 2 * round((px / share - px) / 2)


def read_config(folder: Path, share: float) -> dict:
    """A model's preprocessor_config.json, changed to give pictures whose central `share` has the model's size: all
    views down to that share are made from them, see `make_views`. Raises PipelineError.
    """
    path = folder / PREPROCESSING
    config = model_files.read_json(path)
    if share < 1 and not config.get("do_resize", True):
        raise PipelineError(f"{path} resizes nothing, so there are no views\nset embedding_model.views to [1.0]")
    for key in ("size", "crop_size"):
        if isinstance(size := config.get(key), dict):
            config[key] = {side: picture_side(px, share) for side, px in size.items()}
        elif size is not None:
            config[key] = picture_side(size, share)
    return config


def read_preprocessing(folder: Path, share: float = 1) -> Preprocessing:
    """The preprocessing that a model's folder asks for; `share`: see `read_config`.

    Raises PipelineError if it is absent or not supported.
    """
    path = folder / PREPROCESSING
    try:
        config = read_config(folder, share)
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
    except (KeyError, TypeError) as error:
        raise PipelineError(f"{path} cannot be used: it lacks {error}, or has it in an unknown form") from None


def resize_grey_levels(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """(n, 3, h, w) grey levels, uint8 or float32, resized as PIL does it: (n, 3, *size) of the same dtype.

    PIL rounds and clips to 0..255 after each of two passes, of which the first goes along the rows, or along the
    columns if an image is more than twice as high as wide. (The order shows where a pass is clipped.)
    """
    height, width = pixels.shape[-2:]
    first = (size[0], width) if height > 2 * width else (height, size[1])
    for target in (first, size):
        pixels = F.interpolate(pixels, target, mode=mode, antialias=mode != "nearest-exact")
        if pixels.is_floating_point():
            pixels = pixels.round_().clamp_(0, 255)
    return pixels


@lru_cache
def _factor_and_offset(
    scale: float, mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grey level * scale - mean) / std as a factor and an offset, (width * 3,) float32 each, for a row of pixels.

    Cached: on CUDA each copy from the host would wait for the stream.
    """
    means, stds = torch.tensor(mean), torch.tensor(std)
    return (scale / stds).repeat(width).to(device), (means / stds).repeat(width).to(device)


def _to_cuda(images: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Images of one size as (n, 3, h, w) uint8 (a view of (n, h, w, 3)) on the device, by way of pinned memory."""
    batch = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=True)
    np.stack(images, out=batch.numpy())
    return batch.to(device, non_blocking=True).permute(0, 3, 1, 2)


def _center_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of (n, 3, h, w) as (n, 3, height, width), padded with zeros where the image is smaller."""
    y, x = height - pixels.shape[-2], width - pixels.shape[-1]  # rows and columns to add, or to cut if negative
    return F.pad(pixels, [x - x // 2, x // 2, y - y // 2, y // 2])
