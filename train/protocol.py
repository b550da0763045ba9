"""The evaluation's arithmetic: every image of test asks the gallery for its building, by four methods.

A match has the query's building. Rows of other buildings in the ignore zone are junk: removed from the ranking.
Per-query values come first and are averaged last, over draws of cells of the map (see train/bootstrap.py).

Memory, on the device: G x D x 4 bytes for the vectors of one method (D: of the backbone for "raw", of the head for
the others), and tiles of scores within search_memory_mb.
"""

import numpy as np
import torch

from common import cli, geo, zones
from common.config import Config
from common.errors import PipelineError
from train import bootstrap, metrics, model
from train.gallery import Gallery

METHODS = ("raw", "pca", "whitening", "trained")
DIFFERENCES = (("trained", "whitening"), ("trained", "raw"), ("whitening", "raw"))
BREAKDOWNS = {  # name -> (upper ends of the classes, what the classes are)
    "heading_difference_deg": ((30, 60, 90, np.inf), "angle between the headings of query and match, degrees"),
    "camera_distance_m": ((10, 20, 40, np.inf), "distance from camera to target, the farther of the two, metres"),
}
BREAKDOWN_RECALL_AT = (1, 5)
MAX_PAIRS = 100_000  # (query, match) pairs in the breakdowns: more would narrow their intervals no further
RANDOM_PAIRS = 200_000  # for the histogram of non-matches
HISTOGRAM_EDGES = np.linspace(-1, 1, 81)
_QUERY_BLOCK = 32_768  # queries whose junk is listed at a time


def vectors_of(method: str, gallery: Gallery, checkpoint: dict, device: torch.device) -> torch.Tensor:
    """(G, d) float32 unit vectors of one of METHODS, on the device."""
    if method == "trained":
        return model.embed(model.head_of(checkpoint), gallery.embeddings, device)
    if method == "raw":
        vectors = torch.from_numpy(gallery.embeddings).to(device).float()
        return vectors.div_(vectors.norm(dim=1, keepdim=True).clamp_min_(1e-12))  # in place: no second copy
    baseline = checkpoint["baselines"][method]
    return model.project(gallery.embeddings, baseline["mean"], baseline["projection"], device)


def rank_queries(
    vectors: torch.Tensor, gallery: Gallery, memory_mb: int, progress: cli.Progress
) -> metrics.PerQuery:
    """Where each query's matches stand in the rest of the gallery."""
    parts = []
    for start in range(0, gallery.num_queries, _QUERY_BLOCK):
        cli.check_stop()
        rows = np.arange(start, min(start + _QUERY_BLOCK, gallery.num_queries))
        parts.append(_rank(vectors, gallery, rows, gallery.zones.rows_of(rows, own=False), memory_mb))
        progress.add(len(rows))
    return metrics.concatenate(parts)


def rank_pairs(vectors: torch.Tensor, gallery: Gallery, pairs: np.ndarray, memory_mb: int) -> np.ndarray:
    """The rank (P,) of the match of each of (P, 2) pairs (query row, match row), the query's other matches being
    junk: so a class of pairs is not won by the easy matches of another class."""
    parts = [np.empty(0, np.int64)]
    for start in range(0, len(pairs), _QUERY_BLOCK):
        cli.check_stop()
        queries, matches = pairs[start : start + _QUERY_BLOCK].T
        indptr, indices = gallery.zones.rows_of(queries, own=True)
        of_query = np.repeat(np.arange(len(queries)), np.diff(indptr))
        junk = indices != matches[of_query]
        kept = np.bincount(of_query[junk], minlength=len(queries))
        others = np.concatenate([[0], np.cumsum(kept)]), indices[junk]
        parts.append(_rank(vectors, gallery, queries, others, memory_mb).best_rank)
    return np.concatenate(parts)


def _rank(
    vectors: torch.Tensor, gallery: Gallery, rows: np.ndarray, junk: zones.Csr, memory_mb: int
) -> metrics.PerQuery:
    buildings = gallery.zones.building_of_row
    return metrics.retrieval(
        vectors[torch.from_numpy(rows).to(vectors.device)],
        vectors,
        query_building=buildings[rows],
        gallery_building=buildings,
        self_rows=rows,
        junk=junk,
        memory_mb=memory_mb,
        device=vectors.device,
    )


def matching_pairs(gallery: Gallery, seed: int) -> tuple[np.ndarray, int]:
    """Pairs (query row, match row), (P, 2) int64, ordered, and how many there are in all; a seeded sample of
    MAX_PAIRS if there are more. (All matches of a query are in test.)"""
    starts, building = gallery.zones.starts, gallery.zones.building_of_row[: gallery.num_queries]
    queries = np.repeat(np.arange(gallery.num_queries), starts[building + 1] - starts[building])
    matches = zones.ranges(starts[building], starts[building + 1])
    pairs = np.stack([queries, matches], axis=1)[queries != matches]
    if len(pairs) <= MAX_PAIRS:
        return pairs, len(pairs)
    chosen = np.random.default_rng(seed).choice(len(pairs), MAX_PAIRS, replace=False, shuffle=False)
    return pairs[np.sort(chosen)], len(pairs)


def heading_difference_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between two headings, 0 to 180 degrees."""
    return np.abs((np.asarray(a, np.float64) - b + 180) % 360 - 180)


def classes_of_pairs(gallery: Gallery, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """For each of BREAKDOWNS the class number (P,) of each pair; a class contains its lower end."""
    heading, distance = gallery.column("heading"), gallery.column("distance")
    measured = {
        "heading_difference_deg": heading_difference_deg(heading[pairs[:, 0]], heading[pairs[:, 1]]),
        "camera_distance_m": distance[pairs].max(axis=1),
    }
    return {
        name: np.searchsorted(ends[:-1], measured[name], side="right") for name, (ends, _) in BREAKDOWNS.items()
    }


def similarity_histograms(
    vectors: torch.Tensor, gallery: Gallery, pairs: np.ndarray, ignore_radius_m, seed
) -> dict:
    """How many of the matching pairs, and of random pairs that are neither matches nor junk, have which cosine."""
    rng = np.random.default_rng(seed)
    random = np.stack([rng.integers(0, n, RANDOM_PAIRS) for n in (gallery.num_queries, len(vectors))], axis=1)
    lat, lon = gallery.column("target_lat")[random], gallery.column("target_lon")[random]
    apart = geo.distance_m(lat[:, 0], lon[:, 0], lat[:, 1], lon[:, 1]) > ignore_radius_m  # no match is: 0 m
    counts = {}
    for name, chosen in (("matches", pairs), ("non_matches", random[apart])):
        left, right = (
            vectors[torch.from_numpy(np.ascontiguousarray(rows)).to(vectors.device)] for rows in chosen.T
        )
        cosines = (left * right).sum(dim=1).clamp(-1, 1).cpu().numpy()
        counts[name] = np.histogram(cosines, HISTOGRAM_EDGES)[0].tolist()
    return {"edges": HISTOGRAM_EDGES.tolist(), **counts}


def estimates_of(per_query: metrics.PerQuery, cell_of_query: np.ndarray, weights: np.ndarray) -> dict:
    """Each figure in each draw, (1 + draws,), the data's own first. All queries must have a match."""
    rank = per_query.best_rank
    values = np.stack([*(rank <= k for k in metrics.RECALL_AT), per_query.average_precision_at_r], axis=1)
    names = [*(f"recall@{k}" for k in metrics.RECALL_AT), "map@r"]
    means = bootstrap.means(values.astype(np.float64), cell_of_query, weights)
    return {
        **dict(zip(names, means.T, strict=True)),
        "median_rank": bootstrap.medians(rank, cell_of_query, weights),
    }


def breakdown(
    ranks: dict[str, np.ndarray], classes: np.ndarray, cell_of_pair: np.ndarray, name: str, weights
) -> dict:
    """Recall over the pairs of each class of one of BREAKDOWNS, by method, with intervals."""
    ends, meaning = BREAKDOWNS[name]
    table = []
    for number, (low, high) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        which = classes == number
        entry = {"class": f"{low}-{high}" if np.isfinite(high) else f"over {low}", "pairs": int(which.sum())}
        if which.any():
            entry["cells"] = len(np.unique(cell_of_pair[which]))
            entry["methods"] = {
                method: {
                    f"recall@{k}": bootstrap.interval(
                        bootstrap.means((rank[which, None] <= k) * 1.0, cell_of_pair[which], weights)[:, 0],
                        entry["cells"],
                    )
                    for k in BREAKDOWN_RECALL_AT
                }
                for method, rank in ranks.items()
            }
        table.append(entry)
    return {"meaning": meaning, "classes": table}


def evaluate(
    cfg: Config, gallery: Gallery, checkpoint: dict, device: torch.device, progress: cli.Progress
) -> tuple:
    """(what metrics.json says, but for its provenance; the trained vectors; `PerQuery` of each method)."""
    seed, memory_mb = cfg.global_.seed, cfg.infrastructure.search_memory_mb
    pairs, num_pairs = matching_pairs(gallery, seed)
    if not num_pairs:
        raise PipelineError("no query has a match: every building of merged/test.parquet has a single image")
    per_query, pair_ranks, vectors = {}, {}, None
    for method in METHODS:
        del vectors  # of the method before: not two at a time
        vectors = vectors_of(method, gallery, checkpoint, device)  # "trained" comes last and is kept
        per_query[method] = rank_queries(vectors, gallery, memory_mb, progress)
        pair_ranks[method] = rank_pairs(vectors, gallery, pairs, memory_mb)

    has_match = per_query["raw"].has_match  # the same for all methods
    cell_id = gallery.column("cell_id")
    cells, cell_of_query = np.unique(cell_id[: gallery.num_queries][has_match], return_inverse=True)
    num_cells = len(cells)
    weights = bootstrap.draw_weights(num_cells, cfg.training.bootstrap_samples, seed)
    estimates = {m: estimates_of(per_query[m].select(has_match), cell_of_query, weights) for m in METHODS}
    cell_of_pair = np.searchsorted(cells, cell_id[pairs[:, 0]])
    figures = {
        "methods": {m: {k: bootstrap.interval(e, num_cells) for k, e in estimates[m].items()} for m in METHODS},
        "differences": {
            f"{a}-{b}": {k: bootstrap.interval(estimates[a][k] - e, num_cells) for k, e in estimates[b].items()}
            for a, b in DIFFERENCES
        },
        "breakdowns": {
            name: breakdown(pair_ranks, classes, cell_of_pair, name, weights)
            for name, classes in classes_of_pairs(gallery, pairs).items()
        },
        "similarity_histograms": similarity_histograms(vectors, gallery, pairs, cfg.data.ignore_radius_m, seed),
        "ignore_radius_m": cfg.data.ignore_radius_m,
        "gallery": cfg.training.gallery,
        "counts": {
            "queries": int(has_match.sum()),
            "queries_without_match": int((~has_match).sum()),
            "gallery": len(gallery.embeddings),
            "buildings": len(np.unique(gallery.zones.building_of_row[: gallery.num_queries])),
            "cells": num_cells,
            "pairs": num_pairs,
            "pairs_in_breakdowns": len(pairs),
        },
    }
    return figures, vectors, per_query
