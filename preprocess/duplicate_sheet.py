"""A picture of the largest groups of duplicates, so that a person sees what was dropped."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import parquet, pictures, tars
from common.errors import PipelineError
from preprocess.duplicates import sort_groups
from preprocess.merge_files import Sources
from preprocess.split import Decision, Images

MAX_GROUPS = 8
SHOWN = 6  # images of a group


class Group(NamedTuple):
    title: str
    size: int  # images dropped
    rows: list[int]  # some of the images, the one that stands for them first


def largest_groups(images: Images, found: Decision) -> list[Group]:
    """The largest, of both kinds: a picture that its building has already; a JPEG at buildings far apart."""
    groups = []
    for reason, key, title in (
        ("duplicate_across_buildings", images.content_hash, "one JPEG at buildings far apart: all dropped"),
        ("duplicate_within_building", found.building, "like the first, at its building: dropped"),
    ):
        rows = np.flatnonzero(found.why == list(found.dropped).index(reason))
        order, starts = sort_groups(key[rows])
        sizes = np.diff(starts, append=len(rows))
        for number in np.argsort(-sizes, kind="stable")[:MAX_GROUPS]:
            members = rows[order[starts[number] :][: sizes[number]]]
            kept = (
                [] if key is images.content_hash else [_kept_one(images, found, members[0], set(members.tolist()))]
            )
            groups.append(Group(title, len(members), [*kept, *members.tolist()][:SHOWN]))
    return sorted(groups, key=lambda group: -group.size)[:MAX_GROUPS]


def draw(groups: list[Group], sources: Sources, raw_dir: Path) -> bytes:
    """A PNG: a line for each group. Raises PipelineError if a tar has gone or does not hold an image any more."""
    of_row = _pictures(sorted({row for group in groups for row in group.rows}), sources, raw_dir)
    lines = [
        pictures.Line(
            f"{group.size:,}: {group.title}", [of_row[row] for row in group.rows], [""] * len(group.rows)
        )
        for group in groups
    ]
    return pictures.sheet(lines, SHOWN)


def _kept_one(images: Images, found: Decision, row: int, dropped: set[int]) -> int:
    """The image of the same building, not among `dropped`, whose hashes are nearest to those of `row`."""
    first, last = np.searchsorted(found.building, [found.building[row], found.building[row] + 1])
    others = np.array([other for other in range(first, last) if other not in dropped])
    apart = [np.bitwise_count(hashes[others] ^ hashes[row]) for hashes in (images.phash, images.dhash)]
    return int(others[np.argmin(np.maximum(*apart))])


def _pictures(rows: list[int], sources: Sources, raw_dir: Path) -> dict[int, Image.Image]:
    """Small pictures of some rows of the metadata, read by offset."""
    found, end = {}, 0
    for source in sources.of_tar:
        start, end = end, end + source.num_rows
        wanted = [row for row in rows if start <= row < end]
        if not wanted:
            continue
        place = parquet.read(
            source.intermediates, ["target_id", "patch_id", "tar_file", "image_offset", "image_size"]
        )
        order = np.lexsort((place["patch_id"].to_numpy(), place["target_id"].to_numpy()))
        place = place.take(order[np.array(wanted) - start])
        tar = raw_dir / place["tar_file"][0].as_py()
        contents = tars.read_members(tar, place["image_offset"].to_pylist(), place["image_size"].to_pylist())
        for row, content in zip(wanted, contents, strict=True):
            found[row] = pictures.small(content)
            if found[row] is None:
                raise PipelineError(f"{tar} has no longer the images that process_tar.py found in it")
    return found
