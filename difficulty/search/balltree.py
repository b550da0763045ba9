"""The neighbours that a ball tree on a PCA finds: how many it forgets depends on the data.

Memory: N x dim x 12 bytes for the tree.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.neighbors import BallTree
from torch.nn import functional as F

from common.places.zones import Zones
from difficulty.search import cosines
from difficulty.search.exact_search import NO_ROW, NO_SIMILARITY, Neighbors
from train import whitening

_BLOCK_ROWS = 8_192  # converted at a time
_QUERIES = 1_024  # anchors asked of the tree at a time


class Tree(NamedTuple):
    tree: BallTree
    points: np.ndarray  # (N, dim) float32


def build(embeddings: torch.Tensor, dim: int) -> Tree:
    """A ball tree over the `dim` principal components of the normalised embeddings; N x dim x 12 bytes."""
    mean, projection = whitening.pca(embeddings.cpu().numpy(), min(dim, embeddings.shape[1]))
    points = np.empty((len(embeddings), len(projection)), np.float32)
    for start in range(0, len(points), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        points[block] = (F.normalize(embeddings[block].cpu().float(), dim=1).numpy() - mean) @ projection.T
    return Tree(BallTree(points), points)


def balltree_neighbors(
    tree: Tree, embeddings: torch.Tensor, zones: Zones, *, k: int, rows: np.ndarray, memory_mb: float
) -> Neighbors:
    """The neighbours of the anchors `rows` that the tree finds, in the order of their true similarities."""
    n = len(embeddings)
    found_rows = np.full((len(rows), k), NO_ROW, np.int32)
    found_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)
    for start in range(0, len(rows), _QUERIES):
        some = np.asarray(rows[start : start + _QUERIES], np.int64)
        indptr, forbidden = zones.rows_of(some, own=True)
        longest = min(n, k + int(np.diff(indptr).max()))  # so that k are left when the forbidden have gone
        asked = tree.tree.query(tree.points[some], longest, return_distance=False)
        of_anchor = np.repeat(np.arange(len(some)), np.diff(indptr))
        allowed = ~np.isin(np.arange(len(some))[:, None] * n + asked, of_anchor * n + forbidden)
        order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
        chosen, valid = np.take_along_axis(asked, order, 1), np.take_along_axis(allowed, order, 1)
        left, right = (torch.from_numpy(side.ravel()) for side in (np.repeat(some, chosen.shape[1]), chosen))
        values = cosines.of_pairs(embeddings, left, right, memory_mb).cpu().numpy().reshape(chosen.shape)
        values = np.where(valid, values, -np.inf)
        order = np.lexsort((chosen, -values), axis=1)
        chosen, values = np.take_along_axis(chosen, order, 1), np.take_along_axis(values, order, 1)
        valid = np.isfinite(values)
        found_rows[start : start + len(some), : chosen.shape[1]] = np.where(valid, chosen, NO_ROW)
        found_similarities[start : start + len(some), : chosen.shape[1]] = np.where(valid, values, NO_SIMILARITY)
    return found_rows, found_similarities


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the `exact` neighbours (n, k), -1 where there are fewer, that are among the `found` (n, k)."""
    valid = exact != NO_ROW
    hit = (exact[:, :, None] == found[:, None, :]).any(axis=2) & valid
    return float(hit.sum() / max(1, valid.sum()))
