"""Labels against their own positions: do heading, pitch and distance say where the target is from the camera?

    distance = horizontal metres from camera to target
    heading  = bearing from camera to target, degrees clockwise from north
    pitch    = atan((target height - camera height) / distance), degrees

Disagreements are only reported: the label is used all the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from common.places import geo

MAX_ANGLE_DEG = 1.0  # that of a sphere is 0.2 degrees off at most
MAX_DISTANCE_SHARE = 0.05  # of the distance, which on a sphere is 0.6 % off at most
_POSITIONS = [f"{what}_{name}" for what in ("camera", "target") for name in ("lat", "lon", "height")]


def count_disagreements(columns: Mapping[str, Sequence]) -> Counter[str]:
    """How many labels have a heading, pitch or distance that disagrees with their positions, and how many "labels"
    there are. `columns`: of the intermediates (see schemas.INTERMEDIATES).

    Angles disagree if they differ by more than MAX_ANGLE_DEG, modulo 360 degrees; distances if by more than
    MAX_DISTANCE_SHARE of the one between the positions.
    """
    stated = {
        name: np.asarray(columns[name], np.float64) for name in ("heading", "pitch", "distance", *_POSITIONS)
    }
    places = (stated[f"{what}_{name}"] for what in ("camera", "target") for name in ("lat", "lon"))
    north_m, east_m = geo.offsets_m(*places)
    height = stated["target_height"] - stated["camera_height"]
    horizontal_m = np.hypot(east_m, north_m)
    wrong = {
        "heading": _angle_deg(stated["heading"], np.degrees(np.arctan2(east_m, north_m))) > MAX_ANGLE_DEG,
        "pitch": _angle_deg(stated["pitch"], np.degrees(np.arctan2(height, horizontal_m))) > MAX_ANGLE_DEG,
        "distance": np.abs(stated["distance"] - horizontal_m) > MAX_DISTANCE_SHARE * horizontal_m,
    }
    return Counter(labels=len(horizontal_m), **{name: int(flags.sum()) for name, flags in wrong.items()})


def summary(counts: Counter[str]) -> str:
    """One clause for the summary of a run; empty if all labels agree."""
    wrong = {name: counts[name] for name in ("heading", "pitch", "distance")}
    if not any(wrong.values()):
        return ""
    listed = ", ".join(f"{name} {count:,}" for name, count in wrong.items())
    return f"labels that disagree with their positions: {listed} of {counts['labels']:,}"


def _angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between two directions, 0 to 180 degrees, whichever way each is counted."""
    return np.abs((a - b + 180) % 360 - 180)
