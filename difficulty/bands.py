"""Bands of difficulty: how near a neighbour is, relative to its anchor's own k0-th neighbour.

The ratio of a neighbour of similarity s is (1 - s) / max(1 - s_k0, 1e-4). Band b holds the neighbours with
edges[b - 1] <= ratio < edges[b]; band 0 is the hardest. A band may be empty for an anchor.
"""

import numpy as np

SMALLEST_SCALE = 1e-4  # of 1 - s_k0: k0 neighbours that are copies of the anchor say nothing about its scale
_SHIFT = 12  # low bits of a float32 ratio that its histogram ignores: 11 of the 23 of its fraction are kept


def ratios(similarities: np.ndarray, rows: np.ndarray, reference_rank: int) -> np.ndarray:
    """(n, k) float32 distance ratios of neighbours sorted by similarity, inf where rows are -1. `reference_rank`
    is k0; for an anchor with fewer neighbours, its last."""
    last = np.clip(np.minimum((rows >= 0).sum(axis=1), reference_rank) - 1, 0, None)
    distances = np.maximum(1 - similarities.astype(np.float32), 0)
    scale = np.maximum(np.take_along_axis(distances, last[:, None], axis=1), SMALLEST_SCALE)
    return np.where(rows >= 0, distances / scale, np.float32(np.inf))


def histogram(ratio: np.ndarray) -> np.ndarray:
    """Counts of the finite ratios by their leading bits, which grow with the number. Histograms of parts add
    up."""
    bits = np.ascontiguousarray(ratio[np.isfinite(ratio)], np.float32).view(np.uint32) >> _SHIFT
    return np.bincount(bits, minlength=1 << (32 - _SHIFT))


def values_of(bins: np.ndarray) -> np.ndarray:
    """The ratios at the lower ends of some bins of a histogram."""
    return (bins.astype(np.uint32) << _SHIFT).view(np.float32)


def edges_of(counts: np.ndarray, percentiles: list[float]) -> np.ndarray:
    """The edges (B - 1,) float32 at these percentiles of a histogram, at most one part in 2048 too high."""
    reached = np.cumsum(counts)
    ranks = np.asarray(percentiles) / 100 * reached[-1]
    bins = np.searchsorted(reached, np.maximum(ranks, 1)) + 1  # + 1: a bin's upper end
    return values_of(np.minimum(bins, len(counts) - 1))


def offsets(ratio: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n, B + 1) uint8: the neighbours of an anchor in band b are offsets[b]:offsets[b + 1]."""
    columns = [(ratio < edge).sum(axis=1) for edge in (-np.inf, *edges, np.inf)]
    return np.stack(columns, axis=1).astype(np.uint8)
