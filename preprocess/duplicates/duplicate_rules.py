"""Pictures that are in the data twice: within a building, and across buildings. Group-by, never all pairs.

Rows are sorted by building and, within one, by patch; the first of several alike is the one to keep.
"""

import numpy as np

from common.places.zones import ranges

_CHUNK_CELLS = 2**21  # hashes looked at together
_PAIRS_AT_ONCE = 2**20  # of positions whose distances are formed together: 24 bytes each


def sort_groups(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal keys brought together: (order (N,), starts (G,)); a group is in its rows' own order."""
    order = np.lexsort(keys[::-1]) if len(keys) > 1 else np.argsort(keys[0], kind="stable")
    new = np.zeros(len(order), bool)
    new[:1] = True
    for key in keys:
        ordered = key[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    return order, np.flatnonzero(new)


def within_buildings(building: np.ndarray, phash: np.ndarray, dhash: np.ndarray, max_hamming: int) -> np.ndarray:
    """(N,) int32: the first row of the same building that is kept and differs in at most `max_hamming` bits of
    either hash, for a row to be dropped; -1 for one that is kept. `building`: (N,) ascending.

    Equal hashes are grouped first, so n times the same picture costs nothing; of the others each building of n
    images takes n^2 / 2 comparisons, done for all buildings of one size at once.
    """
    order, starts = sort_groups(building, phash, dhash)
    equal_to = np.empty(len(order), np.int32)  # the first row with the same hashes; often the row itself
    equal_to[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    rows = np.flatnonzero(equal_to == np.arange(len(order)))
    like = np.full(len(order), -1, np.int32)
    starts = np.flatnonzero(np.diff(building[rows], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    for size in np.unique(sizes[sizes > 1]):
        firsts = starts[sizes == size]
        step = max(1, _CHUNK_CELLS // int(size))
        for at in range(0, len(firsts), step):
            group = rows[firsts[at : at + step, None] + np.arange(size)]  # (B, size)
            place = _first_near(phash[group], dhash[group], max_hamming)
            like[group] = np.where(place < 0, -1, np.take_along_axis(group, place, axis=1))
    # what is near to a row is near to its equals, whether or not that row is kept
    others = np.flatnonzero(equal_to != np.arange(len(order)))
    like[others] = np.where(like[equal_to[others]] < 0, equal_to[others], like[equal_to[others]])
    return like


def across_buildings(
    building: np.ndarray, content_hash: np.ndarray, building_xyz: np.ndarray, radius_m: float
) -> np.ndarray:
    """(N,) bool: rows whose JPEG stands, byte for byte, at two buildings more than `radius_m` apart.

    `building`: (N,) ascending, numbers of rows of `building_xyz` (M, 3), in metres.
    """
    order, starts = sort_groups(content_hash)
    found = building[order]
    shared = np.minimum.reduceat(found, starts) < np.maximum.reduceat(found, starts) if len(starts) else starts
    sizes = np.diff(starts, append=len(order))[shared]
    rows = order[ranges(starts[shared], starts[shared] + sizes)]
    group = np.repeat(np.arange(len(sizes)), sizes)

    once = np.ones(len(rows), bool)  # a building counts once in a group; its rows are together there
    once[1:] = (group[1:] != group[:-1]) | (building[rows][1:] != building[rows][:-1])
    xyz, group_of = building_xyz[building[rows[once]]], group[once]
    is_far = _any_far_apart(xyz, group_of, len(sizes), radius_m)
    drop = np.zeros(len(building), bool)
    drop[rows[is_far[group]]] = True
    return drop


def count_lookalikes(building: np.ndarray, content_hash: np.ndarray, phash: np.ndarray, dhash: np.ndarray) -> int:
    """Images that share both hashes, but not the bytes, with an image of another building: row houses, say."""
    order, starts = sort_groups(phash, dhash)
    if not len(starts):
        return 0
    differ = np.ones(len(starts), bool)
    for key in (building, content_hash):
        differ &= np.minimum.reduceat(key[order], starts) < np.maximum.reduceat(key[order], starts)
    return int(np.diff(starts, append=len(order))[differ].sum())


def _first_near(phash: np.ndarray, dhash: np.ndarray, max_hamming: int) -> np.ndarray:
    """(B, n) int64 for B buildings of n images: the first earlier image that is kept and as near in both hashes;
    -1 where there is none, for those that are kept.
    """
    first = np.full(phash.shape, -1, np.int64)
    for i in range(1, phash.shape[1]):
        near = np.bitwise_count(phash[:, :i] ^ phash[:, i : i + 1]) <= max_hamming
        near &= np.bitwise_count(dhash[:, :i] ^ dhash[:, i : i + 1]) <= max_hamming
        near &= first[:, :i] < 0
        first[:, i] = np.where(near.any(axis=1), near.argmax(axis=1), -1)
    return first


def _any_far_apart(xyz: np.ndarray, group: np.ndarray, num_groups: int, radius_m: float) -> np.ndarray:
    """(G,) bool: groups of positions of which two are more than `radius_m` apart. `group`: ascending, 0..G-1."""
    distinct = np.unique(np.column_stack([group, xyz]), axis=0)  # a bad label's 0/0 may stand there 100,000 times
    group, xyz = distinct[:, 0].astype(np.int64), distinct[:, 1:]
    starts = np.searchsorted(group, np.arange(num_groups + 1))
    to_first = np.linalg.norm(xyz - xyz[starts[group]], axis=1)
    is_far = np.bincount(group, to_first > radius_m, num_groups) > 0
    # the others lie within the radius of their first; of two that are further apart, one is half of it from there
    rest = np.flatnonzero(~is_far[group] & (to_first > radius_m / 2))
    first, last = starts[group[rest]], starts[group[rest] + 1]
    for block in np.array_split(np.arange(len(rest)), np.sum(last - first) // _PAIRS_AT_ONCE + 1):
        left = np.repeat(rest[block], (last - first)[block])
        apart = np.linalg.norm(xyz[left] - xyz[ranges(first[block], last[block])], axis=1) > radius_m
        is_far[group[left[apart]]] = True
    return is_far
