"""Which images are kept, and in which split: pure functions of arrays.

Rows are images, sorted by (dataset, target, patch); a building is a target, with one position, in one cell. One
whose position is not known (imported photographs may have none) is a cell of its own.
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
    target_lat: np.ndarray  # float64, degrees, NaN: not known
    target_lon: np.ndarray
    content_hash: np.ndarray  # uint64
    phash: np.ndarray
    dhash: np.ndarray
    has_embedding: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.dataset_id)


@dataclass(frozen=True)
class HeldOut:
    """Images that must be new to a model: `listed` in data.held_out, of which these rows are there."""

    listed: int
    rows: np.ndarray  # (N,) bool


@dataclass
class Decision:
    """Where each image goes, and why some go nowhere."""

    split: np.ndarray  # (N,) int8: TRAIN, VAL, TEST or NONE
    building: np.ndarray  # (N,) int32, ascending
    cell: np.ndarray  # (N,) int64, see geo.cells_of_buildings
    dropped: dict[str, int]  # reason -> images, in the order of the rules
    why: np.ndarray  # (N,) int8: the position of its reason in `dropped`; -1 for an image that is kept
    like: np.ndarray  # (N,) int32: the image of its building that a duplicate is dropped for; -1 for all others
    lookalikes: int  # images kept although another building has one with the same perceptual hashes


def decide(images: Images, data: Data, seed: int, held_out: np.ndarray | None = None) -> Decision:
    """Apply the rules, one after the other; an image is counted under the first that drops it.

    `held_out` (N,) bool: images that must be new to a model. Their buildings go to test, and so do the cells that
    these are in; no other split keeps an image of their panoramas, or with the bytes of one of them.
    """
    held_out = np.zeros(len(images), bool) if held_out is None else held_out
    building = number_buildings(images.dataset_id, images.target_id)
    firsts = np.flatnonzero(np.diff(building, prepend=-1))  # the first image of each building gives its position
    lat, lon = images.target_lat[firsts], images.target_lon[firsts]
    split, why = (np.full(len(images), NONE, np.int8) for _ in range(2))
    rows = np.arange(len(images))  # not dropped yet
    dropped: dict[str, int] = {}

    def drop(reason: str, bad: np.ndarray) -> None:
        nonlocal rows
        why[rows[bad]] = len(dropped)
        dropped[reason] = int(bad.sum())
        split[rows[bad]] = NONE
        rows = rows[~bad]

    drop("embedding_missing", ~images.has_embedding)
    phash, dhash = images.phash[rows], images.dhash[rows]
    near = duplicate_rules.within_buildings(building[rows], phash, dhash, data.dedup_max_hamming)
    like = np.full(len(images), -1, np.int32)
    like[rows] = np.append(rows, -1)[near]  # -1 stays -1
    drop("duplicate_within_building", near >= 0)
    xyz = geo.to_xyz_m(lat, lon)
    equal = duplicate_rules.across_buildings(building[rows], images.content_hash[rows], xyz, data.ignore_radius_m)
    drop("duplicate_across_buildings", equal)
    lookalikes = duplicate_rules.count_lookalikes(
        building[rows], images.content_hash[rows], images.phash[rows], images.dhash[rows]
    )

    cell = geo.cells_of_buildings(lat, lon, data.split_cell_m)
    sizes = np.bincount(building[rows], minlength=len(firsts))
    held = np.zeros(len(firsts), bool)
    held[building[held_out]] = True
    split_of_building, too_near = split_buildings(lat, lon, cell, sizes, held, data, seed)
    split[rows] = split_of_building[building[rows]]
    drop("buffer", too_near[building[rows]])

    for reason, keys in (
        ("panorama", (images.dataset_id, images.street_view_id)),
        ("picture_in_two_splits", (images.content_hash,)),
    ):
        # what is held out counts as test's even where another rule has dropped it; NONE is before all splits
        known = np.where(held_out, TEST, split)
        drop(reason, shared_with_later_split(known, *keys)[rows])
    sizes = np.bincount(building[rows], minlength=len(firsts))
    drop("single_view", sizes[building[rows]] < 2)
    return Decision(split, building, cell[building], dropped, why, like, lookalikes)


def split_buildings(
    lat: np.ndarray,
    lon: np.ndarray,
    cell: np.ndarray,
    sizes: np.ndarray,
    held_out: np.ndarray,
    data: Data,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The split of each of M buildings, (M,) int8, and which of them are in the buffer, (M,) bool. `sizes`: their
    images that are left; `held_out`: which must be in test."""
    ratios = (data.train_ratio, data.val_ratio, data.test_ratio)
    if data.split_by == "building":
        return assign_buildings(sizes, ratios, seed, held_out), np.zeros(len(sizes), bool)
    has_split = (sizes > 0) | held_out
    cells, split_of_cell = assign_cells(cell[has_split], sizes[has_split], ratios, seed, held_out[has_split])
    split = np.full(len(sizes), NONE, np.int8)
    split[has_split] = split_of_cell[np.searchsorted(cells, cell[has_split])]
    return split, in_buffer(lat, lon, split, cells, split_of_cell, data)


def assign_cells(
    cell: np.ndarray, sizes: np.ndarray, ratios, seed: int, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The cells, ascending, and the split of each: test if a building in it is held out; of the others, in random
    order, each goes to the split furthest below its ratio. `cell`, `sizes`, `held_out`: the cell of each building,
    its number of images, and whether it must be in test."""
    cells, inverse = np.unique(cell, return_inverse=True)
    images = np.bincount(inverse, sizes, minlength=len(cells))
    is_held = np.bincount(inverse, held_out, minlength=len(cells)) > 0
    # images that each split still needs
    missing = images.sum() * ratios_left(ratios, images[is_held].sum() / max(images.sum(), 1))
    split = np.full(len(cells), TEST, np.int8)
    for i in np.random.default_rng(seed).permutation(len(cells)):
        if not is_held[i]:
            split[i] = np.argmax(missing)
            missing[split[i]] -= images[i]
    return cells, split


def assign_buildings(sizes: np.ndarray, ratios, seed: int, held_out: np.ndarray) -> np.ndarray:
    """A random split for each building, but test for those `held_out` (M,) bool; the ratios are in images.
    `sizes`: the number of images of each."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[~held_out[order]]
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    left = ratios_left(ratios, sizes[held_out].sum() / max(sizes.sum(), 1))
    split = np.full(len(sizes), TEST, np.int8)
    split[order] = np.searchsorted(np.cumsum(left)[:2] * sizes.sum(), middle, side="right")
    return split


def ratios_left(ratios, held_out: float) -> np.ndarray:
    """The shares of all images that each split still gets if test has this share, which is held out. If that is
    more than its ratio, train and val divide the rest by theirs."""
    left = np.array(ratios, np.float64)
    left[TEST] -= held_out
    if left[TEST] < 0:
        left[:TEST] *= (1 - held_out) / left[:TEST].sum()
        left[TEST] = 0
    return left


def in_buffer(
    lat: np.ndarray, lon: np.ndarray, split: np.ndarray, cells: np.ndarray, split_of_cell: np.ndarray, data: Data
) -> np.ndarray:
    """(M,) bool: train buildings within the buffer around a val or test cell, and val buildings within that around
    a test cell. `split`: of each building; `cells`: those that have a split, ascending."""
    near = np.zeros((len(lat), len(SPLITS)), bool)
    known = np.flatnonzero(geo.is_known(lat, lon))
    for candidate in geo.cells_near(lat[known], lon[known], data.split_cell_m, data.split_buffer_m):
        place = np.minimum(np.searchsorted(cells, candidate), max(len(cells) - 1, 0))
        hit = np.flatnonzero(cells[place] == candidate) if len(cells) else place[:0]
        near[known[hit], split_of_cell[place[hit]]] = True
    return ((split == TRAIN) & (near[:, VAL] | near[:, TEST])) | ((split == VAL) & near[:, TEST])


def shared_with_later_split(split: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """(N,) bool: train rows whose keys are in val or test too, and val rows whose keys are in test."""
    order, starts = duplicate_rules.sort_groups(*keys)
    last = np.maximum.reduceat(split[order], starts)  # train < val < test
    drop = np.empty(len(split), bool)
    drop[order] = split[order] < np.repeat(last, np.diff(starts, append=len(order)))
    return drop


def count_in_two_splits(split: np.ndarray, *keys: np.ndarray) -> int:
    """How many keys (buildings, panoramas, pictures) are in more than one split."""
    return int(duplicate_rules.is_mixed(split, *duplicate_rules.sort_groups(*keys)).sum())
