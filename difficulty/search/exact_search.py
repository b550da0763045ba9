"""The k most similar images of each image, by cosine, outside its own building and ignore zone.

`exact_neighbors` compares everything with everything, in tiles. Forbidden pairs are set to -inf inside the tile,
before the best are taken, so that an image in a dense place gets its k all the same. The answer is exact, ties
(cosines equal to 12 decimals) by row number, though most of the work is done in bfloat16:

1. Products of bfloat16 vectors, on a GPU or a CPU that is fast at them, once for two rows that are both asked for.
   Each differs from the cosine by less than what `SearchVectors.below` says, so that nothing below an anchor's
   floor can be among its best k. The floor rises as better candidates are found, and only what lies above it is
   collected: no tile is sorted.
2. The candidates left (about 1.5 k of them) are compared in float32, and those that float32 cannot tell apart in
   float64.
3. Anchors with more candidates than are kept (copies, tight clusters), or with a first floor that was guessed too
   high, are searched again with float32 products and no guess, and where that is still too many, with all that
   reaches the floor compared in float64.

Memory: N x D x 4 bytes (the embeddings, float16, and their unit vectors in bfloat16; each on the device if it
fits, else on the host), and `memory_mb` for tiles and candidates; see `tile_sizes`.
Traffic: N x D x 2 bytes for every tile of A anchors, from the host where the vectors stay there, and A x 1.5 k x D
x 2 of candidates. Raises Stopped on a signal, between two tiles of anchors.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common import cli
from common.places.zones import Zones
from difficulty.search import cosines
from difficulty.search.search_vectors import LOWEST, SearchVectors

NO_ROW, NO_SIMILARITY = -1, -1.0  # where an image has fewer than k candidates
KEPT = 4  # times k: the candidates that an anchor may have before its floor rises
_WORD = 8  # flags that are looked at together
_COUNTED = 128  # lines or columns of flags, at a time
# rows: on the CPU larger tiles are no faster, and the columns must not be more than 2^16
_TILE = {"cpu": (1_024, 4_096), "cuda": (8_192, 32_768)}
_GUESSED_FROM = 6  # tiles of the gallery: with fewer it costs more than it saves

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
    is told how many more anchors have met all rows."""
    found_rows = np.full((len(rows), k), NO_ROW, np.int32)
    found_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)

    def keep(places: np.ndarray, best: torch.Tensor, similarities: torch.Tensor) -> None:
        valid, width = torch.isfinite(similarities), best.shape[1]
        found_rows[places, :width] = torch.where(valid, best, NO_ROW).cpu().numpy()
        found_similarities[places, :width] = torch.where(valid, similarities, NO_SIMILARITY).cpu().numpy()

    left = np.arange(len(rows))
    first = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    for dtype, guess in ((first, True), (torch.float32, False)):
        gallery = SearchVectors(embeddings, dtype, device)
        size = tile_sizes(embeddings.shape[1], k, memory_mb, device, dtype)
        crowded = []
        for places in _cut(left, size.together):
            anchors = np.asarray(rows[places], np.int64)
            found = _collect(gallery, zones, anchors, k, size, guess, on_anchors)
            for part in _cut(np.arange(len(places)), size.settled):
                keep(places[part], *_settle(gallery, anchors[part], found, part, k, memory_mb))
            crowded.append(places[found.crowded.cpu().numpy()])
            del found  # half of the memory, which the next ones need
        left = np.concatenate(crowded) if crowded else left
        if not len(left):
            break
        on_anchors = lambda count: None  # noqa: E731 - those that are left have been told
    for places in _cut(left, int(max(1, memory_mb * 2**20 // (96 * len(embeddings))))):
        keep(places, *_settle_crowded(gallery, zones, np.asarray(rows[places], np.int64), k, size, memory_mb))
    return found_rows, found_similarities


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32."""
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
    8); for the anchors settled, KEPT k x 40 + D x 16; and for what they are compared with."""
    size, most = memory_mb * 2**20, _TILE[device.type]
    together = int(max(1, size / 2 // (8 * KEPT * k + 32)))
    gallery = int(np.clip(size / 8 // (8 * dim), 1, most[1]))
    gallery = -(-gallery // _WORD) * _WORD
    anchors = size / 8 // ((dtype.itemsize + 4) * gallery + 8 * dim)
    settled = size / 8 // (40 * KEPT * k + 16 * dim)
    return Sizes(int(np.clip(anchors, 1, min(most[0], together))), gallery, int(max(1, settled)), together)


class _Collected:
    """Candidates of n anchors, in no order: at most KEPT k each, or the anchor is `crowded`; and so it is called
    where fewer than k reach the `guess` that its first floor was made of: all are searched again."""

    def __init__(self, n: int, k: int, gallery: SearchVectors):
        self.k, self.room, self.gallery = k, max(KEPT * k, 32), gallery
        self.rows = torch.zeros((n, self.room), dtype=torch.int32, device=gallery.device)
        self.scores = torch.full((n, self.room), -torch.inf, dtype=gallery.dtype, device=gallery.device)
        self.count = torch.zeros(n, dtype=torch.int64, device=gallery.device)
        self.floor = torch.full((n,), LOWEST, device=gallery.device)
        self.guess = torch.full((n,), -torch.inf, device=gallery.device)  # of the k-th best score
        self.crowded = torch.zeros(n, dtype=torch.bool, device=gallery.device)

    def take(self, mine: slice, first_row: int, scores: torch.Tensor, across: bool) -> None:
        """Collect from a tile of the anchors `mine` with the rows first_row, first_row + 1, ...; the anchors are
        the lines of `scores`, or `across`, its columns."""
        late = self.floor[mine] <= LOWEST
        self._raise_floors(late, mine, scores, across)
        hits = self._hits(mine, scores, across)
        late = hits.per_anchor + self.count[mine] > self.room
        if late.any():
            self._raise_floors(late, mine, scores, across)
            hits = self._hits(mine, scores, across)
            crowded = hits.per_anchor + self.count[mine] > self.room
            if crowded.any():
                self.crowded[mine] |= crowded
                self.floor[mine][crowded] = torch.inf  # they are searched again, otherwise
                hits = self._hits(mine, scores, across)
        place = _places(hits.anchors, hits.per_anchor) + self.count[mine][hits.anchors]
        self.rows[mine][hits.anchors, place] = (hits.others + first_row).int()
        self.scores[mine][hits.anchors, place] = hits.scores
        self.count[mine] += hits.per_anchor

    def _hits(self, mine: slice, scores: torch.Tensor, across: bool) -> "_Hits":
        """The scores that reach their anchors' floors, listed only if there is room for so many."""
        floor, columns = self.floor[mine].to(scores.dtype), scores.shape[1]
        floor = F.pad(floor, (0, columns - len(floor)), value=torch.inf) if across else floor[:, None]
        flags = _reaching(scores, floor)
        words = flags.view(torch.int64).view(-1)
        which = words.nonzero().squeeze(1)  # an eighth as many as flags, of which few are set
        flag = words[which].view(torch.bool)
        count = mine.stop - mine.start
        if torch.count_nonzero(flag) > count * self.room:
            dim = 0 if across else 1
            parts = [part.sum(dim, dtype=torch.int32) for part in flags.split(_COUNTED, dim)]
            nothing = which[:0]
            return _Hits(nothing, nothing, scores.view(-1)[:0], torch.stack(parts).sum(0)[:count])
        bit = flag.nonzero().squeeze(1)
        cell = which[bit // _WORD] * _WORD + bit % _WORD
        line = cell // columns
        column = cell - line * columns
        if across:
            order = _stable_order(column)
            line, column, cell = line[order], column[order], cell[order]
        anchors, others = (column, line) if across else (line, column)
        return _Hits(anchors, others, scores.view(-1)[cell], torch.bincount(anchors, minlength=count))

    def _raise_floors(self, late: torch.Tensor, mine: slice, scores: torch.Tensor, across: bool) -> None:
        """Raise the floors of the `late` of the anchors `mine` to what their candidates and a tile's scores tell,
        and drop the candidates below."""
        which = late.nonzero().squeeze(1)
        if not len(which):
            return
        own = scores.T[which] if across else scores[which]
        which = which + mine.start
        kth = _at_most_kth(own, self.scores[which], self.k)
        self.floor[which] = torch.maximum(self.floor[which], self.gallery.below(kth))
        rows, scores = self.rows[which], self.scores[which]
        anchor, place = (scores >= self.floor[which, None]).nonzero(as_tuple=True)
        self.scores[which] = -torch.inf
        self.count[which] = torch.bincount(anchor, minlength=len(which))
        found, kept = (which[anchor], _places(anchor, self.count[which])), (anchor, place)
        self.rows[found], self.scores[found] = rows[kept], scores[kept]


def _collect(
    gallery: SearchVectors,
    zones: Zones,
    anchors: np.ndarray,
    k: int,
    size: Sizes,
    guess: bool,
    on_anchors: Callable[[int], object],
) -> _Collected:
    """The rows that may be among the best k of each anchor (n,). Where the anchors are a run of rows, a score of
    two of them serves both: half of the products among them are saved."""
    n, count = len(gallery.embeddings), len(anchors)
    run = (anchors[0], anchors[0] + count) if (np.diff(anchors) == 1).all() else (n, n)
    found = _Collected(count, k, gallery)
    if guess and n >= _GUESSED_FROM * size.gallery:
        _guess_floors(found, zones, anchors, size)
    for first in range(0, count, size.anchors):
        cli.check_stop()
        some = anchors[first : first + size.anchors]
        forbidden = _forbidden(zones, some, gallery.device)
        queries = gallery.queries(torch.from_numpy(some).to(gallery.device))
        later = min(run[0] + first + len(some), n)
        for start, stop, across in _columns(n, run, min(run[0] + first, n), later, size.gallery):
            scores = gallery.scores(queries, start, stop)
            forbidden.remove(scores, start, stop)
            found.take(slice(first, first + len(some)), start, scores, across=False)
            if across:
                found.take(slice(start - run[0], stop - run[0]), int(some[0]), scores, across=True)
        on_anchors(len(some))
    return found


def _guess_floors(found: _Collected, zones: Zones, anchors: np.ndarray, size: Sizes) -> None:
    """First floors from the scores with every step-th row, a tile of them: of the k best, k / step +- sqrt(k /
    step) are among these. Floors rise from there as from nowhere, but a third as much is collected on the way."""
    gallery, n = found.gallery, len(found.gallery.embeddings)
    step = -(-n // size.gallery)
    rank = round(found.k / step + 3 * (found.k / step) ** 0.5) + 1
    for first in range(0, len(anchors), size.anchors):
        cli.check_stop()
        some = anchors[first : first + size.anchors]
        scores = gallery.scores(gallery.queries(torch.from_numpy(some).to(gallery.device)), 0, n, step)
        _forbidden(zones, some, gallery.device).remove(scores, 0, n, step)
        mine = slice(first, first + len(some))
        found.guess[mine] = _at_most_kth(scores, scores[:, :0], min(rank, scores.shape[1]))
        found.floor[mine] = gallery.below(found.guess[mine])


def _columns(n: int, run: tuple[int, int], own: int, later: int, width: int) -> Iterator[tuple[int, int, bool]]:
    """The tiles start..stop of all n rows for the anchors own..later of a run: but for the rows of the run before
    them, which have met them; and whether the rows are anchors that meet them now."""
    for first, last, across in (
        (0, run[0], False),
        (own, later, False),
        (later, run[1], True),
        (run[1], n, False),
    ):
        for start in range(first, last, width):
            yield start, min(start + width, last), across


def _at_most_kth(scores: torch.Tensor, known: torch.Tensor, k: int) -> torch.Tensor:
    """At most the k-th largest (A,) of each row's scores and of those `known` from other tiles, and near it: the
    k-th largest of the latter and of maxima over disjoint sets of about a third of k-th part of the columns. A
    tenth of the time of a true top-k."""
    depth = max(1, scores.shape[1] // (3 * k))
    sets = scores.shape[1] // depth
    maxima = scores[:, : depth * sets].unflatten(1, (depth, sets)).amax(dim=1)
    return torch.cat([known, maxima], dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1).float()


class _Hits(NamedTuple):
    """Scores that reach their floors, sorted by anchor; none are listed where they are too many."""

    anchors: torch.Tensor  # of the tile
    others: torch.Tensor  # the rows of the tile
    scores: torch.Tensor
    per_anchor: torch.Tensor  # how many


def _places(anchors: torch.Tensor, per_anchor: torch.Tensor) -> torch.Tensor:
    """The how-many-th of its anchor each is, from 0 on; they are sorted by anchor."""
    first = per_anchor.cumsum(0) - per_anchor
    return torch.arange(len(anchors), device=anchors.device) - first[anchors]


def _stable_order(columns: torch.Tensor) -> torch.Tensor:
    """The order that sorts the columns of a tile, and leaves equal ones as they are."""
    if columns.device.type == "cpu":  # numpy sorts 16 bits digit by digit, in a fifth of the time: see _TILE
        return torch.from_numpy(np.argsort(columns.numpy().astype(np.uint16), kind="stable"))
    return columns.argsort(stable=True)


def _reaching(scores: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """scores >= floor. The bits of bfloat16 numbers, read as whole numbers, are in the order of those above 0, and
    less where the sign is set: compared so, they take a CPU half of the time.
    """
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and bool((floor > 0).all()):
        return scores.view(torch.int16) >= floor.view(torch.int16)
    return scores >= floor


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
            there = columns % step == 0
            anchors, columns = anchors[there], columns[there] // step
        scores[anchors, columns] = -torch.inf


def _forbidden(zones: Zones, rows: np.ndarray, device: torch.device) -> _Forbidden:
    indptr, indices = zones.rows_of(rows, own=True)
    order = np.argsort(indices, kind="stable")
    anchors = np.repeat(np.arange(len(rows)), np.diff(indptr))[order]
    by_row = indices[order]
    return _Forbidden(torch.from_numpy(anchors).to(device), torch.from_numpy(by_row).to(device), by_row)


def _settle(
    gallery: SearchVectors, anchors: np.ndarray, found: _Collected, part: np.ndarray, k: int, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k rows of the candidates of a `part` of those found, with their cosines (A, k), -inf where there
    are fewer: by float32, and those that it cannot tell apart by float64; ties by row number."""
    mine = slice(part[0], part[-1] + 1)
    rows, scores = found.rows[mine], found.scores[mine]
    kth = scores.topk(min(k, found.room), dim=1, sorted=False).values.amin(dim=1).float()
    found.crowded[mine] |= kth < found.guess[mine]
    floor = torch.maximum(found.floor[mine], gallery.below(kth))
    width = max(1, int((scores >= floor[:, None]).sum(dim=1).max()))
    scores, place = scores.topk(width, dim=1, sorted=False)
    scores, rows = scores.masked_fill(scores < floor[:, None], -torch.inf), rows.gather(1, place).long()
    order = rows.masked_fill(torch.isinf(scores), len(gallery.embeddings)).argsort(dim=1)
    rows, scores = rows.gather(1, order), scores.gather(1, order)  # by row number
    valid = torch.isfinite(scores)
    if gallery.dtype != torch.float32:
        scores = cosines.in_float32(gallery, anchors, rows, valid, memory_mb).masked_fill(~valid, -torch.inf)
    ordered, order = scores.sort(dim=1, descending=True)
    close = (ordered[:, :-1] - ordered[:, 1:]) <= gallery.tolerance  # False where both are -inf: NaN
    close &= ordered[:, 1:] >= ordered[:, [min(k, width) - 1]] - gallery.tolerance  # those below stay below
    unclear = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
    unclear = torch.zeros_like(unclear).scatter_(1, order, unclear)  # back to the order by row
    values = torch.where(unclear, cosines.in_float64(gallery, anchors, rows, unclear, memory_mb), scores.double())
    values, order = values.sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order)[:, :k], values[:, :k].float()


def _settle_crowded(
    gallery: SearchVectors, zones: Zones, anchors: np.ndarray, k: int, size: Sizes, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of all rows, for anchors with any number of candidates; N x 96 bytes for each."""
    n = len(gallery.embeddings)
    own = torch.from_numpy(anchors).to(gallery.device)
    queries = gallery.queries(own)
    scores = torch.empty((len(own), n), device=gallery.device)
    for start in range(0, n, size.gallery):
        cli.check_stop()
        stop = min(start + size.gallery, n)
        scores[:, start:stop] = gallery.scores(queries, start, stop)[:, : stop - start]
    _forbidden(zones, anchors, gallery.device).remove(scores, 0, n)
    floor = gallery.below(_at_most_kth(scores, scores[:, :0], min(k, n)))
    anchor, row = (scores >= floor[:, None]).nonzero(as_tuple=True)
    values = torch.full(scores.shape, -torch.inf, dtype=torch.float64, device=gallery.device)
    values[anchor, row] = cosines.of_pairs(gallery.embeddings, own[anchor], row, memory_mb).to(gallery.device)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return order[:, :k], values[:, :k].float()


def _cut(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]
