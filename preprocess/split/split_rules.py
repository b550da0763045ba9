"""Which images are kept, and in which split: pure functions of arrays.

Rows are images, sorted by (dataset, target, patch); a building is a target, with one position, in one cell.
"""

from dataclasses import dataclass

import numpy as np

from common.places import geo
from common.places.zones import number_buildings
from common.schemas import SPLITS
from common.sections import Data
from preprocess.duplicates import duplicate_rules

TRAIN, VAL, TEST, NONE = 0, 1, 2, -1  # numbers of SPLITS


@dataclass
class Images:
    """What decides about N images, sorted by (dataset_id, target_id, patch_id): 69 bytes each."""

    dataset_id: np.ndarray  # (N,) int32
    target_id: np.ndarray  # int64
    patch_id: np.ndarray  # int64
    street_view_id: np.ndarray  # int64
    target_lat: np.ndarray  # float64, degrees
    target_lon: np.ndarray
    content_hash: np.ndarray  # uint64
    phash: np.ndarray
    dhash: np.ndarray
    has_embedding: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.dataset_id)


@dataclass
class Decision:
    """Where each image goes, and why some go nowhere."""

    split: np.ndarray  # (N,) int8: TRAIN, VAL, TEST or NONE
    building: np.ndarray  # (N,) int32, ascending
    cell: np.ndarray  # (N,) int64, see geo.cell_ids
    dropped: dict[str, int]  # reason -> images, in the order in which the rules were applied
    why: np.ndarray  # (N,) int8: which of `dropped` it is, by its place; -1 for an image that is kept
    like: np.ndarray  # (N,) int32: the image of its building that a duplicate is dropped for; -1 for all others
    lookalikes: int  # images kept though they share both perceptual hashes with another building's


def decide(images: Images, data: Data, seed: int) -> Decision:
    """Apply the rules, one after the other; an image is counted under the first that drops it."""
    building = number_buildings(images.dataset_id, images.target_id)
    firsts = np.flatnonzero(np.diff(building, prepend=-1))  # a building is where its first image says
    lat, lon = images.target_lat[firsts], images.target_lon[firsts]
    split = np.full(len(images), NONE, np.int8)
    why = np.full(len(images), -1, np.int8)
    rows = np.arange(len(images))  # still there
    dropped: dict[str, int] = {}

    def drop(reason: str, bad: np.ndarray) -> None:
        nonlocal rows
        why[rows[bad]] = len(dropped)
        dropped[reason] = int(bad.sum())
        split[rows[bad]] = NONE
        rows = rows[~bad]

    drop("embedding_missing", ~images.has_embedding)
    hashes = images.phash, images.dhash
    phash, dhash = (h[rows] for h in hashes)
    near = duplicate_rules.within_buildings(building[rows], phash, dhash, data.dedup_max_hamming)
    like = np.full(len(images), -1, np.int32)
    like[rows] = np.where(near < 0, -1, rows[near]) if len(rows) else near
    drop("duplicate_within_building", near >= 0)
    xyz = geo.to_xyz_m(lat, lon)
    equal = duplicate_rules.across_buildings(building[rows], images.content_hash[rows], xyz, data.ignore_radius_m)
    drop("duplicate_across_buildings", equal)
    lookalikes = duplicate_rules.count_lookalikes(*(c[rows] for c in (building, images.content_hash, *hashes)))

    cell = geo.cell_ids(lat, lon, data.split_cell_m)
    sizes = np.bincount(building[rows], minlength=len(firsts))
    ratios = (data.train_ratio, data.val_ratio, data.test_ratio)
    if data.split_by == "geo":
        there = sizes > 0
        cells, split_of_cell = assign_cells(cell[there], sizes[there], ratios, seed)
        split_of_building = np.full(len(firsts), NONE, np.int8)
        split_of_building[there] = split_of_cell[np.searchsorted(cells, cell[there])]
        too_near = in_buffer(lat, lon, split_of_building, cells, split_of_cell, data)
    else:
        split_of_building = assign_buildings(sizes, ratios, seed)
        too_near = np.zeros(len(firsts), bool)
    split[rows] = split_of_building[building[rows]]
    drop("buffer", too_near[building[rows]])
    panorama = images.dataset_id, images.street_view_id
    drop("panorama", shared_with_later_split(split[rows], *(key[rows] for key in panorama)))
    drop("picture_in_two_splits", shared_with_later_split(split[rows], images.content_hash[rows]))
    left = np.bincount(building[rows], minlength=len(firsts))
    drop("single_view", left[building[rows]] < 2)
    return Decision(split, building, cell[building], dropped, why, like, lookalikes)


def assign_cells(cell: np.ndarray, sizes: np.ndarray, ratios, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells, ascending, and the split of each: in random order, each to the split furthest below its ratio.

    `cell`, `sizes`: the cell of each building and its number of images.
    """
    cells, inverse = np.unique(cell, return_inverse=True)
    images = np.bincount(inverse, sizes, minlength=len(cells))
    lacking = images.sum() * np.asarray(ratios)  # images that each split still lacks
    split = np.zeros(len(cells), np.int8)
    for i in np.random.default_rng(seed).permutation(len(cells)):
        split[i] = np.argmax(lacking)
        lacking[split[i]] -= images[i]
    return cells, split


def assign_buildings(sizes: np.ndarray, ratios, seed: int) -> np.ndarray:
    """A split for each building, at random, in the ratios as counted in images. `sizes`: images of each."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    split = np.empty(len(sizes), np.int8)
    split[order] = np.searchsorted(np.cumsum(ratios)[:2] * sizes.sum(), middle, side="right")
    return split


def in_buffer(
    lat: np.ndarray,
    lon: np.ndarray,
    split: np.ndarray,
    cells: np.ndarray,
    split_of_cell: np.ndarray,
    data: Data,
) -> np.ndarray:
    """(M,) bool: train's buildings within the buffer of a cell of val or test, val's within that of one of test.

    `cells`: those with a split, ascending.
    """
    near = np.zeros((len(lat), len(SPLITS)), bool)
    for candidate in geo.cells_near(lat, lon, data.split_cell_m, data.split_buffer_m):
        place = np.minimum(np.searchsorted(cells, candidate), max(len(cells) - 1, 0))
        hit = np.flatnonzero(cells[place] == candidate) if len(cells) else place[:0]
        near[hit, split_of_cell[place[hit]]] = True
    return ((split == TRAIN) & (near[:, VAL] | near[:, TEST])) | ((split == VAL) & near[:, TEST])


def shared_with_later_split(split: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """(N,) bool: train's rows whose keys stand in val or test too, and val's whose keys stand in test."""
    order, starts = duplicate_rules.sort_groups(*keys)
    drop = np.zeros(len(split), bool)
    if len(starts):
        last = np.maximum.reduceat(split[order], starts)  # train < val < test
        drop[order] = split[order] < np.repeat(last, np.diff(starts, append=len(order)))
    return drop


def count_in_two_splits(split: np.ndarray, *keys: np.ndarray) -> int:
    """How many keys (buildings, panoramas, pictures) stand in more than one split."""
    order, starts = duplicate_rules.sort_groups(*keys)
    if not len(starts):
        return 0
    ordered = split[order]
    return int(np.sum(np.minimum.reduceat(ordered, starts) < np.maximum.reduceat(ordered, starts)))
