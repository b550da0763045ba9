"""Clusters of buildings that look alike: k-means on their vectors, and how much depends on its random start.

HDBSCAN was tried on the demo's 1,009 buildings and left out (docs/buildings.md).
"""

import logging
from itertools import combinations
from typing import NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

log = logging.getLogger("pipeline")
SEEDS = 5
MAX_FITTED = 100_000  # buildings that the centres are fitted to: a sample of more
_BLOCK = 65_536  # buildings assigned at a time


class Clusters(NamedTuple):
    """A partition of B buildings into `number` clusters, the largest first."""

    number: int
    label: np.ndarray  # (B,) int32; -1 = none
    similarity: np.ndarray  # (B,) float32, cosine to the centre of the cluster; NaN without one
    stability: float | None  # mean adjusted Rand index between pairs of SEEDS starts: 1 = the same, 0 = chance


def fit(vectors: np.ndarray, count: int, seed: int) -> Clusters:
    """`count` clusters of unit vectors (B, D), and a warning if it is fewer: at most B / 2, and none is empty."""
    buildings, asked = len(vectors), count
    count = min(count, buildings // 2)
    if not count or count < 2 <= asked:
        if asked:
            log.warning("no clusters: there are too few buildings (%d)", buildings)
        return Clusters(0, np.full(buildings, -1, np.int32), np.full(buildings, np.nan, np.float32), None)
    rng = np.random.default_rng(seed)
    fitted = vectors
    if buildings > MAX_FITTED:
        fitted = vectors[np.sort(rng.choice(buildings, MAX_FITTED, replace=False))]
    with threadpool_limits(1):  # threads add up in any order: rounding could move a building to another cluster
        fits = [KMeans(count, n_init=1, random_state=seed + start).fit(fitted) for start in range(SEEDS)]
        best = min(fits, key=lambda found: found.inertia_)
        label, similarity = assign(vectors, best.cluster_centers_)
    stability = np.mean([adjusted_rand_score(one.labels_, other.labels_) for one, other in combinations(fits, 2)])
    sizes = np.bincount(label, minlength=count)
    by_size = np.argsort(-sizes, kind="stable")
    rank = np.empty(count, np.int32)
    rank[by_size] = np.arange(count)
    number = int(np.count_nonzero(sizes))
    if number < asked:
        why = "buildings are few" if number == count else "many vectors are equal"
        log.warning("%d clusters, not %d: %s", number, asked, why)
    return Clusters(number, rank[label], similarity, float(stability))


def assign(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the nearest of K centres, (B,); the cosine to it, (B,) float32) of unit vectors (B, D)."""
    lengths = np.maximum(np.linalg.norm(centres, axis=1), np.finfo(np.float32).tiny)
    labels, similarities = [], []
    for start in range(0, len(vectors), _BLOCK):
        products = vectors[start : start + _BLOCK] @ centres.T  # (b, K)
        label = (products - lengths**2 / 2).argmax(axis=1)  # the least distance, of vectors of one length
        labels.append(label)
        similarities.append(products[np.arange(len(label)), label] / lengths[label])
    return np.concatenate(labels), np.concatenate(similarities).astype(np.float32)
