"""Classes of matches: by the angle between two views, their distance, the target's height, views, dataset."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.evaluation.gallery import Gallery
from train.evaluation.metrics import Matches

HEADING_DEG, CAMERA_M, HEIGHT_M, MANY_VIEWS = (30, 60, 90), (10, 20, 40), (0, 2, 5), 6


@dataclass(frozen=True)
class Breakdown:
    """What the classes are, and the class of each of P matches."""

    meaning: str
    labels: list[str]
    class_of_match: np.ndarray  # (P,), 0..len(labels) - 1; -1: not known


def of(gallery: Gallery, matches: Matches) -> dict[str, Breakdown]:
    """All breakdowns for which the matches have values. A class includes its lower end."""
    query, row = matches.query, matches.row
    heading, distance, pitch = (gallery.column(name) for name in ("heading", "distance", "pitch"))
    building = gallery.zones.building_of_row[query]
    views = np.diff(gallery.zones.starts)[building].clip(2, MANY_VIEWS)
    view_labels = [*map(str, range(2, MANY_VIEWS)), f"{MANY_VIEWS} or more"]
    datasets, dataset = np.unique(gallery.column("dataset_id")[query], return_inverse=True)
    breakdowns = {
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
        "views": Breakdown("the number of images of the building", view_labels, views - 2),
        "dataset": Breakdown("dataset (city)", [f"{number:04d}" for number in datasets], dataset),
    }  # fmt: skip
    return {name: each for name, each in breakdowns.items() if (each.class_of_match >= 0).any()}


def _by_size(meaning: str, values: np.ndarray, edges: tuple[int, ...]) -> Breakdown:
    first = f"0-{edges[0]}" if edges[0] > 0 else f"below {edges[0]}"
    between = [f"{low}-{high}" for low, high in pairwise(edges)]
    classes = np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="right"))
    return Breakdown(meaning, [first, *between, f"over {edges[-1]}"], classes)


def heading_difference_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between two headings, 0 to 180 degrees."""
    return np.abs((np.asarray(a, np.float64) - b + 180) % 360 - 180)
