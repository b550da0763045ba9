"""Where it is hard: the figures of a class of matches at a time.

A query's positives are its matches of that class; its other matches are junk, removed from the ranking, so that no
class is won by the easy matches of another (as in the easy, medium and hard protocols of Radenovic et al. 2018,
"Revisiting Oxford and Paris"). A query without a match of the class is not asked.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.evaluation import bootstrap, metrics
from train.evaluation.gallery import Gallery
from train.evaluation.metrics import Matches

FIGURES = ("recall@1", "recall@5", "map@r")
HEADING_DEG, CAMERA_M, HEIGHT_M, MANY_VIEWS = (30, 60, 90), (10, 20, 40), (0, 2, 5), 6


@dataclass(frozen=True)
class Breakdown:
    """What the classes are, and the class of each of P matches."""

    meaning: str
    labels: list[str]
    class_of_match: np.ndarray  # (P,), 0..len(labels) - 1


def of(gallery: Gallery, matches: Matches) -> dict[str, Breakdown]:
    """All breakdowns. A class holds its lower end."""
    query, row = matches.query, matches.row
    heading, distance, pitch = (gallery.column(name) for name in ("heading", "distance", "pitch"))
    building = gallery.zones.building_of_row[query]
    views = (gallery.zones.starts[building + 1] - gallery.zones.starts[building]).clip(2, MANY_VIEWS)
    datasets, dataset = np.unique(gallery.column("dataset_id")[query], return_inverse=True)
    few = range(2, MANY_VIEWS)
    return {
        "heading_difference_deg": _by_size(
            "the angle between the headings of query and match, degrees",
            heading_difference_deg(heading[query], heading[row]), HEADING_DEG,
        ),
        "camera_distance_m": _by_size(
            "the horizontal distance from camera to target, the farther of the two, metres",
            np.maximum(distance[query], distance[row]), CAMERA_M,
        ),
        "target_height_m": _by_size(
            "the height of the target above the query's camera (distance x tangent of the pitch), metres",
            distance[query] * np.tan(np.radians(pitch[query])), HEIGHT_M,
        ),
        "views": Breakdown(
            "the number of images of the building", [*map(str, few), f"{MANY_VIEWS} or more"], views - 2
        ),
        "dataset": Breakdown("dataset (city)", [f"{number:04d}" for number in datasets], dataset),
    }  # fmt: skip


def _by_size(meaning: str, values: np.ndarray, edges: tuple[int, ...]) -> Breakdown:
    first = f"0-{edges[0]}" if edges[0] > 0 else f"below {edges[0]}"
    between = [f"{low}-{high}" for low, high in pairwise(edges)]
    return Breakdown(meaning, [first, *between, f"over {edges[-1]}"], np.searchsorted(edges, values, side="right"))


def heading_difference_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between two headings, 0 to 180 degrees."""
    return np.abs((np.asarray(a, np.float64) - b + 180) % 360 - 180)


def figures(
    breakdown: Breakdown, matches: dict[str, Matches], cell_of_query: np.ndarray, weights: np.ndarray
) -> dict:
    """FIGURES of each class by method, with intervals; `matches`: of each method, of the same pairs."""
    classes = []
    for number, label in enumerate(breakdown.labels):
        which = breakdown.class_of_match == number
        found = {method: metrics.per_query(of_method.select(which)) for method, of_method in matches.items()}
        asked = next(iter(found.values())).has_match
        cells = len(np.unique(cell_of_query[asked]))
        entry = {"class": label, "queries": int(asked.sum()), "matches": int(which.sum()), "cells": cells}
        entry["methods"] = {
            method: _with_intervals(of_class.select(asked), cell_of_query[asked], weights)
            for method, of_class in found.items()
            if asked.any()
        }
        classes.append(entry)
    return {"meaning": breakdown.meaning, "classes": classes}


def _with_intervals(found: metrics.PerQuery, cell_of_query: np.ndarray, weights: np.ndarray) -> dict:
    values = [found.best_rank <= 1, found.best_rank <= 5, found.average_precision_at_r]
    estimates = bootstrap.means(np.stack(values, axis=1).astype(np.float64), cell_of_query, weights)
    cells = bootstrap.effective_cells(cell_of_query)
    return {name: bootstrap.interval(column, cells) for name, column in zip(FIGURES, estimates.T, strict=True)}
