"""The k most similar images of each image, by cosine, outside its own building and ignore zone.

`exact_neighbors` compares everything with everything, in tiles. Forbidden pairs are set to -inf inside the tile,
before the best are taken, so that an image in a dense place gets its k all the same. `balltree_neighbors` asks
scikit-learn's tree on a PCA: it forgets neighbours, how many depends on the data (`recall` says it).

Memory: the embeddings (N x D x 2 bytes, on the device if they fit, else on the host); tiles of `memory_mb`.
Traffic, where they stay on the host: N x D x 2 bytes for every tile of anchors.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.neighbors import BallTree
from torch.nn import functional as F

from common.zones import Zones
from train import whitening

MARGIN = 32  # candidates kept besides the best k: their order is settled in float64
NO_ROW, NO_SIMILARITY = -1, -1.0  # where an image has fewer than k candidates
_MAX_ANCHORS, _MAX_GALLERY = 4_096, 16_384  # rows of a tile: larger ones are no faster
_TREE_QUERIES = 1_024  # anchors asked of the tree at a time

Neighbors = tuple[np.ndarray, np.ndarray]  # (rows (n, k) int32, similarities (n, k) float32), most similar first


def exact_neighbors(
    embeddings: torch.Tensor,
    zones: Zones,
    *,
    k: int,
    rows: np.ndarray,
    memory_mb: float,
    device: torch.device,
) -> Neighbors:
    """The neighbours of the anchors `rows` (n,) among all of `embeddings` (N, D), ties by row number.

    Float32 products find k + MARGIN candidates. Those that float32 cannot tell apart are compared in float64, and
    where so many are equal that the cut goes through them, the anchor is searched again for all of them.
    """
    n, dim = embeddings.shape
    keep = min(k + MARGIN, n)
    anchors_per_tile, gallery_per_tile = tile_sizes(dim, keep, memory_mb)
    found_rows = np.full((len(rows), k), NO_ROW, np.int32)
    found_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)
    for start in range(0, len(rows), anchors_per_tile):
        tile = slice(start, start + anchors_per_tile)
        anchors = torch.from_numpy(np.asarray(rows[tile], np.int64))
        forbidden = _forbidden(zones, rows[tile], device)
        candidates, scores = _candidates(embeddings, anchors, forbidden, keep, gallery_per_tile, device)
        best, similarities, undecided = _settle(embeddings, anchors, candidates, scores, k, memory_mb)
        if len(undecided):
            floor = scores.sort(dim=1, descending=True).values[undecided, k - 1] - tolerance(dim)
            again = _all_above(
                embeddings, zones, anchors[undecided.cpu()], floor, k, gallery_per_tile, memory_mb, device
            )
            best[undecided], similarities[undecided] = again
        width = best.shape[1]
        valid = torch.isfinite(similarities)
        found_rows[tile, :width] = torch.where(valid, best, NO_ROW).cpu().numpy()
        found_similarities[tile, :width] = torch.where(valid, similarities, NO_SIMILARITY).cpu().numpy()
    return found_rows, found_similarities


def tolerance(dim: int) -> float:
    """Similarities nearer to each other than this may stand in the wrong order in float32."""
    return 4 * float(np.finfo(np.float32).eps) * dim**0.5


def tile_sizes(dim: int, keep: int, memory_mb: float) -> tuple[int, int]:
    """(anchors, gallery rows) of a tile. A quarter of the memory is for a block of the gallery, twice in float32;
    half is for the scores, the anchors, and the candidates with what merging them takes."""
    size = memory_mb * 2**20
    gallery = int(np.clip(size / 4 // (8 * dim), 1, _MAX_GALLERY))
    anchors = int(np.clip(size / 2 // (4 * gallery + 8 * dim + 48 * keep), 1, _MAX_ANCHORS))
    return anchors, gallery


def similarities_of(embeddings: torch.Tensor, left: torch.Tensor, right: torch.Tensor, memory_mb: float):
    """Cosines (P,) float64 of the pairs of rows (left[i], right[i]), from products summed row by row: pairs of
    equal vectors get equal cosines, whatever else is in the list."""
    step = int(max(1, memory_mb * 2**20 // (40 * embeddings.shape[1])))
    left, right = left.to(embeddings.device), right.to(embeddings.device)
    parts = [torch.empty(0, dtype=torch.float64, device=embeddings.device)]
    for start in range(0, len(left), step):
        x, y = (embeddings[side[start : start + step]].double() for side in (left, right))
        norms = (x * x).sum(dim=1).sqrt() * (y * y).sum(dim=1).sqrt()
        parts.append((x * y).sum(dim=1) / norms.clamp(min=1e-300))
    return torch.cat(parts)


class _Forbidden(NamedTuple):
    """Pairs (anchor of the tile, row) that may not be neighbours, by row."""

    anchors: torch.Tensor
    rows: torch.Tensor
    sorted_rows: np.ndarray  # the same as `rows`, on the host

    def remove(self, scores: torch.Tensor, start: int) -> None:
        """Set the scores (A, G) of the forbidden pairs to -inf; the columns are the rows from `start` on."""
        first, last = np.searchsorted(self.sorted_rows, [start, start + scores.shape[1]])
        scores[self.anchors[first:last], self.rows[first:last] - start] = -torch.inf


def _forbidden(zones: Zones, rows: np.ndarray, device: torch.device) -> _Forbidden:
    indptr, indices = zones.rows_of(rows, own=True)
    order = np.argsort(indices, kind="stable")
    anchors = np.repeat(np.arange(len(rows)), np.diff(indptr))[order]
    by_row = indices[order]
    return _Forbidden(torch.from_numpy(anchors).to(device), torch.from_numpy(by_row).to(device), by_row)


def _unit(embeddings: torch.Tensor, which, device: torch.device) -> torch.Tensor:
    return F.normalize(embeddings[which].to(device).float(), dim=1)


def _candidates(
    embeddings: torch.Tensor,
    anchors: torch.Tensor,
    forbidden: _Forbidden,
    keep: int,
    gallery_per_tile: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` rows of highest float32 score for each anchor, (A, keep), by row, and their scores."""
    queries = _unit(embeddings, anchors.to(embeddings.device), device)
    best = torch.empty((len(anchors), 0), device=device)
    best_rows = torch.empty((len(anchors), 0), dtype=torch.int64, device=device)
    for start in range(0, len(embeddings), gallery_per_tile):
        scores = queries @ _unit(embeddings, slice(start, start + gallery_per_tile), device).T  # (A, G), cosine
        forbidden.remove(scores, start)
        top, columns = scores.topk(min(keep, scores.shape[1]), dim=1, sorted=False)
        best = torch.cat([best, top], dim=1)
        best_rows = torch.cat([best_rows, columns + start], dim=1)
        if best.shape[1] > keep:
            best, places = best.topk(keep, dim=1, sorted=False)
            best_rows = best_rows.gather(1, places)
    best_rows, places = best_rows.sort(dim=1)
    return best_rows, best.gather(1, places)


def _settle(
    embeddings: torch.Tensor,
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    scores: torch.Tensor,
    k: int,
    memory_mb: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best k of the candidates (given by row) with their similarities, and the anchors that stay undecided:
    those where what lies beyond the candidates may be as good as the k-th."""
    near = tolerance(embeddings.shape[1])
    ordered, order = scores.sort(dim=1, descending=True)
    close = (ordered[:, :-1] - ordered[:, 1:]) <= near  # False where both are -inf: the difference is NaN
    unclear = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
    unclear = torch.zeros_like(unclear).scatter_(1, order, unclear)  # back to the order by row
    which, place = torch.nonzero(unclear, as_tuple=True)
    values = scores.double()
    if len(which):
        exact = similarities_of(embeddings, anchors.to(which.device)[which], candidates[which, place], memory_mb)
        values[which, place] = exact.to(values.device)
    values, order = values.sort(dim=1, descending=True, stable=True)
    best, similarities = candidates.gather(1, order)[:, :k], values[:, :k].float()
    if scores.shape[1] <= k or scores.shape[1] == len(embeddings):
        return best, similarities, torch.empty(0, dtype=torch.int64, device=scores.device)
    cut = (ordered[:, k - 1] - ordered[:, -1] <= near) & torch.isfinite(ordered[:, -1])
    return best, similarities, torch.nonzero(cut).squeeze(1)


def _all_above(
    embeddings: torch.Tensor,
    zones: Zones,
    anchors: torch.Tensor,
    floor: torch.Tensor,
    k: int,
    gallery_per_tile: int,
    memory_mb: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of all rows whose score reaches the anchor's floor, by float64 similarity, ties by row."""
    n = len(embeddings)
    anchors_per_tile = int(max(1, memory_mb * 2**20 // (64 * n)))  # all of the gallery may reach the floor
    best, similarities = [], []
    for start in range(0, len(anchors), anchors_per_tile):
        some = anchors[start : start + anchors_per_tile]
        forbidden = _forbidden(zones, some.numpy(), device)
        queries = _unit(embeddings, some.to(embeddings.device), device)
        values = torch.full((len(some), n), -torch.inf, dtype=torch.float64, device=device)
        for first in range(0, n, gallery_per_tile):
            scores = queries @ _unit(embeddings, slice(first, first + gallery_per_tile), device).T
            forbidden.remove(scores, first)
            which, column = torch.nonzero(scores >= floor[start : start + len(some), None], as_tuple=True)
            exact = similarities_of(embeddings, some.to(device)[which], column + first, memory_mb)
            values[which, column + first] = exact.to(device)
        values, order = values.sort(dim=1, descending=True, stable=True)
        best.append(order[:, :k])
        similarities.append(values[:, :k].float())
    return torch.cat(best), torch.cat(similarities)


class Tree(NamedTuple):
    tree: BallTree
    points: np.ndarray  # (N, dim) float32


def build_tree(embeddings: torch.Tensor, dim: int) -> Tree:
    """A ball tree over the `dim` principal components of the normalised embeddings; N x dim x 12 bytes."""
    mean, projection = whitening.pca(embeddings.cpu().numpy(), min(dim, embeddings.shape[1]))
    points = np.empty((len(embeddings), len(projection)), np.float32)
    for start in range(0, len(points), _MAX_GALLERY):
        block = slice(start, start + _MAX_GALLERY)
        points[block] = (_unit(embeddings, block, torch.device("cpu")).numpy() - mean) @ projection.T
    return Tree(BallTree(points), points)


def balltree_neighbors(
    tree: Tree, embeddings: torch.Tensor, zones: Zones, *, k: int, rows: np.ndarray, memory_mb: float
) -> Neighbors:
    """The neighbours of the anchors `rows` that the tree finds, in the order of their true similarities."""
    n = len(embeddings)
    found_rows = np.full((len(rows), k), NO_ROW, np.int32)
    found_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)
    for start in range(0, len(rows), _TREE_QUERIES):
        some = np.asarray(rows[start : start + _TREE_QUERIES], np.int64)
        indptr, forbidden = zones.rows_of(some, own=True)
        longest = min(n, k + int(np.diff(indptr).max()))  # so that k are left when the forbidden have gone
        asked = tree.tree.query(tree.points[some], longest, return_distance=False)
        of_anchor = np.repeat(np.arange(len(some)), np.diff(indptr))
        allowed = ~np.isin(np.arange(len(some))[:, None] * n + asked, of_anchor * n + forbidden)
        order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
        chosen, valid = np.take_along_axis(asked, order, 1), np.take_along_axis(allowed, order, 1)
        left, right = (torch.from_numpy(side.ravel()) for side in (np.repeat(some, chosen.shape[1]), chosen))
        values = similarities_of(embeddings, left, right, memory_mb).cpu().numpy().reshape(chosen.shape)
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
