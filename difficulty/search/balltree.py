"""A reference implementation of the usual way: a ball tree over a PCA. It misses neighbours; `recall` says how
many.

Memory: N x (D x 8 + dim x 12) bytes. Time: a query per image, hours for a million.
"""

import logging

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import BallTree

from common.places.zones import Zones
from difficulty.search.exact_search import NO_ROW, NO_SIMILARITY, Neighbors

log = logging.getLogger("pipeline")
MOST_ROWS = 100_000


class Tree:
    """A ball tree over the `dim` principal components of the normalised embeddings (N, D)."""

    def __init__(self, embeddings: np.ndarray, dim: int):
        if len(embeddings) > MOST_ROWS:
            log.warning(
                'data.search = "balltree" on %s images: "exact" is faster and complete', f"{len(embeddings):,}"
            )
        unit = embeddings.astype(np.float32)
        self.unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        self.points = PCA(min(dim, *unit.shape), random_state=0).fit_transform(self.unit)
        self.tree = BallTree(self.points)

    def neighbors(self, zones: Zones, k: int, rows: np.ndarray) -> Neighbors:
        """The neighbours of the anchors `rows` (n,) that the tree finds, ordered by their true cosines."""
        neighbor_rows = np.full((len(rows), k), NO_ROW, np.int32)
        similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)
        for place, row in enumerate(rows):
            forbidden = zones.rows_of(np.array([row]), own=True)[1]
            enough = min(len(self.unit), k + len(forbidden))
            nearest = self.tree.query(self.points[[row]], enough, return_distance=False)[0]
            allowed = nearest[~np.isin(nearest, forbidden)][:k]
            cosines = self.unit[allowed] @ self.unit[row]
            order = np.lexsort((allowed, -cosines))
            neighbor_rows[place, : len(order)] = allowed[order]
            similarities[place, : len(order)] = cosines[order]
        return neighbor_rows, similarities


def recall(approximate: np.ndarray, exact: np.ndarray) -> float:
    """The share of the `exact` neighbours (n, k), -1 where there are fewer, that are among the `approximate` (n,
    k)."""
    valid = exact != NO_ROW
    hit = (exact[:, :, None] == approximate[:, None, :]).any(axis=2) & valid
    return float(hit.sum() / max(1, valid.sum()))
