"""The k most similar images of each image, by cosine, outside its own building and ignore zone.

`exact_neighbors` compares all images with one another, in tiles. Forbidden pairs are set to -inf inside the
tile, before the best are chosen, so that an image in a dense area still gets k neighbours. The result is exact,
with ties (cosines equal to 12 decimals) by row number, though most of the work is done in bfloat16:

1. Products of bfloat16 vectors, on a GPU or a CPU that is fast at them; one product serves both of its rows if
   both are anchors. Its error is bounded (`SearchVectors.below`), so nothing below an anchor's floor can be
   among its best k. The floor rises as better candidates are found, and only scores above it are collected: no
   tile is sorted.
2. The remaining candidates (about 1.5 k of them) are compared in float64.
3. Anchors with more candidates than are kept (copies, tight clusters), or whose first floor was guessed too high,
   are searched again with float32 products and no guess; if there are still too many, everything that reaches the
   floor is compared in float64.

Memory: N x D x 4 bytes (the embeddings in float16 and their unit vectors in bfloat16; each on the device if it
fits, else on the host), and `memory_mb` for tiles and candidates; see `tile_sizes`.
Traffic: N x D x 2 bytes for every tile of A anchors, from the host if the vectors stay there, and A x 1.5 k x D
x 2 of candidates. Raises Stopped on a signal, between two tiles of anchors.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from common import cli
from common.places.zones import Zones
from difficulty.search import cosines
from difficulty.search.search_vectors import LOWEST, SearchVectors

NO_ROW, NO_SIMILARITY = -1, -1.0  # where an image has fewer than k neighbours
KEPT = 4  # times k: the candidates that an anchor may have before its floor rises
_TILE = {"cpu": (1_024, 4_096), "cuda": (8_192, 32_768)}  # anchors, rows: on a CPU larger tiles are no faster
_GUESSED_FROM = 6  # tiles of the gallery: with fewer, guessing costs more than it saves

Neighbors = tuple[np.ndarray, np.ndarray]  # (rows (n, k) int32, similarities (n, k) float32), most similar first


def exact_neighbors(
    embeddings: torch.Tensor,
    zones: Zones,
    *,
    k: int,
    rows: np.ndarray,
    memory_mb: float,
    device: torch.device,
    on_anchors: Callable[[int], object] = lambda count: None,
) -> Neighbors:
    """The neighbours of the anchors `rows` (n,) among all of `embeddings` (N, D), ties by row number. `on_anchors`
    is called with the number of anchors that have been compared with all rows since the last call."""
    neighbor_rows = np.full((len(rows), k), NO_ROW, np.int32)
    neighbor_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)

    def keep(places: np.ndarray, best: torch.Tensor, similarities: torch.Tensor) -> None:
        valid, width = torch.isfinite(similarities), best.shape[1]
        neighbor_rows[places, :width] = torch.where(valid, best, NO_ROW).cpu().numpy()
        neighbor_similarities[places, :width] = torch.where(valid, similarities, NO_SIMILARITY).cpu().numpy()

    left = np.arange(len(rows))
    first = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    for dtype, guess in ((first, True), (torch.float32, False)):
        gallery = SearchVectors(embeddings, dtype, device)
        size = tile_sizes(embeddings.shape[1], k, memory_mb, device, dtype)
        crowded = []
        for places in _cut(left, size.together):
            anchors = np.asarray(rows[places], np.int64)
            candidates = _collect(gallery, zones, anchors, k, size, guess, on_anchors)
            for part in _cut(np.arange(len(places)), size.settled):
                keep(places[part], *_settle(candidates, anchors[part], part, memory_mb))
            crowded.append(places[candidates.crowded.cpu().numpy()])
            del candidates  # half of the memory, which the next ones need
        left = np.concatenate(crowded) if crowded else left
        if not len(left):
            break
        on_anchors = lambda count: None  # noqa: E731 - the remaining anchors have been counted
    for places in _cut(left, int(max(1, memory_mb * 2**20 // (96 * len(embeddings))))):
        keep(places, *_settle_crowded(gallery, zones, np.asarray(rows[places], np.int64), k, size, memory_mb))
    return neighbor_rows, neighbor_similarities


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products on `device` are faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Sizes(NamedTuple):
    anchors: int  # A, of a tile
    gallery: int  # G, rows of a tile
    settled: int  # anchors whose candidates are settled at a time
    together: int  # anchors whose candidates are held at a time, at least A


def tile_sizes(
    dim: int, k: int, memory_mb: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Sizes:
    """Half of the memory is for the candidates, KEPT k x 8 bytes an anchor. An eighth each is for a block of the
    gallery in float32, G x D x 8; for the scores with their flags and the anchors, A x (G x (itemsize + 4) + D x
    8); for the anchors settled, KEPT k x 40 + D x 16; and for the vectors they are compared with."""
    size, most = memory_mb * 2**20, _TILE[device.type]
    together = int(max(1, size / 2 // (8 * KEPT * k + 32)))
    gallery = int(np.clip(size / 8 // (8 * dim), 1, most[1]))
    anchors = size / 8 // ((dtype.itemsize + 4) * gallery + 8 * dim)
    settled = size / 8 // (40 * KEPT * k + 16 * dim)
    return Sizes(int(np.clip(anchors, 1, min(most[0], together))), gallery, int(max(1, settled)), together)


class _Candidates:
    """The candidates of n anchors, unordered, at most KEPT k each. Anchors that are `crowded` have more, or too
    few that reach the `guess` behind their first floor, and are searched again."""

    def __init__(self, n: int, k: int, gallery: SearchVectors):
        self.k, self.room, self.gallery = k, max(KEPT * k, 32), gallery
        self.rows = torch.zeros((n, self.room), dtype=torch.int32, device=gallery.device)
        self.scores = torch.full((n, self.room), -torch.inf, dtype=gallery.dtype, device=gallery.device)
        self.count = torch.zeros(n, dtype=torch.int64, device=gallery.device)
        self.floor = torch.full((n,), LOWEST, device=gallery.device)
        self.guess = torch.full((n,), -torch.inf, device=gallery.device)  # of the k-th best score
        self.crowded = torch.zeros(n, dtype=torch.bool, device=gallery.device)

    def take(self, mine: slice, first_row: int, scores: torch.Tensor) -> None:
        """Collect from a tile: the scores of the anchors `mine` with the rows first_row, first_row + 1, ..."""
        self._raise_floors(self.floor[mine] <= LOWEST, mine, scores)
        reach, per_anchor = self._reach(mine, scores)
        full = per_anchor + self.count[mine] > self.room
        if full.any():
            self._raise_floors(full, mine, scores)
            reach, per_anchor = self._reach(mine, scores)
            full = per_anchor + self.count[mine] > self.room
            self.crowded[mine] |= full
            self.floor[mine][full] = torch.inf
            reach[full], per_anchor[full] = False, 0
        cell = _flat_nonzero(reach)
        anchor = cell // scores.shape[1]
        column = cell - anchor * scores.shape[1]
        place = _places(anchor, per_anchor) + self.count[mine][anchor]
        self.rows[mine][anchor, place] = (column + first_row).int()
        self.scores[mine][anchor, place] = scores[anchor, column]
        self.count[mine] += per_anchor

    def _reach(self, mine: slice, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which scores reach the floors of their anchors, and how many do so for each anchor."""
        reach = (scores >= self.floor[mine, None].to(scores.dtype)).contiguous()
        # an eighth at a time, because sum() first makes each flag an int32
        return reach, torch.cat([block.sum(dim=1, dtype=torch.int32) for block in reach.chunk(8)])

    def _raise_floors(self, late: torch.Tensor, mine: slice, scores: torch.Tensor) -> None:
        """Raise the floors of the `late` among the anchors `mine` as their candidates and a tile's scores allow,
        and drop the candidates below."""
        which = late.nonzero().squeeze(1)
        if not len(which):
            return
        own, which = scores[which], which + mine.start
        kth = _at_most_kth(own, self.scores[which], self.k)
        self.floor[which] = torch.maximum(self.floor[which], self.gallery.below(kth))
        rows, scores = self.rows[which], self.scores[which]
        anchor, place = (scores >= self.floor[which, None]).nonzero(as_tuple=True)
        self.scores[which] = -torch.inf
        self.count[which] = torch.bincount(anchor, minlength=len(which))
        to, kept = (which[anchor], _places(anchor, self.count[which])), (anchor, place)
        self.rows[to], self.scores[to] = rows[kept], scores[kept]


def _collect(
    gallery: SearchVectors,
    zones: Zones,
    anchors: np.ndarray,
    k: int,
    size: Sizes,
    guess: bool,
    on_anchors: Callable[[int], object],
) -> _Candidates:
    """The rows that may be among the best k of each anchor (n,). Where the anchors are consecutive rows, a score
    of two of them serves both, which saves half of the products among them."""
    n, count = len(gallery.embeddings), len(anchors)
    run = (anchors[0], anchors[0] + count) if (np.diff(anchors) == 1).all() else (n, n)
    candidates = _Candidates(count, k, gallery)
    if guess and n >= _GUESSED_FROM * size.gallery:
        _guess_floors(candidates, zones, anchors, size)
    for first in range(0, count, size.anchors):
        cli.check_stop()
        some = anchors[first : first + size.anchors]
        forbidden = _forbidden(zones, some, gallery.device)
        queries = gallery.queries(torch.from_numpy(some).to(gallery.device))
        later = min(run[0] + first + len(some), n)
        for start, stop, across in _columns(n, run, min(run[0] + first, n), later, size.gallery):
            scores = gallery.scores(queries, start, stop)
            forbidden.remove(scores, start, stop)
            candidates.take(slice(first, first + len(some)), start, scores)
            if across:
                candidates.take(slice(start - run[0], stop - run[0]), int(some[0]), scores.T)
        on_anchors(len(some))
    return candidates


def _guess_floors(candidates: _Candidates, zones: Zones, anchors: np.ndarray, size: Sizes) -> None:
    """Set first floors from the scores with every step-th row, one tile of them: k / step +- sqrt(k / step) of
    the k best are among these. Two thirds less is collected than with floors that start at the bottom."""
    gallery, n = candidates.gallery, len(candidates.gallery.embeddings)
    step = -(-n // size.gallery)
    rank = round(candidates.k / step + 3 * (candidates.k / step) ** 0.5) + 1
    for first in range(0, len(anchors), size.anchors):
        cli.check_stop()
        some = anchors[first : first + size.anchors]
        scores = gallery.scores(gallery.queries(torch.from_numpy(some).to(gallery.device)), 0, n, step)
        _forbidden(zones, some, gallery.device).remove(scores, 0, n, step)
        mine = slice(first, first + len(some))
        candidates.guess[mine] = _at_most_kth(scores, scores[:, :0], min(rank, scores.shape[1]))
        candidates.floor[mine] = gallery.below(candidates.guess[mine])


def _columns(n: int, run: tuple[int, int], own: int, later: int, width: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, across) of the tiles of all n rows for the anchors own..later of a run. Earlier rows of the
    run are left out: they have been compared `across`, as the later rows of the run are now."""
    for first, last, across in (
        (0, run[0], False),
        (own, later, False),
        (later, run[1], True),
        (run[1], n, False),
    ):
        for start in range(first, last, width):
            yield start, min(start + width, last), across


def _at_most_kth(scores: torch.Tensor, earlier: torch.Tensor, k: int) -> torch.Tensor:
    """A close lower bound (A,) on the k-th largest of each row's scores and those of `earlier` tiles: the k-th
    largest of the latter and of the maxima over disjoint sets, about 3 k of them, of the columns. A tenth of the
    time of a true top-k."""
    depth = max(1, scores.shape[1] // (3 * k))
    sets = scores.shape[1] // depth
    maxima = scores[:, : depth * sets].unflatten(1, (depth, sets)).amax(dim=1)
    return torch.cat([earlier, maxima], dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1).float()


def _flat_nonzero(flags: torch.Tensor) -> torch.Tensor:
    """The positions of the flags that are set, counted over all rows."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))  # a quarter of the time of torch's
    return flags.view(-1).nonzero().squeeze(1)


def _places(anchors: torch.Tensor, per_anchor: torch.Tensor) -> torch.Tensor:
    """The position of each entry among those of its anchor, from 0 on; entries are sorted by anchor."""
    first = per_anchor.cumsum(0) - per_anchor
    return torch.arange(len(anchors), device=anchors.device) - first[anchors]


class _Forbidden(NamedTuple):
    """Pairs (anchor of the tile, row) that may not be neighbours, by row."""

    anchors: torch.Tensor
    rows: torch.Tensor
    sorted_rows: np.ndarray  # the same as `rows`, on the host

    def remove(self, scores: torch.Tensor, start: int, stop: int, step: int = 1) -> None:
        """Set the scores of the forbidden pairs to -inf; the columns are start..stop, or every step-th."""
        first, last = np.searchsorted(self.sorted_rows, [start, stop])
        anchors, columns = self.anchors[first:last], self.rows[first:last] - start
        if step > 1:
            sampled = columns % step == 0
            anchors, columns = anchors[sampled], columns[sampled] // step
        scores[anchors, columns] = -torch.inf


def _forbidden(zones: Zones, rows: np.ndarray, device: torch.device) -> _Forbidden:
    indptr, indices = zones.rows_of(rows, own=True)
    order = np.argsort(indices, kind="stable")
    anchors = np.repeat(np.arange(len(rows)), np.diff(indptr))[order]
    by_row = indices[order]
    return _Forbidden(torch.from_numpy(anchors).to(device), torch.from_numpy(by_row).to(device), by_row)


def _settle(
    candidates: _Candidates, anchors: np.ndarray, part: np.ndarray, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k rows of the candidates of the `anchors`, a `part` of all, with their cosines (A, k), -inf where
    there are fewer; ties by row number."""
    mine, k, gallery = slice(part[0], part[-1] + 1), candidates.k, candidates.gallery
    rows, scores = candidates.rows[mine], candidates.scores[mine]
    kth = scores.topk(min(k, candidates.room), dim=1, sorted=False).values.amin(dim=1).float()
    candidates.crowded[mine] |= kth < candidates.guess[mine]
    floor = torch.maximum(candidates.floor[mine], gallery.below(kth))[:, None]
    width = max(1, int((scores >= floor).sum(dim=1).max()))
    scores, place = scores.topk(width, dim=1, sorted=False)
    rows, order = rows.gather(1, place).long().sort(dim=1)
    return _best(gallery, anchors, rows, (scores >= floor).gather(1, order), k, memory_mb)


def _settle_crowded(
    gallery: SearchVectors, zones: Zones, anchors: np.ndarray, k: int, size: Sizes, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same among all rows, for anchors with any number of candidates; N x 96 bytes for each."""
    n = len(gallery.embeddings)
    queries = gallery.queries(torch.from_numpy(anchors).to(gallery.device))
    scores = torch.empty((len(anchors), n), device=gallery.device)
    for start in range(0, n, size.gallery):
        cli.check_stop()
        stop = min(start + size.gallery, n)
        scores[:, start:stop] = gallery.scores(queries, start, stop)
    _forbidden(zones, anchors, gallery.device).remove(scores, 0, n)
    reach = scores >= gallery.below(_at_most_kth(scores, scores[:, :0], min(k, n)))[:, None]
    every_row = torch.arange(n, device=gallery.device).expand(len(anchors), n)
    return _best(gallery, anchors, every_row, reach, k, memory_mb)


def _best(
    gallery: SearchVectors, anchors: np.ndarray, rows: torch.Tensor, valid: torch.Tensor, k: int, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of the `valid` among ascending rows (A, W), by cosines in float64; -inf where there are fewer."""
    values = cosines.in_float64(gallery, anchors, rows, valid, memory_mb).masked_fill_(~valid, -torch.inf)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order[:, :k]), values[:, :k].float()


def _cut(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]
