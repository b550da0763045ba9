"""The images of a synthetic street with their labels, which agree with the geometry.

Street coordinates, metres: s along the facades (to the right for who looks at them), t from the facades into the
street, z up from the ground. The facades lie in the plane t = 0.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from street_views import (
    PANORAMA_SPACING_M,
    STRIP_MARGIN_M,
    TARGET_SPACING_M,
    Place,
    draw_street,
    is_seen,
    place_street,
    render_view,
    take_panorama,
)

FIRST_DATASET = 88
STREET_PATCHES = 10_000  # patch ids of street n start at n times this; extra images at + 5,000
STREET_IDS = 1_000  # the same for targets and panoramas
LABEL_IDS = "dataset_id target_id patch_id street_view_id".split()  # the file name has the target last
LABEL_NUMBERS = (
    "target_lat target_lon target_height normal_x normal_y normal_z camera_lat camera_lon camera_height "
    "distance heading pitch roll"
).split()


@dataclass
class Pair:
    """An image and its label on their way into a tar; None stands for a file that is left out."""

    row: dict  # synthetic.COLUMNS but tar and member, the label's other numbers; alignment: text of the `a` line
    image: bytes | None
    label: bytes | None
    stem: str
    suffix: str = ".jpg"
    image_reason: str = ""
    label_reason: str = ""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a street besides its number."""

    seed: int
    damage: bool
    image_px: int
    targets_per_facade: tuple[int, int]
    facades_per_street: int
    views: tuple[int, int]


def name_of(row: dict) -> str:
    """DatasetID_PatchID_StreetViewID_TargetID: the target is last, unlike in the label; seven digits each."""
    return "_".join(f"{row[name]:07d}" for name in ("dataset_id", "patch_id", "street_view_id", "target_id"))


def label_of(row: dict, number: Callable[[float], str] = repr, blank: str = " ", end: str = "\n") -> bytes:
    """The label file: the `d` line and, for an aligned image, the `a` line."""
    numbers = [str(row[name]) for name in LABEL_IDS] + [number(float(row[name])) for name in LABEL_NUMBERS]
    lines = [blank.join(["d", *numbers]), *([row["alignment"]] if row["aligned"] else [])]
    return (end.join(lines) + end).encode()


def jpeg_of(image: Image.Image, quality: int) -> bytes:
    """The image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def street_pairs(settings: Settings, city: int, number: int) -> list[Pair]:
    """All images of a street with their labels, without damage."""
    rng = np.random.default_rng([settings.seed, city, number])
    street = draw_street(rng, settings.facades_per_street, settings.image_px)
    place = place_street(city, number, rng.uniform(0, 360), street.length_m)
    stops = np.arange(-STRIP_MARGIN_M, street.length_m + STRIP_MARGIN_M, PANORAMA_SPACING_M)
    panoramas = [take_panorama(rng, s) for s in stops]
    pairs, target_id = [], number * STREET_IDS
    for start, width, height in street.facades:
        lowest, highest = settings.targets_per_facade
        count = int(rng.integers(lowest, highest + 1, 2).min())  # few targets are more frequent
        free_m = width - TARGET_SPACING_M * count  # half a spacing at both ends
        if free_m < 0:
            raise ValueError(f"{count} targets do not fit on a facade of {width:.1f} m")
        for s in start + TARGET_SPACING_M * (0.5 + np.arange(count)) + np.sort(rng.uniform(0, free_m, count)):
            target = np.array([s, 0.0, rng.uniform(1.5, min(height - 0.5, 6.5))])
            seeing = [n for n, p in enumerate(panoramas) if is_seen(p.position, target, p.focal_share)]
            wanted = int(rng.integers(settings.views[0], settings.views[1] + 1))
            for view in sorted(rng.choice(seeing, min(wanted, len(seeing)), replace=False).tolist()):
                image = render_view(street, panoramas[view], target, settings.image_px, rng)
                row = describe(place, panoramas[view].position, target) | {
                    "dataset_id": FIRST_DATASET + city,
                    "target_id": target_id,
                    "patch_id": number * STREET_PATCHES + len(pairs),
                    "street_view_id": number * STREET_IDS + view,
                    "street": number,
                    "city": city,
                    "aligned": bool(rng.random() < 0.4),
                    "alignment": "a " + " ".join(f"{x:.6g}" for x in rng.normal(0, 20, 11)),
                    "kind": "plain",
                }
                pairs.append(Pair(row, jpeg_of(image, int(rng.integers(62, 80))), label_of(row), name_of(row)))
            target_id += 1
    return pairs


def describe(place: Place, camera: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """A label's numbers, rounded to 1 mm and 0.0001 degrees; camera and target in street coordinates."""
    ds, dt, dz = target - camera
    east, north = place.turn(ds, dt)
    normal_east, normal_north = place.turn(0, 1)
    target_lat, target_lon = place.to_degrees(target[0], target[1])
    camera_lat, camera_lon = place.to_degrees(camera[0], camera[1])
    return {
        "target_lat": round(target_lat, 8),
        "target_lon": round(target_lon, 8),
        "target_height": round(place.altitude_m + target[2], 3),
        "normal_x": round(normal_east, 6),
        "normal_y": round(normal_north, 6),
        "normal_z": 0.0,
        "camera_lat": round(camera_lat, 8),
        "camera_lon": round(camera_lon, 8),
        "camera_height": round(place.altitude_m + camera[2], 3),
        "distance": round(math.hypot(ds, dt), 3),
        "heading": round(math.degrees(math.atan2(east, north)) % 360, 4) % 360,
        "pitch": round(math.degrees(math.atan2(dz, math.hypot(ds, dt))), 4),
        "roll": 0.0,
    }
