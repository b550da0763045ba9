"""The k most similar images of each image, by cosine, outside its own building and ignore zone.

`exact_neighbors` compares everything with everything, in tiles. Forbidden pairs are set to -inf inside the tile,
before the best are taken, so that an image in a dense place gets its k all the same. The answer is exact, ties by
row number, though most of the work is done in bfloat16:

1. Products of bfloat16 vectors, on a GPU or a CPU that is fast at them. Each differs from the cosine by less than
   what `Gallery.below` says, so that nothing below an anchor's floor can be among its best k. The floor rises as
   better candidates are found, and only what lies above it is collected: no tile is sorted.
2. The candidates left (about 1.5 k of them) are compared in float32, and those that float32 cannot tell apart in
   float64.
3. Anchors with more candidates than are kept (copies, tight clusters) are searched again with float32 products,
   and where that is still too many, with all that reaches the floor compared in float64.

`balltree_neighbors` asks scikit-learn's tree on a PCA: it forgets neighbours, how many depends on the data
(`recall` says it).

Memory: N x D x 4 bytes (the embeddings, float16, and their unit vectors in bfloat16; each on the device if it
fits, else on the host), and tiles of `memory_mb`; see `tile_sizes`.
Traffic: N x D x 2 bytes for every tile of A anchors, from the host where the vectors stay there, and A x 1.5 k x D
x 2 of candidates.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common.zones import Zones
from difficulty.gallery import LOWEST, Gallery

NO_ROW, NO_SIMILARITY = -1, -1.0  # where an image has fewer than k candidates
KEPT = 4  # times k: the candidates that an anchor may have before its floor rises
_WORD = 8  # flags that are looked at together
_TILE = {"cpu": (1_024, 8_192), "cuda": (8_192, 32_768)}  # rows: larger tiles are no faster
_SETTLED_ROWS = 8_192  # rows that candidates are compared with in float32 at a time: on a GPU half a GB

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

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
    """The neighbours of the anchors `rows` (n,) among all of `embeddings` (N, D), ties by row number."""
    found_rows = np.full((len(rows), k), NO_ROW, np.int32)
    found_similarities = np.full((len(rows), k), NO_SIMILARITY, np.float32)

    def keep(places: np.ndarray, best: torch.Tensor, similarities: torch.Tensor) -> None:
        valid, width = torch.isfinite(similarities), best.shape[1]
        found_rows[places, :width] = torch.where(valid, best, NO_ROW).cpu().numpy()
        found_similarities[places, :width] = torch.where(valid, similarities, NO_SIMILARITY).cpu().numpy()

    left = np.arange(len(rows))
    for dtype in [torch.bfloat16, torch.float32] if fast_bfloat16(device) else [torch.float32]:
        gallery = Gallery(embeddings, dtype, device)
        size = tile_sizes(embeddings.shape[1], k, memory_mb, device, dtype)
        crowded = []
        for places in _cut(left, size[0]):
            anchors = np.asarray(rows[places], np.int64)
            collected = _collect(gallery, zones, anchors, k, size)
            best, similarities = _settle(gallery, anchors, collected, k, memory_mb)
            keep(places, best, similarities)
            crowded.append(places[collected.crowded.cpu().numpy()])
        left = np.concatenate(crowded) if crowded else left
        if not len(left):
            break
    for places in _cut(left, int(max(1, memory_mb * 2**20 // (64 * len(embeddings))))):
        keep(places, *_all_in_float64(embeddings, zones, np.asarray(rows[places], np.int64), k, memory_mb))
    return found_rows, found_similarities


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tile_sizes(
    dim: int, k: int, memory_mb: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """(anchors A, gallery rows G) of a tile. A quarter of the memory is for a block of the gallery in float32, G x
    D x 8 bytes; half is for the scores with their flags, A x G x (itemsize + 4), the anchors, A x D x 8, and the
    candidates, A x KEPT k x 40; the last quarter serves the comparisons in float32 and float64."""
    size, most = memory_mb * 2**20, _TILE[device.type]
    gallery = int(np.clip(size / 4 // (8 * dim), 1, most[1]))
    gallery = -(-gallery // _WORD) * _WORD
    anchors = size / 2 // ((dtype.itemsize + 4) * gallery + 8 * dim + 40 * KEPT * k)
    return int(np.clip(anchors, 1, most[0])), gallery


def similarities_of(embeddings: torch.Tensor, left: torch.Tensor, right: torch.Tensor, memory_mb: float):
    """Cosines (P,) float64 of the pairs of rows (left[i], right[i]), from products summed row by row: pairs of
    equal vectors get equal cosines, whatever else is in the list."""
    step = max(int(memory_mb * 2**20 // (160 * embeddings.shape[1])), 64)
    left, right = left.to(embeddings.device), right.to(embeddings.device)
    parts = [torch.empty(0, dtype=torch.float64, device=embeddings.device)]
    for start in range(0, len(left), step):
        x, y = (embeddings[side[start : start + step]].double() for side in (left, right))
        norms = (x * x).sum(dim=1).sqrt() * (y * y).sum(dim=1).sqrt()
        parts.append((x * y).sum(dim=1) / norms.clamp(min=1e-300))
    return torch.cat(parts)


class _Collected:
    """Candidates of A anchors, in the order of their rows: at most KEPT k each, or the anchor is `crowded`."""

    def __init__(self, anchors: int, k: int, dtype: torch.dtype, device: torch.device):
        self.k, room = k, max(KEPT * k, 32)
        self.rows = torch.zeros((anchors, room), dtype=torch.int32, device=device)
        self.scores = torch.full((anchors, room), -torch.inf, dtype=dtype, device=device)
        self.count = torch.zeros(anchors, dtype=torch.int64, device=device)
        self.crowded = torch.zeros(anchors, dtype=torch.bool, device=device)

    def add(self, anchors: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Append candidates that are sorted by anchor; there is room for them."""
        new = torch.bincount(anchors, minlength=len(self.count))
        first = new.cumsum(0) - new
        place = torch.arange(len(anchors), device=anchors.device) + (self.count - first)[anchors]
        self.rows[anchors, place] = rows.int()
        self.scores[anchors, place] = scores
        self.count += new

    def kth(self) -> torch.Tensor:
        """The k-th best score (A,) float32 so far, -inf where there are fewer."""
        return self.scores.topk(min(self.k, self.scores.shape[1]), dim=1, sorted=False).values.amin(dim=1).float()

    def drop_below(self, floor: torch.Tensor) -> None:
        anchors, places = (self.scores >= floor[:, None]).nonzero(as_tuple=True)
        rows, scores = self.rows[anchors, places], self.scores[anchors, places]
        self.scores.fill_(-torch.inf)
        self.count.zero_()
        self.add(anchors, rows, scores)


def _collect(gallery: Gallery, zones: Zones, anchors: np.ndarray, k: int, size: tuple[int, int]) -> _Collected:
    """The rows that may be among the best k of each anchor."""
    n, device, dtype = len(gallery.embeddings), gallery.device, gallery.dtype
    forbidden = _forbidden(zones, anchors, device)
    queries, error = gallery.queries(torch.from_numpy(anchors).to(device))
    collected = _Collected(len(anchors), k, dtype, device)
    floor = torch.full((len(anchors),), LOWEST, device=device)
    width = min(size[1], -(-n // _WORD) * _WORD)
    scores = torch.empty((len(anchors), width), dtype=dtype, device=device)
    flags = torch.empty((len(anchors), width), dtype=torch.bool, device=device)
    for start in range(0, n, width):
        stop = min(start + width, n)
        _products(queries, gallery.block(start, stop), scores)
        scores[:, stop - start :] = -torch.inf
        forbidden.remove(scores, start, stop)
        if start == 0:
            floor = gallery.below(_at_most_kth(scores, collected.scores, k), error)
        hits = _hits(scores, floor, flags)
        room = collected.scores.shape[1]
        if (hits.per_anchor + collected.count > room).any():
            kth = _at_most_kth(scores, collected.scores, k)
            floor = torch.maximum(floor, gallery.below(kth, error))
            collected.drop_below(floor)
            hits = _hits(scores, floor, flags)
            crowded = hits.per_anchor + collected.count > room
            floor[crowded] = torch.inf  # they are searched again, otherwise
            collected.crowded |= crowded
            hits = hits.without(crowded)
        anchor, column = hits.expand(flags)
        collected.add(anchor, column + start, scores[anchor, column])
    collected.drop_below(torch.maximum(floor, gallery.below(collected.kth(), error)))
    return collected


def _products(queries: torch.Tensor, block: torch.Tensor, scores: torch.Tensor) -> None:
    """Write the scores (A, G) of the queries (A, D) and a block (G or fewer, D) of the gallery."""
    torch.mm(queries, block.T, out=scores if len(block) == scores.shape[1] else scores[:, : len(block)])


def _at_most_kth(scores: torch.Tensor, known: torch.Tensor, k: int) -> torch.Tensor:
    """At most the k-th largest (A,) of each row's scores and of those `known` from other tiles, and near it: the
    k-th largest of the latter and of maxima over disjoint sets of about a third of k-th part of the columns. A
    tenth of the time of a true top-k."""
    depth = max(1, scores.shape[1] // (3 * k))
    sets = scores.shape[1] // depth
    maxima = scores[:, : depth * sets].unflatten(1, (depth, sets)).amax(dim=1)
    return torch.cat([known, maxima], dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1).float()


class _Hits(NamedTuple):
    """Where scores reach their floors, as the words of _WORD flags that are not all 0, in order."""

    words: torch.Tensor  # (W, 2): row, number of the word in it
    counts: torch.Tensor  # (W,): hits in it
    per_anchor: torch.Tensor  # (A,)

    def without(self, anchors: torch.Tensor) -> "_Hits":
        """Without those of some anchors (A,) bool."""
        left = ~anchors[self.words[:, 0]]
        return _Hits(self.words[left], self.counts[left], self.per_anchor.masked_fill(anchors, 0))

    def expand(self, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row, column) of each hit, in order."""
        word, bit = flags.unflatten(1, (-1, _WORD))[self.words[:, 0], self.words[:, 1]].nonzero(as_tuple=True)
        return self.words[word, 0], self.words[word, 1] * _WORD + bit


def _hits(scores: torch.Tensor, floor: torch.Tensor, flags: torch.Tensor) -> _Hits:
    torch.ge(scores, floor.to(scores.dtype)[:, None], out=flags)
    words = flags.view(torch.int64).nonzero()  # an eighth as many as flags: `nonzero` is the dearest step here
    counts = flags.unflatten(1, (-1, _WORD))[words[:, 0], words[:, 1]].sum(dim=1)
    per_anchor = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return _Hits(words, counts, per_anchor.index_add_(0, words[:, 0], counts))


class _Forbidden(NamedTuple):
    """Pairs (anchor of the tile, row) that may not be neighbours, by row."""

    anchors: torch.Tensor
    rows: torch.Tensor
    sorted_rows: np.ndarray  # the same as `rows`, on the host

    def remove(self, scores: torch.Tensor, start: int, stop: int) -> None:
        """Set the scores of the forbidden pairs to -inf; the columns are the rows start..stop."""
        first, last = np.searchsorted(self.sorted_rows, [start, stop])
        scores[self.anchors[first:last], self.rows[first:last] - start] = -torch.inf


def _forbidden(zones: Zones, rows: np.ndarray, device: torch.device) -> _Forbidden:
    indptr, indices = zones.rows_of(rows, own=True)
    order = np.argsort(indices, kind="stable")
    anchors = np.repeat(np.arange(len(rows)), np.diff(indptr))[order]
    by_row = indices[order]
    return _Forbidden(torch.from_numpy(anchors).to(device), torch.from_numpy(by_row).to(device), by_row)


def _settle(
    gallery: Gallery, anchors: np.ndarray, collected: _Collected, k: int, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k rows of the candidates with their cosines (A, k), -inf where there are fewer: by float32, and
    those that it cannot tell apart by float64; ties by row number."""
    width = max(1, int(collected.count.max()))
    rows, scores = collected.rows[:, :width].long(), collected.scores[:, :width]
    valid = torch.isfinite(scores)
    if gallery.dtype != torch.float32:
        scores = _float32_cosines(gallery, anchors, rows, valid, memory_mb).masked_fill(~valid, -torch.inf)
    ordered, order = scores.sort(dim=1, descending=True)
    close = (ordered[:, :-1] - ordered[:, 1:]) <= gallery.tolerance  # False where both are -inf: NaN
    close &= ordered[:, 1:] >= ordered[:, [min(k, width) - 1]] - gallery.tolerance  # those below stay below
    unclear = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
    unclear = torch.zeros_like(unclear).scatter_(1, order, unclear)  # back to the order by row
    which, place = unclear.nonzero(as_tuple=True)
    values = scores.double()
    left = torch.from_numpy(anchors).to(which.device)[which]
    values[which, place] = similarities_of(gallery.embeddings, left, rows[which, place], memory_mb).to(values)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order)[:, :k], values[:, :k].float()


def _float32_cosines(
    gallery: Gallery, anchors: np.ndarray, rows: torch.Tensor, valid: torch.Tensor, memory_mb: float
) -> torch.Tensor:
    """Cosines (A, W) of each anchor with the rows (A, W) that go with it, of any value where not valid."""
    (count, width), dim = rows.shape, gallery.embeddings.shape[1]
    own = torch.from_numpy(anchors).to(gallery.device)
    at_once = int(np.clip(memory_mb * 2**20 // 4 // (12 * dim), 1, _SETTLED_ROWS))
    if gallery.device.type == "cpu":
        return _sampled_products(gallery, gallery.unit(own), rows, valid, at_once)
    step = max(1, at_once // width)
    cosines = torch.empty((count, width), device=gallery.device)
    for start in range(0, count, step):
        x, some = gallery.unit(own[start : start + step]), rows[start : start + step]
        y = gallery.unit(some.reshape(-1)).view(*some.shape, dim)
        cosines[start : start + step] = torch.bmm(y, x[:, :, None]).squeeze(2)
    return cosines


def _sampled_products(
    gallery: Gallery, x: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, at_once: int
) -> torch.Tensor:
    """The same, for a CPU: a block of the gallery after the other, each row of it made float32 once for all the
    anchors that ask for it. An eighth of the time of gathering rows for each anchor."""
    products = torch.zeros(rows.shape)
    block_of = torch.where(valid, rows // at_once, -1)
    for number in range(-(-len(gallery.embeddings) // at_once)):
        anchor, place = (block_of == number).nonzero(as_tuple=True)
        if not len(anchor):
            continue
        asked, column = rows[anchor, place].unique(return_inverse=True)
        ends = torch.bincount(anchor, minlength=len(x)).cumsum(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR tensors beta
            pattern = torch.sparse_csr_tensor(
                F.pad(ends, (1, 0)), column, torch.zeros(len(column)), (len(x), len(asked)), check_invariants=False
            )
        dots = torch.sparse.sampled_addmm(pattern, x, gallery.unit(asked).T, beta=0.0)
        products[anchor, place] = dots.values()
    return products


def _all_in_float64(
    embeddings: torch.Tensor, zones: Zones, anchors: np.ndarray, k: int, memory_mb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of all rows for each anchor with their cosines (A, k), -inf where there are fewer."""
    n, near = len(embeddings), []
    for anchor in anchors:
        values = similarities_of(embeddings, torch.full((n,), int(anchor)), torch.arange(n), memory_mb)
        near.append(values)
    values = torch.stack(near)
    _forbidden(zones, anchors, values.device).remove(values, 0, n)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return order[:, :k], values[:, :k].float()


def _cut(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]
