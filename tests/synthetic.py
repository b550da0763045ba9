"""Synthetic street views in the raw format of the 3D Street View dataset: tars of JPEGs with label files.

A street is drawn once as a strip of facades; a view is that strip under the homography of a pinhole camera that
looks at a target on a facade, with its own light, season, trees and cars. Labels agree with the geometry.

Writes   <out>/0088.tar, 0089.tar, ...: one tar per city (= dataset)
Command  python tests/synthetic.py --out data/raw --streets 80 --cities 4 --seed 0 --processes 2
Size     about 57 images of 40 kB per street (640 px), 1 s per street and core; --image-px 96 is far faster

The same parameters give the same bytes. A street is drawn from its own seed (seed, city, street), so a larger set
contains the first streets of a smaller one. `--damage` adds bad files of every kind that a reader must reject and
odd ones that it must keep; the images without damage are the same with it.
"""

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
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

LOG = logging.getLogger("synthetic")
FIRST_DATASET = 88
STREET_PATCHES = 10_000  # patch ids of street n start at n times this; extra images at + 5,000
STREET_IDS = 1_000  # the same for targets and panoramas
COLUMNS = (
    "tar member dataset_id target_id patch_id street_view_id street city target_lat target_lon target_height "
    "camera_lat camera_lon heading pitch distance aligned kind"
).split()
LABEL_IDS = "dataset_id target_id patch_id street_view_id".split()  # the file name has the target last
LABEL_NUMBERS = (
    "target_lat target_lon target_height normal_x normal_y normal_z camera_lat camera_lon camera_height "
    "distance heading pitch roll"
).split()


@dataclass(frozen=True)
class Truth:
    """What was planted: valid images, rejects (tar, member, reason), regular files by their fate per tar."""

    images: pd.DataFrame
    rejects: pd.DataFrame
    members: dict[str, dict[str, int]]

    def save(self, folder: Path) -> None:
        """images.parquet, rejects.parquet and members.json in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.images.to_parquet(folder / "images.parquet", index=False)
        self.rejects.to_parquet(folder / "rejects.parquet", index=False)
        (folder / "members.json").write_text(json.dumps(self.members, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- geometry
# Street coordinates, metres: s along the facades (to the right for who looks at them), t from the facades into
# the street, z up from the ground. The facades lie in the plane t = 0.


# ------------------------------------------------------------------------------------------- images and labels


@dataclass
class Pair:
    """An image and its label on their way into a tar; None stands for a file that is left out."""

    row: dict  # COLUMNS but tar and member, the label's other numbers, and alignment: text of the `a` line
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
    """DatasetID_PatchID_StreetViewID_TargetID: the target is last, unlike in the label."""
    return f"{row['dataset_id']:04d}_{row['patch_id']}_{row['street_view_id']}_{row['target_id']}"


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
        "distance": round(math.sqrt(ds**2 + dt**2 + dz**2), 3),
        "heading": round(math.degrees(math.atan2(east, north)) % 360, 4) % 360,
        "pitch": round(math.degrees(math.atan2(dz, math.hypot(ds, dt))), 4),
        "roll": 0.0,
    }


# ------------------------------------------------------------------------------------------------------ damage

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
    ("jpeg_corrupt", lambda jpeg: b"<html><body>404 Not Found</body></html>\n"),
    ("jpeg_corrupt", lambda jpeg: b""),
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


# -------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class Member:
    """A regular file of a tar."""

    name: str
    content: bytes
    role: str  # images, labels or other: its counter in Truth.members unless it is rejected
    reason: str = ""
    row: dict | None = None  # of a valid image


def members_of(pairs: list[Pair], folder: str, other_folder: str, rng: np.random.Generator) -> list[Member]:
    """The pairs' files: images and labels in either order, the labels of some much later; bad ones elsewhere."""
    members, late, last = [], [], []
    repeated = {pair.row["patch_id"] for pair in pairs if pair.image_reason == "duplicate_id"}
    for pair in pairs:
        good = not (pair.image_reason or pair.label_reason)
        path = (folder if good else other_folder) + pair.stem
        row = pair.row if good else None
        files = [Member(path + ".txt", pair.label, "labels", pair.label_reason)]
        files.append(Member(path + pair.suffix, pair.image, "images", pair.image_reason, row))
        files = [file for file in files if file.content is not None]
        order = rng.random()
        if pair.image_reason == "tar_truncated":  # the image is cut: nothing may come after it
            last = files
        elif order < 0.1 and good and pair.row["patch_id"] not in repeated:  # there the first pair must stay first
            late.append(files.pop(0))
            members += files
        else:
            members += files[::-1] if order < 0.5 else files
    return late[::2] + members + late[1::2] + last


def street_members(settings: Settings, city: int, number: int, damages: list[int | str]) -> list[Member]:
    """A street's files in the order of the tar."""
    pairs = street_pairs(settings, city, number)
    rng = np.random.default_rng([settings.seed, city, number, 1])
    stem = f"{FIRST_DATASET + city:04d}"
    folders = [f"{stem}/{stem}/", ""] if city % 2 == 0 else ["", f"{stem}/{stem}/"]
    if not settings.damage:
        return members_of(pairs, *folders, rng)
    members = members_of(damaged(pairs, damages, settings.image_px, rng), *folders, rng)
    if number == 0:
        other = [("README", b"Street views, for tests.\n"), ("index.csv", b"patch,target\n1,2\n")]
        members[:0] = [Member(folders[0] + name, content, "other") for name, content in other]
    return members


def tar_info(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """A header that is the same on every machine and day."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode, info.mtime = (
        size,
        kind,
        0o755 if kind == tarfile.DIRTYPE else 0o644,
        1_400_000_000,
    )
    return info


def write_tar(path: Path, members: Iterator[Member]) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Writes a tar, which appears when whole; returns its rows of Truth.images and .rejects, and its counts."""
    images, rejects, counts = [], [], {"images": 0, "labels": 0, "rejects": 0, "other": 0}
    partial, cut_at, folders = path.with_name(f".{path.name}.partial"), None, set()
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            for folder in reversed(Path(member.name).parents[:-1]):
                if folder not in folders:
                    tar.addfile(tar_info(folder.as_posix(), 0, tarfile.DIRTYPE))
                    folders.add(folder)
            if member.reason == "tar_truncated":
                cut_at = tar.offset + tarfile.BLOCKSIZE + len(member.content) // 2
            tar.addfile(tar_info(member.name, len(member.content)), io.BytesIO(member.content))
            counts["rejects" if member.reason else member.role] += 1
            if member.reason:
                rejects.append({"tar": path.name, "member": member.name, "reason": member.reason})
            elif member.row:
                row = member.row | {"tar": path.name, "member": member.name}
                images.append({name: row[name] for name in COLUMNS})
    if cut_at is not None:
        os.truncate(partial, cut_at)
    os.replace(partial, path)
    return images, rejects, counts


def write_dataset(out: Path, *, streets: int, cities: int = 2, seed: int = 0, damage: bool = False,
                  image_px: int = 640, targets_per_facade: tuple[int, int] = (1, 3), facades_per_street: int = 10,
                  views: tuple[int, int] = (2, 7), processes: int = 1) -> Truth:  # fmt: skip
    """Writes a tar per city into `out`, `streets` being their sum over the cities.

    Ranges include both ends. A target that fewer panoramas see than are drawn for it gets those that there are.
    """
    if streets < cities:
        raise ValueError(f"{cities} cities need at least as many streets, not {streets}")
    settings = Settings(seed, damage, image_px, targets_per_facade, facades_per_street, views)
    jobs = {(street % cities, street // cities): [] for street in range(streets)}
    places = list(jobs)
    if damage:
        for n, kind in enumerate([*range(len(BAD_LABELS) + len(BAD_IMAGES)), *OTHER_DAMAGE]):
            jobs[places[n % streets]].append(kind)
        jobs[max(places)].append("tar_truncated")
    tasks = [(settings, *place, jobs[place]) for place in sorted(jobs)]

    out.mkdir(parents=True, exist_ok=True)
    images, rejects, counts, started = [], [], {}, time.perf_counter()
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    try:
        results = pool.imap(_street_members, tasks) if pool else map(_street_members, tasks)
        for city, streets_of_city in groupby(zip(tasks, results, strict=True), key=lambda pair: pair[0][1]):
            path = out / f"{FIRST_DATASET + city:04d}.tar"
            found = write_tar(path, (member for _, members in streets_of_city for member in members))
            images += found[0]
            rejects += found[1]
            counts[path.stem] = found[2]
            LOG.info("%s: %s images so far, %.1f s", path, f"{len(images):,}", time.perf_counter() - started)
    finally:
        if pool:
            pool.terminate()
    return Truth(
        pd.DataFrame(images, columns=COLUMNS), pd.DataFrame(rejects, columns=["tar", "member", "reason"]), counts
    )


def _street_members(task: tuple) -> list[Member]:
    return street_members(*task)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--streets", type=int, default=80, help="sum over all cities (default 80)")
    parser.add_argument("--cities", type=int, default=4, help="number of tars (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damage", action="store_true", help="add bad and odd files of every kind")
    parser.add_argument("--image-px", type=int, default=640, help="width and height (default 640)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--truth", type=Path, help="folder for what was planted (two Parquet files and a JSON)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    truth = write_dataset(args.out, streets=args.streets, cities=args.cities, seed=args.seed, damage=args.damage,
                          image_px=args.image_px, processes=args.processes)  # fmt: skip
    if args.truth:
        truth.save(args.truth)
    seconds = time.perf_counter() - started
    buildings = truth.images.groupby(["dataset_id", "target_id"]).ngroups
    total = f"{len(truth.images):,} images of {buildings:,} buildings, {len(truth.rejects):,} rejects"
    rate = len(truth.images) / seconds
    LOG.info("%s: %d tars, %s; %.0f s, %.0f images/s", args.out, len(truth.members), total, seconds, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
