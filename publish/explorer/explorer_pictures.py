"""Small pictures for the explorer, within a budget: where the images are, and their JPEGs in base64."""

import io
from base64 import b64encode
from collections.abc import Iterable
from itertools import chain, zip_longest
from typing import Any

import pyarrow as pa
from PIL import Image

from common.imagery import pictures
from common.imagery.tar_images import TarImages
from publish.inference.vector_tables import LOCATION

PER_BUILDING = 4
_PX, _LARGE_PX, _QUALITY = 120, 240, 70
_SMALLEST_BYTES = 1_500  # of a picture in the page: no budget has room for more of them than that
_READ_AT_ONCE = 1_024  # 44 MB; each time the tars are read from front to back
FACTS = ["building_id", "heading", *sorted(LOCATION)]  # of an image, beside its id


def of_buildings(image_ids: Iterable[Iterable[str]], budget_bytes: float) -> list[str]:
    """The images to show of buildings: the first of each, then the second of each, up to PER_BUILDING; no more
    than a budget may have room for."""
    by_turn = zip_longest(*(list(ids)[:PER_BUILDING] for ids in image_ids))
    turns = ([one for one in turn if one] for turn in by_turn)
    return list(chain.from_iterable(turns))[: int(budget_bytes / _SMALLEST_BYTES)]


def read(
    store: TarImages, images: dict[str, dict], first: list[str], then: list[str], budget_bytes: float
) -> dict[str, str]:
    """JPEGs in base64 by image id: of `first` until half of the budget is used, of `then` until all is. What is
    left makes them larger, from the first on. Images that are not found or cannot be read are left out."""
    chosen = _within(store, images, first, budget_bytes / 2)
    left = budget_bytes - sum(map(len, chosen.values()))
    chosen |= _within(store, images, [one for one in then if one not in chosen], left)
    left = budget_bytes - sum(map(len, chosen.values()))
    return chosen | _within(store, images, list(chosen), left, _LARGE_PX)


def _within(
    store: TarImages, images: dict[str, dict], ids: list[str], budget_bytes: float, px: int = _PX
) -> dict[str, str]:
    known = [one for one in ids if one in images][: int(budget_bytes / _SMALLEST_BYTES)]
    chosen: dict[str, str] = {}
    for start in range(0, len(known), _READ_AT_ONCE):
        some = known[start : start + _READ_AT_ONCE]
        places = pa.table({name: [images[one][name] for one in some] for name in LOCATION})
        for one, picture in zip(some, pictures.read(store, places, px), strict=True):
            if picture is None:
                continue
            jpeg = _jpeg(picture)
            budget_bytes -= len(jpeg)
            if budget_bytes < 0:
                return chosen
            chosen[one] = jpeg
    return chosen


def _jpeg(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return b64encode(file.getvalue()).decode()


def content(chosen: dict[str, str], image_ids: Iterable[Iterable[str]]) -> dict[str, Any]:
    """`image_names` of the pictures, and `images_of`, for each building, the numbers of its pictures."""
    number_of = {one: number for number, one in enumerate(chosen)}
    images_of = [[number_of[one] for one in list(ids)[:PER_BUILDING] if one in number_of] for ids in image_ids]
    return {"image_names": list(chosen), "images_of": images_of}
