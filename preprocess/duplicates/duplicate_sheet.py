"""A picture of the largest groups of duplicates, so that a person sees what was dropped."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from common import parquet
from common.errors import PipelineError
from common.imagery import pictures, tar_images
from preprocess.duplicates.duplicate_rules import sort_groups
from preprocess.split.merge_files import Sources
from preprocess.split.split_rules import Decision, Images

MAX_GROUPS = 8
SHOWN = 6  # images of a group


class DuplicateGroup(NamedTuple):
    title: str  # why they were dropped
    size: int  # images dropped
    rows: list[int]  # some of the images, the one that stands for them first


def largest_groups(images: Images, found: Decision) -> list[DuplicateGroup]:
    """The largest, of both kinds: a JPEG at buildings far apart; a picture that its building has already."""
    groups = []
    for members in _largest("duplicate_across_buildings", images.content_hash, found):
        buildings = len(np.unique(found.building[members]))
        title = f"all, since this one file stands at {buildings:,} buildings, some far apart"
        groups.append(DuplicateGroup(title, len(members), members[:SHOWN].tolist()))
    for members in _largest("duplicate_within_building", found.like, found):
        kept = found.like[members[0]]
        building = f"{images.dataset_id[kept]:04d}_{images.target_id[kept]}"
        title = f"for being like the first, which stays at their building {building}"
        groups.append(DuplicateGroup(title, len(members), [int(kept), *members.tolist()][:SHOWN]))
    return sorted(groups, key=lambda group: -group.size)[:MAX_GROUPS]


def _largest(reason: str, key: np.ndarray, found: Decision) -> list[np.ndarray]:
    """Rows that were dropped for a reason and share a key, for the keys of most rows."""
    rows = np.flatnonzero(found.why == list(found.dropped).index(reason))
    order, starts = sort_groups(key[rows])
    sizes = np.diff(starts, append=len(rows))
    largest = np.argsort(-sizes, kind="stable")[:MAX_GROUPS]
    return [rows[order[starts[group] :][: sizes[group]]] for group in largest]


def draw(groups: list[DuplicateGroup], sources: Sources, store: tar_images.TarImages) -> bytes:
    """A PNG: a line for each group. Raises PipelineError if a tar has gone or does not hold an image any more."""
    of_row = _pictures(sorted({row for group in groups for row in group.rows}), sources, store)
    lines = [
        pictures.Line(
            f"{group.size:,} dropped: {group.title}", [of_row[row] for row in group.rows], [""] * len(group.rows)
        )
        for group in groups
    ]
    return pictures.sheet(lines)


def _pictures(rows: list[int], sources: Sources, store: tar_images.TarImages) -> dict[int, Image.Image]:
    """Small pictures of some rows of the metadata, read by offset."""
    found: dict[int, Image.Image] = {}
    end = 0
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
        for row, picture in zip(wanted, pictures.read(store, place), strict=True):
            if picture is None:
                tar = store.raw_dir / place["tar_file"][0].as_py()
                raise PipelineError(f"{tar} has no longer the images that process_tar.py found in it")
            found[row] = picture
    return found
