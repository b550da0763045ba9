"""Synthetic street views in the raw format of the 3D Street View dataset: tars of JPEGs with label files.

A street is drawn once as a strip of facades; a view is that strip under the homography of a pinhole camera that
looks at a target on a facade, with its own light, season, trees and cars. Labels agree with the geometry.

Writes   <out>/0088.tar, 0089.tar, ...: one tar per city (= dataset), plain or, as published, gzip streams
Command  python tests/synthetic.py --out data/raw --streets 80 --cities 4 --seed 0 --processes 2
Size     about 57 images of 40 kB per street (640 px), 1 s per street and core; --image-px 96 is far faster

The same parameters give the same bytes. A street is drawn from its own seed (seed, city, street), so a larger set
contains the first streets of a smaller one. `--damage` adds bad files of every kind that a reader must reject and
odd ones that it must keep; the images without damage are the same with it. `--stream-damage KIND` breaks the first
tar itself (damaged_tars.py), which then has no bad files of `--damage`; that takes four times its size of memory.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import damaged_tars
import numpy as np
import pandas as pd
from damaged_pairs import BAD_IMAGES, BAD_LABELS, OTHER_DAMAGE, damaged
from street_pairs import FIRST_DATASET, Pair, Settings, street_pairs

LOG = logging.getLogger("synthetic")
COLUMNS = (
    "tar member dataset_id target_id patch_id street_view_id street city target_lat target_lon target_height "
    "camera_lat camera_lon heading pitch distance aligned kind"
).split()


@dataclass(frozen=True)
class Truth:
    """What was planted: valid images, rejects (tar, member, reason), files that are lost with a part of their tar
    (tar, member, why: see damaged_tars.DamagedTar), regular files by their fate per tar.
    """

    images: pd.DataFrame
    rejects: pd.DataFrame
    lost: pd.DataFrame
    members: dict[str, dict[str, int]]

    def save(self, folder: Path) -> None:
        """images.parquet, rejects.parquet, lost.parquet and members.json in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.images.to_parquet(folder / "images.parquet", index=False)
        self.rejects.to_parquet(folder / "rejects.parquet", index=False)
        self.lost.to_parquet(folder / "lost.parquet", index=False)
        (folder / "members.json").write_text(json.dumps(self.members, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------ tars


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
    folders = [f"{stem}/", ""] if city % 2 == 0 else ["", f"{stem}/{stem}/"]  # one, as published, or two
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


@dataclass
class Planted:
    """Truth of one tar: rows, and counts of regular files."""

    images: list[dict]
    rejects: list[dict]
    lost: list[dict]
    counts: dict[str, int]


def write_tar(path: Path, members: Iterator[Member], compress: bool, stream_damage: str, seed: int) -> Planted:
    """Writes a tar, which appears when whole. `stream_damage`: one of damaged_tars.KINDS, or none."""
    plain, finished = (path.with_name(f".{path.name}.{name}") for name in ("plain", "partial"))
    planted = write_plain_tar(plain, path.name, members)
    if stream_damage:
        tar, rng = plain.read_bytes(), np.random.default_rng(seed)
        content, lost = damaged_tars.damage(stream_damage, tar, damaged_tars.members_of(tar), rng, compress)
        finished.write_bytes(content)
        lose(planted, path.name, lost)
    elif compress:
        damaged_tars.write_gzip(plain, finished)
    else:
        plain.rename(finished)
    plain.unlink(missing_ok=True)
    os.replace(finished, path)
    return planted


def lose(planted: Planted, tar: str, lost: dict[str, str]) -> None:
    """Members that are lost are neither images nor labels nor rejects; what is left of their pairs is rejected."""
    counts, images, paired = planted.counts, planted.images, set()
    counts["lost"] = len(lost)
    planted.lost = [{"tar": tar, "member": member, "why": why} for member, why in lost.items()]
    planted.images = []
    for row in images:
        image, label = row["member"], row["member"].rsplit(".", 1)[0] + ".txt"
        paired |= {image, label}
        for member, other, missing in ((image, label, "image_missing"), (label, image, "label_missing")):
            if member in lost and other not in lost:
                reason = missing if lost[member] == "absent" else "partner_rejected"
                planted.rejects.append({"tar": tar, "member": other, "reason": reason})
                counts["rejects"] += 1
        if image not in lost and label not in lost:
            planted.images.append(row)
        else:
            counts["images"] -= 1
            counts["labels"] -= 1
    counts["other"] -= len(set(lost) - paired)


def write_plain_tar(path: Path, tar_file: str, members: Iterator[Member]) -> Planted:
    """Writes a plain tar; `tar_file`: its name in the truth."""
    planted = Planted([], [], [], {"images": 0, "labels": 0, "rejects": 0, "other": 0})
    cut_at, folders = None, set()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            for folder in reversed(Path(member.name).parents[:-1]):
                if folder not in folders:
                    tar.addfile(tar_info(folder.as_posix(), 0, tarfile.DIRTYPE))
                    folders.add(folder)
            if member.reason == "tar_truncated":
                cut_at = tar.offset + tarfile.BLOCKSIZE + len(member.content) // 2
            tar.addfile(tar_info(member.name, len(member.content)), io.BytesIO(member.content))
            planted.counts["rejects" if member.reason else member.role] += 1
            if member.reason:
                planted.rejects.append({"tar": tar_file, "member": member.name, "reason": member.reason})
            elif member.row:
                row = member.row | {"tar": tar_file, "member": member.name}
                planted.images.append({name: row[name] for name in COLUMNS})
    if cut_at is not None:
        os.truncate(path, cut_at)
    return planted


def write_dataset(out: Path, *, streets: int, cities: int = 2, seed: int = 0, damage: bool = False,
                  image_px: int = 640, targets_per_facade: tuple[int, int] = (1, 3), facades_per_street: int = 10,
                  views: tuple[int, int] = (2, 7), processes: int = 1, compress: bool = True,
                  stream_damage: str = "") -> Truth:  # fmt: skip
    """Writes a tar per city into `out`, `streets` being their sum over the cities; `compress`: as gzip streams.
    `stream_damage`: one of damaged_tars.KINDS, of the first city's tar.

    Ranges include both ends. A target that fewer panoramas see than are drawn for it gets those that there are.
    """
    refuse(streets, cities, damage, compress, stream_damage)
    settings = Settings(seed, damage, image_px, targets_per_facade, facades_per_street, views)
    jobs = {(street % cities, street // cities): [] for street in range(streets)}
    places = [place for place in jobs if not (stream_damage and place[0] == 0)]
    if damage:
        for n, kind in enumerate([*range(len(BAD_LABELS) + len(BAD_IMAGES)), *OTHER_DAMAGE]):
            jobs[places[n % len(places)]].append(kind)
        jobs[max(places)].append("tar_truncated")
    tasks = [(settings, *place, jobs[place]) for place in sorted(jobs)]

    out.mkdir(parents=True, exist_ok=True)
    tars, started = {}, time.perf_counter()
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that collects
    pool = multiprocessing.get_context("spawn").Pool(processes, *ignore) if processes > 1 else None
    try:
        results = pool.imap(_street_members, tasks) if pool else map(_street_members, tasks)
        for city, streets_of_city in groupby(zip(tasks, results, strict=True), key=lambda pair: pair[0][1]):
            path = out / f"{FIRST_DATASET + city:04d}.tar"
            files = (file for _, members in streets_of_city for file in members)
            tars[path.stem] = write_tar(path, files, compress, "" if city else stream_damage, seed)
            images = sum(len(planted.images) for planted in tars.values())
            LOG.info("%s: %s images so far, %.1f s", path, f"{images:,}", time.perf_counter() - started)
    finally:
        if pool:
            pool.terminate()
    return Truth(
        pd.DataFrame([row for tar in tars.values() for row in tar.images], columns=COLUMNS),
        pd.DataFrame([row for tar in tars.values() for row in tar.rejects], columns=["tar", "member", "reason"]),
        pd.DataFrame([row for tar in tars.values() for row in tar.lost], columns=["tar", "member", "why"]),
        {stem: tar.counts for stem, tar in tars.items()},
    )


def refuse(streets: int, cities: int, damage: bool, compress: bool, stream_damage: str) -> None:
    """Raises ValueError if such a dataset cannot be written."""
    if streets < cities:
        raise ValueError(f"{cities} cities need at least as many streets, not {streets}")
    if stream_damage and stream_damage not in damaged_tars.KINDS:
        raise ValueError(f"no such damage: {stream_damage}")
    if stream_damage and not compress and stream_damage not in damaged_tars.PLAIN_KINDS:
        raise ValueError(f"{stream_damage} is a damage of gzip streams, and these tars are plain")
    if stream_damage and damage and cities == 1:
        raise ValueError("bad files and a damaged tar need two cities: the damaged tar is the first one")


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
    parser.add_argument(
        "--stream-damage", metavar="KIND", choices=damaged_tars.KINDS, default="",
        help=f"damage the first tar: {', '.join(damaged_tars.KINDS)}",
    )  # fmt: skip
    parser.add_argument("--plain", dest="compress", action="store_false", help="no gzip")
    parser.add_argument("--image-px", type=int, default=640, help="width and height (default 640)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--truth", type=Path, help="folder for what was planted (three Parquet files and a JSON)")
    args = parser.parse_args(argv)
    try:
        refuse(args.streets, args.cities, args.damage, args.compress, args.stream_damage)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    truth = write_dataset(args.out, streets=args.streets, cities=args.cities, seed=args.seed, damage=args.damage,
                          image_px=args.image_px, processes=args.processes, compress=args.compress,
                          stream_damage=args.stream_damage)  # fmt: skip
    if args.truth:
        truth.save(args.truth)
    seconds = time.perf_counter() - started
    buildings = truth.images.groupby(["dataset_id", "target_id"]).ngroups
    total = f"{len(truth.images):,} images of {buildings:,} buildings, {len(truth.rejects):,} rejects"
    rate = len(truth.images) / seconds
    LOG.info("%s: %d tars, %s; %.0f s, %.0f images/s", args.out, len(truth.members), total, seconds, rate)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
