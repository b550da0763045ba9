"""The k most similar images of each image, by cosine, outside its own building and ignore zone.

`exact_neighbors` compares a tile of anchors with a tile of all rows at a time: float32 products, forbidden pairs
set to -inf, the best candidates kept. Which rows are the neighbours is exact all the same, with ties (cosines
equal to 12 decimals) by row number:

1. A few more candidates than k are kept. The error of a product is bounded (`error_of`): if the last candidate
   scores below the k-th by more than twice the bound, nothing better was lost. Float64 decides between candidates
   that are as near as that to the k-th, and orders neighbours that are so near to each other that products usually
   do not tell them apart (`near`).
2. The other anchors (of copies, say) are searched again with eight times as many candidates, until none is left.

Memory: N x D x 2 bytes on the device if they fit, else on the host, and N x 8 on the device; `memory_mb` for tiles
and candidates, see `tile_sizes`; and n x k x 8 on the host for the result.
Traffic, if the embeddings are on the host: N x D x 2 bytes for every tile of anchors, and D x 4 for each pair that
float64 decides (a few per anchor).
Raises Stopped on a signal, between two tiles.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common.places.zones import Zones
from difficulty.search.search_vectors import SearchVectors, error_of, near, products

NO_ROW, NO_SIMILARITY = -1, -1.0  # where an image has fewer than k neighbours
GROUP = 4  # scores of which only the maximum is compared at first
SPARE = 16  # candidates beyond k
# anchors, rows of the gallery; rows that travel from the host meet many anchors, so that the traffic is less
LARGEST_TILE = {"cpu": (1_024, 4_096), "cuda": (8_192, 32_768), "travelling": (32_768, 8_192)}
_MORE = 8  # times as many for anchors that need them
_LOWEST = -8.0  # below every score, above the -inf of forbidden pairs

Neighbors = tuple[np.ndarray, np.ndarray]  # (rows (n, k) int32, similarities (n, k) float32), most similar first


def exact_neighbors(
    vectors: SearchVectors,
    zones: Zones,
    *,
    k: int,
    rows: np.ndarray,
    memory_mb: float,
    on_anchors: Callable[[int], object] = lambda count: None,
) -> Neighbors:
    """The neighbours of the anchors `rows` (n,) among all vectors, ties by row number. `on_anchors` is called with
    the number of anchors that have been compared with all rows since the last call."""
    neighbor_rows = np.full((len(rows), k), NO_ROW, np.int32)
    similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)
    total, width, left = len(vectors.embeddings), k + SPARE, np.arange(len(rows))
    while len(left):
        width, uncertain = min(width, total), []
        size = tile_sizes(vectors, width, memory_mb)
        for start in range(0, len(left), size.anchors):
            places = left[start : start + size.anchors]
            anchors = np.asarray(rows[places], np.int64)
            scores, candidates = _collect(vectors, zones, anchors, width, size.gallery)
            certain, best, cosines = _settle(vectors, anchors, scores, candidates, k, memory_mb)
            done = places[certain]
            neighbor_rows[done, : best.shape[1]] = best[certain]
            similarities[done, : best.shape[1]] = cosines[certain]
            uncertain.append(places[~certain])
            on_anchors(len(places))
        left, width = np.concatenate(uncertain), _MORE * width
        on_anchors = lambda count: None  # noqa: E731 - the anchors that are left have been counted
    return neighbor_rows, similarities


class Sizes(NamedTuple):
    anchors: int  # A, of a tile
    gallery: int  # G, rows of a tile


def tile_sizes(vectors: SearchVectors, width: int, memory_mb: float) -> Sizes:
    """The largest useful tile within three quarters of the memory; the rest is for the pairs compared in float64,
    and for the forbidden pairs (16 bytes each). A row of the gallery takes D x 8 bytes; an anchor D x 8, its G
    scores (and a quarter of them, the maxima) and, for each of `width` candidates, the scores and rows of its
    group, twice, and 24 bytes more: one with millions of copies may take more than the memory."""
    dim, is_here = vectors.embeddings.shape[1], vectors.embeddings.device.type == vectors.device.type
    most = LARGEST_TILE[vectors.device.type if is_here else "travelling"]
    size = memory_mb * 2**20 * 3 / 4
    gallery = int(np.clip(size / 4 // (8 * dim), GROUP, most[1])) // GROUP * GROUP
    per_candidate = 2 * GROUP * (4 + 4) + 24
    anchors = (size - 8 * dim * gallery) // (4 * gallery * (1 + 1 / GROUP) + per_candidate * width + 8 * dim)
    return Sizes(int(np.clip(anchors, 1, most[0])), gallery)


def _collect(
    vectors: SearchVectors, zones: Zones, anchors: np.ndarray, width: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` highest scores (A, width) float32 of each anchor, descending: cosines, within `error_of`; and
    their rows, int32. -inf where there are fewer. No tile waits for another's result on the host."""
    own = torch.from_numpy(anchors).to(vectors.device)
    queries, forbidden = vectors.take(own), _forbidden(zones, anchors, vectors.device)
    scores = torch.empty((len(anchors), 0), device=vectors.device)
    rows = torch.empty((len(anchors), 0), dtype=torch.int32, device=vectors.device)
    for start, block, inverse_length in vectors.tiles(size):
        missing = -len(block) % GROUP
        tile = products(queries, F.pad(block, (0, 0, 0, missing)) if missing else block)
        tile[:, : len(block)].mul_(inverse_length)  # now cosines, but for the anchor's own length
        if missing:
            tile[:, len(block) :] = -torch.inf
        forbidden.remove(tile, start)
        found, found_rows = _best_groups(tile, start, width)
        scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, found_rows], dim=1)
        scores, place = scores.topk(min(width, scores.shape[1]), dim=1, sorted=False)
        rows = rows.gather(1, place)
        del tile, found, found_rows, block  # before the next tile needs their memory
    scores, order = scores.sort(dim=1, descending=True)
    own_inverse = vectors.inverse_length[own, None].float().clamp_(min=1e-30)  # -inf x 0 is not a number
    return scores.mul_(own_inverse), rows.gather(1, order)


def _best_groups(tile: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and rows in the `width` groups of highest maximum: the `width` highest scores are among them.
    Half of the time of a top-k over the whole tile."""
    groups = tile.unflatten(1, (GROUP, -1))  # (A, 4, G / 4): a group is a column
    number = groups.shape[2]
    chosen = groups.amax(dim=1).topk(min(width, number), dim=1, sorted=False).indices[:, None]
    firsts = torch.arange(start, start + tile.shape[1], number, dtype=torch.int32, device=tile.device)
    rows = chosen.int() + firsts[:, None]
    return groups.gather(2, chosen.expand(-1, GROUP, -1)).flatten(1), rows.flatten(1)


class _Forbidden(NamedTuple):
    """Pairs (anchor of the tile, row) that may not be neighbours, by row."""

    anchors: torch.Tensor
    rows: torch.Tensor
    sorted_rows: np.ndarray  # the same as `rows`, on the host

    def remove(self, tile: torch.Tensor, start: int) -> None:
        """Set the scores of the forbidden pairs to -inf; the columns are the rows from `start` on."""
        first, last = np.searchsorted(self.sorted_rows, [start, start + tile.shape[1]])
        tile[self.anchors[first:last], self.rows[first:last] - start] = -torch.inf


def _forbidden(zones: Zones, rows: np.ndarray, device: torch.device) -> _Forbidden:
    indptr, indices = zones.rows_of(rows, own=True)
    order = np.argsort(indices, kind="stable")
    anchors = np.repeat(np.arange(len(rows)), np.diff(indptr))[order]
    by_row = indices[order]
    return _Forbidden(torch.from_numpy(anchors).to(device), torch.from_numpy(by_row).to(device), by_row)


def _settle(
    vectors: SearchVectors,
    anchors: np.ndarray,
    scores: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    memory_mb: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A,) whether an anchor's best are certain to be among its candidates; if so, their rows and cosines (A, k),
    ties by row number. `scores`, `rows` (A, W): as `_collect` returns them. The cosines are scores (`error_of`)
    where float64 had nothing to decide."""
    width, dim = scores.shape[1], vectors.embeddings.shape[1]
    margin = 2 * error_of(dim)
    floor = scores[:, min(k, width) - 1, None].sub(margin).clamp_(min=_LOWEST)
    certain = scores[:, -1] < floor[:, 0]
    if width == len(vectors.embeddings):
        certain.fill_(True)
    reach = scores >= floor
    close = scores.diff(dim=1) >= -near(dim)  # to the next
    is_open = F.pad(close, (1, 0)) | F.pad(close, (0, 1))
    if width > k:  # where candidates beyond the k-th reach the floor, it is open which of them are the best k
        is_open |= reach[:, k, None] & ((scores - scores[:, k - 1, None]).abs() <= margin)
    anchor, place = (is_open & reach & certain[:, None]).nonzero(as_tuple=True)
    values = scores.double().masked_fill_(~reach, -torch.inf)
    own = torch.from_numpy(anchors).to(vectors.device)[anchor]
    values[anchor, place] = vectors.cosines(own, rows[anchor, place].long(), memory_mb / 8)
    rows, order = rows.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    values, rows = values[:, :k].float(), rows.gather(1, order[:, :k])
    valid = torch.isfinite(values)
    best, cosines = torch.where(valid, rows, NO_ROW), torch.where(valid, values, NO_SIMILARITY)
    return certain.cpu().numpy(), best.cpu().numpy(), cosines.cpu().numpy()
