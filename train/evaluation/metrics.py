"""Retrieval metrics by counting: for each match of a query, how many wrong rows of the gallery outrank it.

Everything else follows from these counts: the rank of the best match, the average precision, and the same for any
part of the matches (`per_query` of `Matches.select`), so one pass over the scores serves all figures.

Memory: the gallery as float32, G x D x 4 bytes, on the device or on the host; on the device tiles of scores within
`memory_mb`; 32 bytes for each match and 12 for each query. A gallery on the host crosses the bus once for each
tile of at most 16,384 queries, and its tiles that hold matches twice: Q / 16,384 x G x D x 4 bytes.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from common import devices
from common.places.zones import Csr, ranges
from train.evaluation.metric_names import METRICS, RECALL_AT

_TILE_BYTES = 6  # per score: itself (4), a comparison (1), and sums of those
# (queries, gallery) of a tile. On the CPU it fits its cache; "streamed": the gallery comes from the host each time
_LARGEST_TILE = {"cpu": (1024, 4096), "cuda": (4096, 32_768), "streamed": (16_384, 8192)}
_LANES = 1024  # the gallery rows of a tile are a multiple of this; see `_count`
_OF_PAIRS = ("query", "row", "ahead", "score")  # columns of Matches


@dataclass(frozen=True)
class Matches:
    """The P pairs of a query and a row of its building that are in the ranking of `num_queries` queries."""

    num_queries: int
    query: np.ndarray  # (P,) int64, ascending
    row: np.ndarray  # (P,) int64, of the gallery
    ahead: np.ndarray  # (P,) int64: wrong rows that score as high as the match, or higher
    score: np.ndarray  # (P,) float32, cosine
    wrong_row: np.ndarray  # (num_queries,) int64: the most similar wrong row of each query, -1 if it has none
    wrong_score: np.ndarray  # (num_queries,) float32, its cosine; -inf if there is none

    def select(self, which: np.ndarray) -> "Matches":
        """The pairs that a mask (P,) names; the other matches are then as good as removed from the ranking."""
        return replace(self, **{name: getattr(self, name)[which] for name in _OF_PAIRS})


@dataclass(frozen=True)
class PerQuery:
    """What became of each of Q queries. Where `has_match` is False the rank and the precision are 0."""

    has_match: np.ndarray  # (Q,) bool: a row of its building, other than itself and junk, is in the gallery
    num_matches: np.ndarray  # (Q,) int64, R: how many such rows
    best_rank: np.ndarray  # (Q,) int64, of its best match, 1 = first; ties count against the match
    average_precision_at_r: np.ndarray  # (Q,) float64

    def select(self, which: np.ndarray) -> "PerQuery":
        """The queries that a mask (Q,) or an array of their numbers names."""
        return PerQuery(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def find_matches(
    queries: np.ndarray | torch.Tensor,
    gallery: np.ndarray | torch.Tensor,
    *,
    query_building: np.ndarray,
    gallery_building: np.ndarray,
    self_rows: np.ndarray,
    junk: Csr,
    memory_mb: int,
    device: torch.device,
) -> Matches:
    """Rank the gallery for each query by cosine and say where its matches (rows of its building) stand.

    `queries` (Q, D) and `gallery` (G, D) are finite float32 unit vectors. A gallery on the host that does not fit
    on the device stays there, and its tiles move. `query_building` (Q,) and `gallery_building` (G,) int.
    `self_rows` (Q,): the gallery row that is the query itself, or -1. `junk` = (indptr (Q + 1,), indices): the
    gallery rows of each query that are removed from its ranking, be they matches or not.
    """
    queries, gallery = (torch.as_tensor(side, dtype=torch.float32) for side in (queries, gallery))
    gallery = gallery.to(device) if devices.fits(gallery.nbytes, device) else gallery
    self_rows, (indptr, indices) = np.asarray(self_rows), (np.asarray(part, np.int64) for part in junk)
    order, first, last = _rows_of_buildings(np.asarray(query_building), np.asarray(gallery_building))
    size, width = tile_sizes(gallery, device, memory_mb)
    parts = [
        (*[np.empty(0, np.int64)] * 3, np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.float32))
    ]
    for start in range(0, len(queries), size):
        tile = slice(start, min(start + size, len(queries)))
        n, own = tile.stop - start, np.flatnonzero(self_rows[tile] >= 0)
        matching = np.repeat(np.arange(n), (last - first)[tile]), order[ranges(first[tile], last[tile])]
        removed = (
            np.concatenate([own, np.repeat(np.arange(n), np.diff(indptr[start : tile.stop + 1]))]),
            np.concatenate([self_rows[tile][own], indices[indptr[start] : indptr[tile.stop]]]),
        )
        of_query, *columns = _rank_tile(queries[tile].to(device), gallery, matching, removed, width)
        parts.append((of_query + start, *columns))
    return Matches(len(queries), *(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def per_query(matches: Matches) -> PerQuery:
    """Each query's figures, from its matches alone: rows that are neither wrong nor among `matches` do not count.

    Average precision at R as in "A Metric Learning Reality Check" (Musgrave et al. 2020): the mean over the first
    R ranks of the precision where the rank holds a match; R is the query's own number of matches. A wrong row
    that scores as high as a match ranks before it.
    """
    num_matches = np.bincount(matches.query, minlength=matches.num_queries)
    ends = np.cumsum(num_matches)
    ahead = matches.ahead[np.lexsort((matches.ahead, matches.query))]  # each query's best match first
    place = np.arange(1, len(ahead) + 1) - np.repeat(ends - num_matches, num_matches)  # among its matches
    rank = ahead + place
    counts = rank <= num_matches[matches.query]
    precisions = np.bincount(matches.query, np.where(counts, place / rank, 0.0), matches.num_queries)
    has_match = num_matches > 0
    best_rank = np.zeros(matches.num_queries, np.int64)
    best_rank[has_match] = rank[(ends - num_matches)[has_match]]
    return PerQuery(has_match, num_matches, best_rank, precisions / np.maximum(num_matches, 1))


def retrieval(queries: np.ndarray | torch.Tensor, gallery: np.ndarray | torch.Tensor, **options) -> PerQuery:
    """The figures of each query, all its matches counting; see `find_matches` and `per_query`. Raises ValueError
    if a value is not finite."""
    for name, vectors in (("queries", queries), ("gallery", gallery)):
        total = torch.as_tensor(vectors, dtype=torch.float32).sum()  # unlike isfinite of all, it needs no memory
        if not torch.isfinite(total):
            raise ValueError(f"{name} hold values that are not finite")
    return per_query(find_matches(queries, gallery, **options))


def concatenate(parts: list[Matches]) -> Matches:
    """The queries of all parts, in order."""
    starts = np.cumsum([0, *(part.num_queries for part in parts)])
    query = np.concatenate([part.query + start for part, start in zip(parts, starts[:-1], strict=True)])
    others = [field.name for field in fields(Matches)][2:]
    return Matches(int(starts[-1]), query, *(np.concatenate([getattr(p, name) for p in parts]) for name in others))


def summarize(per_query: PerQuery) -> dict[str, float]:
    """METRICS over the queries that have a match. NaN if there are none."""
    which = per_query.has_match
    rank, precision = per_query.best_rank[which], per_query.average_precision_at_r[which]
    if not len(rank):
        return dict.fromkeys(METRICS, float("nan"))
    summary = {f"recall@{k}": float(np.mean(rank <= k)) for k in RECALL_AT}
    return {**summary, "map@r": float(np.mean(precision)), "median_rank": float(np.median(rank))}


def _rank_tile(
    queries: torch.Tensor, gallery: torch.Tensor, matching: tuple, removed: tuple, width: int
) -> tuple[np.ndarray, ...]:
    """(query, row, ahead, score) of each match of T queries, by query; (wrong_row, wrong_score) of each query.

    `matching`, `removed`: pairs (query of the T, gallery row): all rows of the queries' buildings; what is out of
    the ranking. The product is made anew where it is needed, always in tiles of one shape: the scores of matches
    and of wrong rows come from the same computation, so that equal vectors have equal scores.
    """
    of_query, rows = _without(matching, removed, len(gallery))
    num_matches = np.bincount(of_query, minlength=len(queries))
    slot = np.arange(len(of_query)) - np.repeat(np.cumsum(num_matches) - num_matches, num_matches)
    # most matches first: those with more than j of them are then the first rows of the tile
    new_place = np.empty(len(queries), np.int64)
    new_place[np.argsort(-num_matches, kind="stable")] = np.arange(len(queries))
    queries = queries[torch.from_numpy(np.argsort(new_place)).to(queries.device)]
    wanted = _ByTile(new_place[of_query], rows, width, queries.device)
    scores = torch.empty((len(queries), width), device=queries.device)
    score = np.empty(len(of_query), np.float32)
    for start in np.unique(rows // width) * width:
        at, columns, which = wanted.of(start)
        score[which] = _product(queries, gallery, start, scores)[at, columns].cpu().numpy()
    floors = torch.full((len(queries), num_matches.max(initial=0)), torch.inf, device=queries.device)
    floors[torch.from_numpy(new_place[of_query]), torch.from_numpy(slot)] = torch.from_numpy(score).to(floors)
    with_floor = [int(np.sum(num_matches > j)) for j in range(floors.shape[1])]
    not_wrong = new_place[np.append(removed[0], matching[0])], np.append(removed[1], matching[1])
    ahead, wrong_row, wrong_score = count_ahead(queries, gallery, floors, with_floor, not_wrong, scores)
    return of_query, rows, ahead[new_place[of_query], slot], score, wrong_row[new_place], wrong_score[new_place]


def count_ahead(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    floors: torch.Tensor,
    with_floor: list[int],
    not_wrong: tuple[np.ndarray, np.ndarray],
    scores: torch.Tensor,
) -> tuple[np.ndarray, ...]:
    """How many wrong rows reach each of the `floors` (T, J) of T queries, (T, J) int64, and each query's most
    similar wrong row and its score, (T,) int64 and float32: -1 and -inf if there is none.

    The first `with_floor[j]` queries have a j-th floor; the others' counts are 0. `not_wrong`: pairs (query of the
    T, gallery row). `scores` (T, width) is overwritten; see `tile_sizes`.
    """
    width = scores.shape[1]
    removed = _ByTile(*not_wrong, width, queries.device)
    hits = torch.empty(scores.shape, dtype=torch.bool, device=queries.device)
    ahead = torch.zeros(floors.shape, dtype=torch.int64, device=queries.device)
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    best_row = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    for start in range(0, len(gallery), width):
        _product(queries, gallery, start, scores)
        at, columns, _ = removed.of(start)
        scores[at, columns] = -torch.inf
        for j, n in enumerate(with_floor):
            torch.ge(scores[:n], floors[:n, j, None], out=hits[:n])
            ahead[:n, j] += _count(hits[:n])
        highest, column = scores.max(dim=1)
        torch.where(highest > best, column + start, best_row, out=best_row)
        torch.maximum(best, highest, out=best)
    return ahead.cpu().numpy(), best_row.cpu().numpy(), best.cpu().numpy()


def _product(queries: torch.Tensor, gallery: torch.Tensor, start: int, out: torch.Tensor) -> torch.Tensor:
    """The cosines of the queries and the gallery rows from `start` on, as many as `out` is wide; -inf past the
    gallery's end."""
    block = gallery[start : start + out.shape[1]].to(queries.device)
    missing = out.shape[1] - len(block)
    torch.mm(queries, (F.pad(block, (0, 0, 0, missing)) if missing else block).T, out=out)
    if missing:
        out[:, len(block) :] = -torch.inf
    return out


def _count(hits: torch.Tensor) -> torch.Tensor:
    """How many of each row are True, (n,) int64. Eight bytes are added at a time, as one integer, and at most 128
    of those, so that no byte overflows: 20 times as fast as `count_nonzero(dim=1)` on the CPU, or more."""
    eight = hits.view(torch.int64).view(len(hits), -1, _LANES // 8)
    return eight.sum(dim=2).view(torch.uint8).sum(dim=1)


class _ByTile:
    """Pairs (place in the tile, gallery row) sorted by tile of `width` gallery rows."""

    def __init__(self, places: np.ndarray, rows: np.ndarray, width: int, device: torch.device):
        self.order = np.argsort(rows, kind="stable")
        self.sorted_rows, self.width = rows[self.order], width
        self.places = torch.from_numpy(places[self.order]).to(device)
        self.rows = torch.from_numpy(self.sorted_rows).to(device)

    def of(self, start: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Places and columns of the pairs in the tile from `start` on, and which pairs those are."""
        first, last = np.searchsorted(self.sorted_rows, [start, start + self.width])
        return self.places[first:last], self.rows[first:last] - start, self.order[first:last]


def _without(pairs: tuple, removed: tuple, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (query, row) that are not among `removed`."""
    left = ~np.isin(pairs[0] * num_rows + pairs[1], removed[0] * num_rows + removed[1])
    return pairs[0][left], pairs[1][left]


def tile_sizes(gallery: torch.Tensor, device: torch.device, memory_mb: int) -> tuple[int, int]:
    """(queries, gallery rows) of a tile; the latter a multiple of _LANES."""
    memory, dim, is_streamed = memory_mb * 2**20, gallery.shape[1], gallery.device.type != device.type
    most, width = _LARGEST_TILE["streamed" if is_streamed else device.type]
    of_row = (8 if is_streamed else 4) * dim  # the gallery's last tile is padded, in a copy
    width = min(width, max(_LANES, memory // 4 // of_row // _LANES * _LANES))
    width = min(width, -(-max(1, len(gallery)) // _LANES) * _LANES)
    memory -= of_row * width
    per_query = _TILE_BYTES * width + 8 * dim  # its scores; itself, twice
    return int(np.clip(memory // per_query, 1, most)), width


def _rows_of_buildings(query_building: np.ndarray, gallery_building: np.ndarray) -> tuple[np.ndarray, ...]:
    """(order, first, last): the gallery rows of query i's building are order[first[i]:last[i]]."""
    order = np.argsort(gallery_building, kind="stable")
    ordered = gallery_building[order]
    return order, np.searchsorted(ordered, query_building), np.searchsorted(ordered, query_building, side="right")
