"""Damage to a synthetic street's images and labels: each kind that must be rejected; and what is odd but valid."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from street_pairs import STREET_PATCHES, Pair, jpeg_of, label_of, name_of

BLANK_COLOUR = (128, 128, 128)


def without_numbers(row: dict, missing: int) -> bytes:
    """A `d` line that ends early."""
    return b" ".join(label_of(row | {"aligned": False}).split()[:-missing]) + b"\n"


BAD_LABELS: list[tuple[str, Callable[[dict], bytes]]] = [
    ("label_empty", lambda row: b""),
    ("label_empty", lambda row: b" \n\t\r\n"),
    ("label_malformed", lambda row: without_numbers(row, 2)),
    ("label_malformed", lambda row: label_of(row, lambda number: "unknown")),
    ("label_malformed", lambda row: row["alignment"].encode()),  # no `d` line
    ("label_malformed", lambda row: np.random.default_rng(row["patch_id"]).bytes(300)),
    ("not_finite", lambda row: label_of(row | {"target_lat": math.nan})),
    ("not_finite", lambda row: label_of(row | {"camera_height": math.inf})),
    ("position_out_of_range", lambda row: label_of(row | {"target_lat": 95.0})),
    ("position_out_of_range", lambda row: label_of(row | {"camera_lon": 200.0})),
    ("angle_out_of_range", lambda row: label_of(row | {"heading": 400.0})),
    ("angle_out_of_range", lambda row: label_of(row | {"pitch": 120.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": -5.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": 0.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": 20_000.0})),
    ("dataset_mismatch", lambda row: label_of(row | {"dataset_id": row["dataset_id"] + 500})),
]
BAD_IMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2]),
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2] + b"\xff\xd9"),  # an end marker after half of the data
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 3) + jpeg[-len(jpeg) // 6 :]),
    ("not_an_image", lambda jpeg: b"<html><body>404 Not Found</body></html>\n"),
    ("not_an_image", lambda jpeg: b""),
    ("jpeg_blank", lambda jpeg: jpeg_of(Image.new("RGB", Image.open(io.BytesIO(jpeg)).size, BLANK_COLOUR), 90)),
]
OTHER_DAMAGE = (
    "both",
    "label_missing",
    "image_missing",
    "name_dataset",
    "name_words",
    "name_short",
    "duplicate_id",
)


def spoil(pair: Pair, damage: int | str) -> None:
    """Makes one of the damages to a pair: a number counts through BAD_LABELS, then BAD_IMAGES."""
    if isinstance(damage, int) and damage < len(BAD_LABELS):
        pair.label_reason, make_label = BAD_LABELS[damage]
        pair.label, pair.image_reason = make_label(pair.row), "partner_rejected"
    elif isinstance(damage, int):
        pair.image_reason, make_image = BAD_IMAGES[damage - len(BAD_LABELS)]
        pair.image, pair.label_reason = make_image(pair.image), "partner_rejected"
    elif damage == "both":
        pair.label, pair.label_reason = b"", "label_empty"
        pair.image, pair.image_reason = pair.image[:100], "jpeg_corrupt"
    elif damage == "label_missing":
        pair.label, pair.image_reason = None, "label_missing"
    elif damage == "image_missing":
        pair.image, pair.label_reason = None, "image_missing"
    elif damage == "name_dataset":
        pair.stem = name_of(pair.row | {"dataset_id": pair.row["dataset_id"] + 500})
        pair.label_reason, pair.image_reason = "dataset_mismatch", "partner_rejected"
    elif damage in ("name_words", "name_short"):
        pair.stem = "cover" if damage == "name_words" else pair.stem.rsplit("_", 1)[0]
        pair.label_reason = pair.image_reason = "name_malformed"
    elif damage == "duplicate_id":
        pair.label_reason, pair.image_reason = "partner_rejected", "duplicate_id"
    elif damage == "tar_truncated":
        pair.label_reason, pair.image_reason = "partner_rejected", "tar_truncated"


def make_odd(pair: Pair, oddity: int) -> None:
    """Changes a good pair into one that is unusual and valid; the image stays as it is."""
    if oddity == 0:
        pair.label = label_of(pair.row, lambda number: f"{number:.16e}")
    elif oddity == 1:
        pair.label = label_of(pair.row, blank=" \t ", end=" \r\n")
    elif oddity == 2:
        pair.suffix = ".jpeg"
    elif oddity == 3:  # ids in the name that are not the label's
        pair.stem = name_of(pair.row | {"patch_id": pair.row["patch_id"] + 5_000_000, "target_id": 7})


@lru_cache(maxsize=4)
def no_imagery(image_px: int) -> bytes:
    """The grey picture that a server sends where it has none: a crossed-out camera."""
    image = Image.new("RGB", (120, 120), (228, 227, 223))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle([30, 42, 90, 82], radius=6, fill=(190, 190, 190))
    pen.ellipse([46, 48, 74, 76], fill=(228, 227, 223))
    pen.line([25, 90, 95, 32], fill=(150, 150, 150), width=4)
    return jpeg_of(image.resize((image_px, image_px)), 85)


def extra_pair(source: Pair, number: int, **changes: object) -> Pair:
    """A copy of a pair with an unused patch id."""
    patch_id = source.row["street"] * STREET_PATCHES + STREET_PATCHES // 2 + number
    row = source.row | {"patch_id": patch_id} | changes
    return Pair(row, source.image, label_of(row), name_of(row))


def damaged(pairs: list[Pair], damages: list[int | str], image_px: int, rng: np.random.Generator) -> list[Pair]:
    """A street's pairs, shuffled, some odd, and extra ones: near duplicates, no imagery, and every damage."""
    good = [replace(pairs[n]) for n in rng.permutation(len(pairs))]
    for n, pair in enumerate(good):
        make_odd(pair, n % 8)
    again = extra_pair(pairs[1], 0, kind="near_duplicate")
    again.image = jpeg_of(Image.open(io.BytesIO(again.image)), 88)
    absent = [extra_pair(pairs[n], 1 - n, kind="no_imagery") for n in (0, -1)]  # both ends of the street
    for pair in absent:
        pair.image = no_imagery(image_px)
    bad = []
    for n, damage in enumerate(damages):
        source = pairs[int(rng.integers(len(pairs)))]
        changes = {"patch_id": source.row["patch_id"], "street_view_id": source.row["street_view_id"] + 500}
        pair = extra_pair(source, 3 + n, **(changes if damage == "duplicate_id" else {}))
        spoil(pair, damage)
        bad.append(pair)
    return [*good, again, *absent, *bad]
