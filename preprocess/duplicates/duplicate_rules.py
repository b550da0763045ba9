"""Duplicate images, within a building and across buildings. Found by grouping, never by comparing all pairs.

Rows are sorted by building and, within one, by patch; of several duplicates the first is kept.
"""

import numpy as np
from scipy.spatial import cKDTree

from common.places.zones import number_buildings

_CHUNK_CELLS = 2**21  # hashes compared at a time


def sort_groups(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows by their keys: (order (N,), starts (G,) of the groups with equal keys), stable within a group."""
    order = np.lexsort(keys[::-1])
    return order, np.flatnonzero(np.diff(number_buildings(*(key[order] for key in keys)), prepend=-1))


def is_mixed(values: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(G,) bool: the groups of `sort_groups` whose rows have more than one of `values` (N,)."""
    ordered = values[order]
    return np.minimum.reduceat(ordered, starts) < np.maximum.reduceat(ordered, starts)


def within_buildings(building: np.ndarray, phash: np.ndarray, dhash: np.ndarray, max_hamming: int) -> np.ndarray:
    """(N,) int32: for a duplicate the first row of its building that is kept and differs in at most `max_hamming`
    bits of each hash; -1 for a row that is kept. `building`: (N,) ascending.

    Equal hashes are grouped first, so that n copies of an image cost nothing; the n distinct images of a building
    take n^2 / 2 comparisons, made for all buildings of one size at once.
    """
    order, starts = sort_groups(building, phash, dhash)
    equal_to = np.empty(len(order), np.int32)  # the first row with the same hashes; often the row itself
    equal_to[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    is_first = equal_to == np.arange(len(order))
    rows = np.flatnonzero(is_first)
    like = np.full(len(order), -1, np.int32)
    starts = np.flatnonzero(np.diff(building[rows], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    for size in np.unique(sizes[sizes > 1]):
        firsts = starts[sizes == size]
        for block in np.array_split(firsts, len(firsts) * int(size) // _CHUNK_CELLS + 1):
            group = rows[block[:, None] + np.arange(size)]  # (B, size)
            place = _first_near(phash[group], dhash[group], max_hamming)
            like[group] = np.where(place < 0, -1, np.take_along_axis(group, place, axis=1))
    # what is near a row is near its copies, whether or not that row is kept
    copies = np.flatnonzero(~is_first)
    like[copies] = np.where(like[equal_to[copies]] < 0, equal_to[copies], like[equal_to[copies]])
    return like


def _first_near(phash: np.ndarray, dhash: np.ndarray, max_hamming: int) -> np.ndarray:
    """(B, n) int64 for B buildings of n images: the first earlier image that is kept and near in both hashes; -1
    for an image that is kept itself."""
    first = np.full(phash.shape, -1, np.int64)
    for i in range(1, phash.shape[1]):
        near = first[:, :i] < 0
        for hashes in (phash, dhash):
            near &= np.bitwise_count(hashes[:, :i] ^ hashes[:, i : i + 1]) <= max_hamming
        first[:, i] = np.where(near.any(axis=1), near.argmax(axis=1), -1)
    return first


def across_buildings(
    building: np.ndarray, content_hash: np.ndarray, building_xyz: np.ndarray, radius_m: float
) -> np.ndarray:
    """(N,) bool: rows whose JPEG, byte for byte, belongs to two buildings more than `radius_m` apart, or to two of
    which one has no position.

    `building`: (N,) ascending, numbers of rows of `building_xyz` (M, 3), in metres, NaN where it is not known.
    """
    order, starts = sort_groups(content_hash)
    shared = is_mixed(building, order, starts)
    ends = np.append(starts[1:], len(order))
    drop = np.zeros(len(building), bool)
    for start, end in zip(starts[shared], ends[shared], strict=True):
        rows = order[start:end]
        places = building_xyz[building[rows]]
        if np.isnan(places).any():
            drop[rows] = True
            continue
        tree = cKDTree(places)  # 100,000 rows, at one place or at many, cost little
        drop[rows] = tree.count_neighbors(tree, radius_m) < len(rows) ** 2
    return drop


def count_lookalikes(building: np.ndarray, content_hash: np.ndarray, phash: np.ndarray, dhash: np.ndarray) -> int:
    """Images that share both hashes, but not the bytes, with an image of another building: row houses, say."""
    order, starts = sort_groups(phash, dhash)
    differ = is_mixed(building, order, starts) & is_mixed(content_hash, order, starts)
    return int(np.diff(starts, append=len(order))[differ].sum())
