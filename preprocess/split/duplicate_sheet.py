"""A picture of the largest groups of duplicates, for a person to check what was dropped."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from common import parquet
from common.errors import PipelineError
from common.imagery import pictures, tar_images
from preprocess.split.merge_files import Sources
from preprocess.split.split_rules import Decision, Images

MAX_GROUPS = 8
SHOWN = 6  # images of a group


class DuplicateGroup(NamedTuple):
    title: str  # why they were dropped
    size: int  # images dropped
    rows: list[int]  # some of the images, the one that is kept first


def largest_groups(images: Images, decision: Decision) -> list[DuplicateGroup]:
    """The largest groups of both kinds: one JPEG at distant buildings, and near-identical images of a building."""
    groups = []
    for members in _largest("duplicate_across_buildings", images.content_hash, decision):
        buildings = len(np.unique(decision.building[members]))
        title = f"the same file at {buildings:,} buildings, some far apart"
        groups.append(DuplicateGroup(title, len(members), members[:SHOWN].tolist()))
    for members in _largest("duplicate_within_building", decision.like, decision):
        kept = int(decision.like[members[0]])
        title = (
            f"like the first, which is kept, of building {images.dataset_id[kept]:04d}_{images.target_id[kept]}"
        )
        groups.append(DuplicateGroup(title, len(members), [kept, *members.tolist()][:SHOWN]))
    return sorted(groups, key=lambda group: -group.size)[:MAX_GROUPS]


def _largest(reason: str, key: np.ndarray, decision: Decision) -> list[np.ndarray]:
    """The rows dropped for `reason`, grouped by `key`: the groups with the most rows."""
    rows = np.flatnonzero(decision.why == list(decision.dropped).index(reason))
    largest = pd.Series(key[rows]).value_counts().index[:MAX_GROUPS]
    return [rows[key[rows] == group] for group in largest.to_numpy()]


def draw(groups: list[DuplicateGroup], sources: Sources, store: tar_images.TarImages) -> bytes:
    """A PNG with a line for each group. Raises PipelineError if a tar is missing or has other images by now."""
    rows = sorted({row for group in groups for row in group.rows})
    places = _places(rows, sources)
    image_of: dict[int, Image.Image] = {}
    for row, tar, image in zip(rows, places["tar_file"].to_pylist(), pictures.read(store, places), strict=True):
        if image is None:
            raise PipelineError(f"{store.tar(tar).path} no longer has the images that were found in it")
        image_of[row] = image
    lines = []
    for group in groups:
        title = f"{group.size:,} dropped: {group.title}"
        lines.append(pictures.Line(title, [image_of[row] for row in group.rows], [""] * len(group.rows)))
    return pictures.sheet(lines)


def _places(rows: list[int], sources: Sources) -> pa.Table:
    """Where the images of some rows of the metadata, ascending, are in the tars."""
    tables, end = [], 0
    for source in sources.of_tar:
        start, end = end, end + source.num_rows
        own = [row - start for row in rows if start <= row < end]
        if own:
            columns = ["target_id", "patch_id", "tar_file", "image_offset", "image_size"]
            table = parquet.read(source.intermediates, columns)
            tables.append(table.sort_by([("target_id", "ascending"), ("patch_id", "ascending")]).take(own))
    return pa.concat_tables(tables)
