"""The evaluation's arithmetic: every image of test asks the gallery for its building, by each method.

A match has the query's building. Rows of other buildings in the ignore zone are junk: removed from the ranking.
The gallery is ranked once per method; per-query values come first and are averaged last, over draws of cells of
the map (see train/evaluation/bootstrap.py).

Memory, on the device: G x D x 4 bytes for the vectors of one method (D: of the backbone for "raw", of the head for
the others) and of the one that the report shows, and tiles of scores within search_memory_mb; on the host as much
for lists of junk.
"""

import numpy as np
import torch

from common import cli
from common.errors import PipelineError
from common.places import geo
from common.sections import Config
from train.evaluation import bootstrap, breakdowns, metrics
from train.evaluation.gallery import Gallery
from train.evaluation.methods import Method
from train.evaluation.metrics import Matches, PerQuery
from train.evaluation.metrics_json import FORMAT

DIFFERENCES = (("trained", "whitening"), ("trained", "raw"), ("whitening", "raw"))
CURVE_K = np.unique(np.geomspace(1, 1000, 60).astype(int))
RANDOM_PAIRS = 200_000  # for the histogram of non-matches
HISTOGRAM_EDGES = np.linspace(-1, 1, 81)
_QUERY_BLOCK = 32_768  # queries whose junk is listed at a time, at most
_LISTED_BYTES = 64  # for a row in a query's zone, while its tile is ranked


def evaluate(
    cfg: Config, gallery: Gallery, methods: list[Method], device: torch.device, progress: cli.Progress
) -> tuple[dict, torch.Tensor, dict[str, PerQuery]]:
    """(The figures of metrics.json, the vectors of the method that the report shows, `PerQuery` of each method.)

    Raises PipelineError if no query has a match, or a method gives NaN.
    """
    shown = shown_of([method.name for method in methods])
    found, vectors = {}, torch.empty(0)
    for method in sorted(methods, key=lambda method: method.name == shown):
        del vectors  # of the method before: not two at a time
        vectors = method.vectors(gallery, device)  # those of `shown` come last, and are kept
        if not torch.isfinite(vectors.sum()):  # unlike isfinite of all, it needs no memory
            raise PipelineError(f"{method.name} ({method.told}) gives vectors that are not finite")
        found[method.name] = rank(vectors, gallery, cfg.infrastructure.search_memory_mb, progress)
    matches = {method.name: found[method.name] for method in methods}
    per_query = {name: metrics.per_query(of_method) for name, of_method in matches.items()}
    asked = per_query[shown].has_match  # the same for all methods
    if not asked.any():
        raise PipelineError("no query has a match: no building has two images that are evaluated")
    return figures(cfg, gallery, matches, per_query, vectors), vectors, per_query


def shown_of(names: list[str]) -> str:
    """The method whose histograms and sheets the report shows."""
    return "trained" if "trained" in names else names[0]


def rank(vectors: torch.Tensor, gallery: Gallery, memory_mb: int, progress: cli.Progress) -> Matches:
    """Where each query's matches stand in the rest of the gallery."""
    building, parts = gallery.zones.building_of_row, []
    for rows in _query_blocks(gallery, memory_mb):
        part = metrics.find_matches(
            vectors[rows[0] : rows[-1] + 1],
            vectors,
            query_building=building[rows],
            gallery_building=building,
            self_rows=rows,
            junk=gallery.zones.rows_of(rows, own=False),
            memory_mb=memory_mb,
            device=vectors.device,
        )
        parts.append(part)
        progress.add(len(rows))
    return metrics.concatenate(parts)


def _query_blocks(gallery: Gallery, memory_mb: int) -> list[np.ndarray]:
    """The queries in runs of at most _QUERY_BLOCK, and of no more than have their junk listed in `memory_mb` (one
    more, where a zone reaches over the limit)."""
    zones, queries = gallery.zones, np.arange(gallery.num_queries)
    rows_of_zone = np.add.reduceat(np.diff(zones.starts)[zones.buildings], zones.indptr[:-1])
    listed = np.cumsum(rows_of_zone[zones.building_of_row[queries]]) * _LISTED_BYTES
    full = np.flatnonzero(np.diff(listed // (memory_mb * 2**20))) + 1
    return np.split(queries, np.union1d(full, queries[_QUERY_BLOCK::_QUERY_BLOCK]))


def figures(
    cfg: Config,
    gallery: Gallery,
    matches: dict[str, Matches],
    per_query: dict[str, PerQuery],
    vectors: torch.Tensor,
) -> dict:
    """What metrics.json says of the methods; see train/evaluation/metrics_json.py."""
    seed, shown = cfg.global_.seed, shown_of(list(matches))
    asked = per_query[shown].has_match
    cell_id = gallery.column("cell_id")[: gallery.num_queries]
    cells = np.unique(cell_id[asked])  # the others have no say in the draws
    num_cells, cell_of_query = len(cells), np.searchsorted(cells, cell_id)
    weights = bootstrap.draw_weights(num_cells, cfg.evaluation.bootstrap_samples, seed)
    answered = {name: of_method.select(asked) for name, of_method in per_query.items()}
    estimates = {name: estimates_of(answers, cell_of_query[asked], weights) for name, answers in answered.items()}
    others = [name for name in matches if name not in ("raw", "pca", "whitening", "trained")]
    pairs = [*DIFFERENCES, *(("trained", name) for name in others)]
    effective_cells = bootstrap.effective_cells(cell_of_query[asked])

    def intervals(values: dict) -> dict:
        return {key: bootstrap.interval(of_key, effective_cells) for key, of_key in values.items()}

    return {
        "format": FORMAT,
        "methods": {name: intervals(of_method) for name, of_method in estimates.items()},
        "differences": {
            f"{a}-{b}": intervals({key: estimates[a][key] - values for key, values in estimates[b].items()})
            for a, b in pairs
            if a in estimates and b in estimates
        },
        "recall_curve": {
            "k": CURVE_K.tolist(),
            "methods": {name: _recall_curve(answers.best_rank) for name, answers in answered.items()},
        },
        "breakdowns": {
            name: breakdowns.figures(breakdown, matches, cell_of_query, weights)
            for name, breakdown in breakdowns.of(gallery, matches[shown]).items()
        },
        "similarity_histograms": similarity_histograms(
            vectors, gallery, matches[shown].score, cfg.data.ignore_radius_m, seed
        ),
        "ignore_radius_m": cfg.data.ignore_radius_m,
        "counts": {
            "queries": int(asked.sum()),
            "queries_without_match": int((~asked).sum()),
            "gallery": len(gallery.embeddings),
            "buildings": len(np.unique(gallery.zones.building_of_row[: gallery.num_queries][asked])),
            "cells": num_cells,
            "matches": len(matches[shown].query),
        },
    }


def estimates_of(per_query: PerQuery, cell_of_query: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure in each draw, (1 + draws,), the data's own first. All queries must have a match."""
    rank = per_query.best_rank
    values = np.stack([*(rank <= k for k in metrics.RECALL_AT), per_query.average_precision_at_r], axis=1)
    names = [*(f"recall@{k}" for k in metrics.RECALL_AT), "map@r"]
    means = bootstrap.means(values.astype(np.float64), cell_of_query, weights)
    return {
        **dict(zip(names, means.T, strict=True)),
        "median_rank": bootstrap.medians(rank, cell_of_query, weights),
    }


def _recall_curve(best_rank: np.ndarray) -> list[float]:
    return (np.searchsorted(np.sort(best_rank), CURVE_K, side="right") / len(best_rank)).tolist()


def similarity_histograms(
    vectors: torch.Tensor, gallery: Gallery, scores_of_matches: np.ndarray, ignore_radius_m: float, seed: int
) -> dict:
    """How many of the matches, and of random pairs that are neither matches nor junk, have which cosine."""
    rng = np.random.default_rng(seed)
    random = np.stack([rng.integers(0, n, RANDOM_PAIRS) for n in (gallery.num_queries, len(vectors))], axis=1)
    lat, lon = gallery.column("target_lat")[random], gallery.column("target_lon")[random]
    apart = geo.distance_m(lat[:, 0], lon[:, 0], lat[:, 1], lon[:, 1]) > ignore_radius_m  # no match is: 0 m
    cosines = [np.empty(0, np.float32)]
    for block in np.array_split(random[apart], 64):  # 200,000 pairs of 768-d at once would take 1.2 GB
        left, right = (
            vectors[torch.from_numpy(rows).to(vectors.device)] for rows in np.ascontiguousarray(block.T)
        )
        cosines.append((left * right).sum(dim=1).cpu().numpy())
    counts = {
        name: np.histogram(values.clip(-1, 1), HISTOGRAM_EDGES)[0].tolist()
        for name, values in (("matches", scores_of_matches), ("non_matches", np.concatenate(cosines)))
    }
    return {"edges": HISTOGRAM_EDGES.tolist(), **counts}
