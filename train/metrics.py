"""Retrieval metrics by counting: for each query, how many wrong rows of the gallery outrank each of its matches.

Memory: the gallery as float32 on the device (G x D x 4 bytes), and tiles of (queries, G) scores within
`memory_mb` (one query at least: 10 x G bytes).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from common.zones import Csr, ranges

RECALL_AT = (1, 5, 10, 100, 1000)
_TILE_BYTES = 10  # per score: itself (4), a comparison (1), and what torch takes to sum that up


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


def retrieval(
    queries: np.ndarray | torch.Tensor,
    gallery: np.ndarray | torch.Tensor,
    *,
    query_building: np.ndarray,
    gallery_building: np.ndarray,
    self_rows: np.ndarray,
    junk: Csr,
    memory_mb: int,
    device: torch.device,
) -> PerQuery:
    """Rank the gallery for each query by cosine and say where its matches (rows of its building) stand.

    `queries` (Q, D) and `gallery` (G, D) are float32 unit vectors; `query_building` (Q,) and `gallery_building`
    (G,) int. `self_rows` (Q,): the gallery row that is the query itself, or -1. `junk` = (indptr (Q + 1,),
    indices): the gallery rows of each query that are removed from its ranking, be they matches or not.

    Average precision at R as in "A Metric Learning Reality Check" (Musgrave et al. 2020): the mean over the first
    R ranks of the precision where the rank holds a match; R is the query's own number of matches. A wrong row
    that scores as high as a match ranks before it. The scores of matches and of wrong rows stand in one product.
    """
    queries, gallery = _float32(queries, torch.device("cpu")), _float32(gallery, device)
    for name, vectors in (("queries", queries), ("gallery", gallery)):
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{name} hold values that are not finite")
    order, first, last = _rows_of_buildings(np.asarray(query_building), np.asarray(gallery_building))
    size = int(max(1, memory_mb * 2**20 // (_TILE_BYTES * max(1, len(gallery)))))
    tiles = []
    for start in range(0, len(queries), size):
        tile = slice(start, min(start + size, len(queries)))
        scores = queries[tile].to(device) @ gallery.T  # (T, G), cosine
        n = len(scores)
        own = np.flatnonzero(np.asarray(self_rows)[tile] >= 0)
        _remove(scores, own, np.asarray(self_rows)[tile][own])
        indptr = np.asarray(junk[0])[tile.start : tile.stop + 1]
        _remove(scores, np.repeat(np.arange(n), np.diff(indptr)), junk[1][indptr[0] : indptr[-1]])
        of_query = np.repeat(np.arange(n), (last - first)[tile])
        tiles.append(_rank_tile(scores, of_query, order[ranges(first[tile], last[tile])]))
    columns = [np.concatenate(parts) for parts in zip(*tiles, strict=True)] or [np.empty(0)] * 3
    num_matches, best_rank = columns[0].astype(np.int64), columns[1].astype(np.int64)
    return PerQuery(num_matches > 0, num_matches, best_rank, columns[2].astype(np.float64))


def concatenate(parts: list[PerQuery]) -> PerQuery:
    """The queries of all parts, in order."""
    names = [field.name for field in fields(PerQuery)]
    return PerQuery(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def summarize(per_query: PerQuery, recall_at: tuple[int, ...] = RECALL_AT) -> dict[str, float]:
    """Means over the queries that have a match: "recall@1", ..., "map@r", "median_rank". NaN if there are none."""
    which = per_query.has_match
    rank, precision = per_query.best_rank[which], per_query.average_precision_at_r[which]
    if not len(rank):
        return {
            **{f"recall@{k}": float("nan") for k in recall_at},
            "map@r": float("nan"),
            "median_rank": float("nan"),
        }
    summary = {f"recall@{k}": float(np.mean(rank <= k)) for k in recall_at}
    return {**summary, "map@r": float(np.mean(precision)), "median_rank": float(np.median(rank))}


def _rank_tile(scores: torch.Tensor, of_query: np.ndarray, match_rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Number of matches, rank of the best, and AP@R of the T queries of one tile; overwrites `scores`.

    `of_query`, `match_rows`: pairs (query of the tile, gallery row of its building), by query. Rows that have been
    removed from the ranking stand at -inf in `scores`.
    """
    n, device = len(scores), scores.device
    slot = np.arange(len(of_query)) - np.searchsorted(of_query, of_query)  # 0, 1, ... within each query
    slots = int(slot.max()) + 1 if len(slot) else 1
    of_query_, match_rows_ = torch.from_numpy(of_query).to(device), torch.from_numpy(match_rows).to(device)
    matches = torch.full((n, slots), -torch.inf, device=device)
    matches[of_query_, torch.from_numpy(slot).to(device)] = scores[of_query_, match_rows_]
    matches = matches.sort(dim=1, descending=True).values  # (T, slots), best first, -inf where there are fewer
    scores[of_query_, match_rows_] = -torch.inf  # only wrong rows are left
    num_matches = torch.isfinite(matches).sum(dim=1)

    ahead = torch.zeros((n, slots), dtype=torch.int64, device=device)  # wrong rows that outrank each match
    for j in range(slots):
        has = torch.nonzero(num_matches > j).squeeze(1)
        rows = scores if len(has) == n else scores[has]
        ahead[has, j] = torch.count_nonzero(rows >= matches[has, j, None], dim=1)
    place = torch.arange(1, slots + 1, device=device)  # among the query's matches
    rank = ahead + place
    counts = (place <= num_matches[:, None]) & (rank <= num_matches[:, None])
    precision = torch.where(counts, place / rank.double(), 0.0).sum(dim=1) / num_matches.clamp(min=1)
    best_rank = torch.where(num_matches > 0, rank[:, 0], 0)
    return num_matches.cpu().numpy(), best_rank.cpu().numpy(), precision.cpu().numpy()


def _rows_of_buildings(query_building: np.ndarray, gallery_building: np.ndarray) -> tuple[np.ndarray, ...]:
    """(order, first, last): the gallery rows of query i's building are order[first[i]:last[i]]."""
    order = np.argsort(gallery_building, kind="stable")
    ordered = gallery_building[order]
    return order, np.searchsorted(ordered, query_building), np.searchsorted(ordered, query_building, side="right")


def _remove(scores: torch.Tensor, of_query: np.ndarray, rows: np.ndarray) -> None:
    at = [torch.from_numpy(np.asarray(index, np.int64)).to(scores.device) for index in (of_query, rows)]
    scores[at[0], at[1]] = -torch.inf


def _float32(vectors: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(vectors, dtype=torch.float32, device=device)
