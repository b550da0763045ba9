"""The evaluation protocol: every test image queries the gallery for its building, once per method.

A match is another image of the query's building. Rows of other buildings in the ignore zone are junk: removed from
the ranking. So are, in a breakdown, matches of other classes: easy matches cannot hide hard ones (as in the easy,
medium and hard protocols of Radenovic et al. 2018, "Revisiting Oxford and Paris"). Queries without a match are
left out. Metrics are computed per query, then averaged over bootstrap draws of map cells. A building without a
position has no zone, and is a cell of its own.

Memory: G x D x 4 bytes for the vectors of one method at a time (D: of the backbone for "raw", of the head for the
others): on the device if that is at most two thirds of what is free there, else on the host (25 M, 768-d: 77 GB),
from where metrics.py streams them; then those of the buildings (building_level.py). Tiles of scores within
search_memory_mb on the device; on the host the same amount for lists of junk.
"""

from typing import NamedTuple

import numpy as np
import torch

from common import cli, devices
from common.errors import PipelineError
from common.places import geo
from common.sections import Config
from train.evaluation import bootstrap, breakdowns, building_level, metrics
from train.evaluation.breakdowns import Breakdown
from train.evaluation.building_level import BuildingRanks
from train.evaluation.gallery import Gallery
from train.evaluation.methods import Method
from train.evaluation.metric_names import MAIN_METRICS, METRICS, RECALL_AT
from train.evaluation.metrics import Matches, PerQuery
from train.evaluation.metrics_json import FORMAT

DIFFERENCES = (("trained", "whitening"), ("trained", "raw"), ("whitening", "raw"))
CURVE_K = np.unique(np.geomspace(1, 1000, 60).astype(int))
RANDOM_PAIRS = 200_000  # for the histogram of non-matches
HISTOGRAM_EDGES = np.linspace(-1, 1, 81)
_QUERY_BLOCK = 32_768  # queries whose junk is listed at a time, at most
_LISTED_BYTES = 64  # for a row in a query's zone, while its tile is ranked


class Evaluated(NamedTuple):
    """What `evaluate` finds."""

    figures: dict  # of metrics.json
    vectors: torch.Tensor  # (G, d), of the method that the report shows
    matches: dict[str, Matches]  # of each method
    per_query: dict[str, PerQuery]  # of each method


def evaluate(
    cfg: Config, gallery: Gallery, methods: list[Method], device: torch.device, progress: cli.Progress
) -> Evaluated:
    """Rank the gallery by each method. Raises PipelineError if no query has a match, or a method yields NaN."""
    shown, seed = shown_of([method.name for method in methods]), cfg.global_.seed
    ranked, vectors, memory_mb = {}, torch.empty(0), devices.search_memory_mb(cfg.infrastructure, device)
    for method in sorted(methods, key=lambda method: method.name == shown):  # `shown` last: its vectors are kept
        del vectors  # of the previous method: never two at a time
        vectors = method.vectors(gallery, device)
        of_images = rank(method, vectors, gallery, memory_mb, device, progress)
        left_mb = devices.search_memory_mb(cfg.infrastructure, device)  # beside the vectors
        ranked[method.name] = of_images, building_level.rank(vectors, gallery, seed, left_mb, device, progress)
    matches = {method.name: ranked[method.name][0] for method in methods}
    building_ranks = {method.name: ranked[method.name][1] for method in methods}
    per_query = {name: metrics.per_query(of_method) for name, of_method in matches.items()}
    if not per_query[shown].has_match.any():
        raise PipelineError("no query has a match: no building has two evaluated images")
    results = figures(cfg, gallery, matches, per_query, building_ranks, vectors)
    return Evaluated(results, vectors, matches, per_query)


def num_rankings(gallery: Gallery) -> int:
    """How many `evaluate` makes with each method, for its progress: of images among images and among buildings,
    and of halves of buildings."""
    return gallery.num_queries + building_level.num_rankings(gallery)


def shown_of(names: list[str]) -> str:
    """The method whose histograms and sheets the report shows."""
    return "trained" if "trained" in names else names[0]


def rank(
    method: Method,
    vectors: torch.Tensor,
    gallery: Gallery,
    memory_mb: int,
    device: torch.device,
    progress: cli.Progress,
) -> Matches:
    """The ranks of each query's matches in the rest of the gallery, by the `vectors` of a method, on the device or
    on the host. Raises PipelineError if one is not finite."""
    if not torch.isfinite(vectors.sum()):  # unlike isfinite of all, it needs no memory
        raise PipelineError(f"{method.name} ({method.description}) yields vectors that are not finite")
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
            device=device,
        )
        parts.append(part)
        progress.add(len(rows))
    return metrics.concatenate(parts)


def _query_blocks(gallery: Gallery, memory_mb: int) -> list[np.ndarray]:
    """Runs of at most _QUERY_BLOCK queries whose lists of junk fit in `memory_mb`, apart from the last query's."""
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
    building_ranks: dict[str, BuildingRanks],
    vectors: torch.Tensor,
) -> dict:
    """The figures of metrics.json; see train/evaluation/metrics_json.py."""
    seed, shown = cfg.global_.seed, shown_of(list(matches))
    has_match = per_query[shown].has_match  # the same for all methods
    cell_id = gallery.column("cell_id")[: gallery.num_queries]
    cells = np.unique(cell_id[has_match])  # only these are drawn
    has_position = geo.is_known(gallery.column("target_lat"), gallery.column("target_lon"))[: gallery.num_queries]
    building = gallery.zones.building_of_row[: gallery.num_queries]
    cell_of_query = np.searchsorted(cells, cell_id)
    weights = bootstrap.draw_weights(len(cells), cfg.evaluation.bootstrap_samples, seed)
    cell = cell_of_query[has_match]
    estimates, recall_curves = {}, {}  # of each method: (1 + draws, METRICS); (CURVE_K,)
    for name, queries in per_query.items():
        ranks = queries.best_rank[has_match]
        means = bootstrap.means(query_values(queries, METRICS[:-1]), cell, weights)
        estimates[name] = np.column_stack([means, bootstrap.medians(ranks, cell, weights)])
        recall_curves[name] = (np.searchsorted(np.sort(ranks), CURVE_K, side="right") / len(ranks)).tolist()
    compared = [name for name in matches if name not in ("raw", "pca", "whitening", "trained")]
    pairs = [*DIFFERENCES, *(("trained", name) for name in compared)]
    return {
        "format": FORMAT,
        **bootstrap.compared(estimates, pairs, METRICS, cell),
        "building_level": building_level.figures(building_ranks, gallery, cells, weights, pairs),
        "recall_curve": {"k": CURVE_K.tolist(), "methods": recall_curves},
        "breakdowns": {
            name: by_class(breakdown, matches, cell_of_query, weights)
            for name, breakdown in breakdowns.of(gallery, matches[shown]).items()
        },
        "similarity_histograms": similarity_histograms(
            vectors, gallery, matches[shown].score, cfg.data.ignore_radius_m, seed
        ),
        "ignore_radius_m": cfg.data.ignore_radius_m,
        "counts": {
            "queries": int(has_match.sum()),
            "queries_without_match": int((~has_match).sum()),
            "gallery": len(gallery.embeddings),
            "buildings": len(np.unique(building[has_match])),
            "buildings_without_position": len(np.unique(building[has_match & ~has_position])),
            "cells": len(cells),
            "matches": len(matches[shown].query),
        },
    }


def query_values(per_query: PerQuery, names: tuple[str, ...]) -> np.ndarray:
    """What each of n queries with a match adds to the mean of each named metric: (n, len(names)) float64."""
    answered = per_query.select(per_query.has_match)
    columns = {f"recall@{k}": answered.best_rank <= k for k in RECALL_AT}
    columns["map@r"] = answered.average_precision_at_r
    return np.stack([columns[name] for name in names], axis=1).astype(np.float64)


def by_class(
    breakdown: Breakdown, matches: dict[str, Matches], cell_of_query: np.ndarray, weights: np.ndarray
) -> dict:
    """MAIN_METRICS of each method in each class. `matches`: of each method, the same pairs."""
    classes = []
    for number, label in enumerate(breakdown.labels):
        which = breakdown.class_of_match == number
        per_query = {method: metrics.per_query(of_method.select(which)) for method, of_method in matches.items()}
        has_match = next(iter(per_query.values())).has_match
        cell = cell_of_query[has_match]
        by_method = {}
        for method, queries in per_query.items() if len(cell) else ():
            values = query_values(queries, MAIN_METRICS)
            by_method[method] = bootstrap.intervals(bootstrap.means(values, cell, weights), MAIN_METRICS, cell)
        counts = {"queries": len(cell), "matches": int(which.sum()), "cells": len(np.unique(cell))}
        classes.append({"class": label, **counts, "methods": by_method})
    return {"meaning": breakdown.meaning, "classes": classes}


def similarity_histograms(
    vectors: torch.Tensor, gallery: Gallery, scores_of_matches: np.ndarray, ignore_radius_m: float, seed: int
) -> dict:
    """Cosines of the matches, and of random pairs that are neither matches nor junk, counted by bin."""
    rng = np.random.default_rng(seed)
    pairs = np.stack([rng.integers(0, n, RANDOM_PAIRS) for n in (gallery.num_queries, len(vectors))])  # (2, n)
    lat, lon = gallery.column("target_lat")[pairs], gallery.column("target_lon")[pairs]
    one, other = gallery.zones.building_of_row[pairs]
    apart = (one != other) & ~(geo.distance_m(lat[0], lon[0], lat[1], lon[1]) <= ignore_radius_m)
    # in blocks: all at once take 1.2 GB at 768-d
    blocks = torch.from_numpy(pairs[:, apart]).to(vectors.device).split(4_096, dim=1)
    cosines = torch.cat([(vectors[queries] * vectors[rows]).sum(dim=1) for queries, rows in blocks])
    counts = {
        name: np.histogram(values.clip(-1, 1), HISTOGRAM_EDGES)[0].tolist()
        for name, values in (("matches", scores_of_matches), ("non_matches", cosines.cpu().numpy()))
    }
    return {"edges": HISTOGRAM_EDGES.tolist(), **counts}
