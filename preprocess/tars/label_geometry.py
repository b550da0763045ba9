"""Labels against their own positions: do heading, pitch and distance say where the target is from the camera?

    distance = horizontal metres from camera to target
    heading  = bearing from camera to target, degrees clockwise from north
    pitch    = atan((target height - camera height) / distance), degrees

A disagreement is a statement on the data: the label is used all the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from common.places import geo

MAX_ANGLE_DEG = 1.0  # the sphere of common/places/geo.py is 0.2 degrees off at most
MAX_DISTANCE_SHARE = 0.05  # of the distance; the sphere is 0.6 % off at most
NEAR_M = 0.1  # below this, rounded positions no longer give a direction


def count_disagreements(columns: Mapping[str, Sequence]) -> Counter[str]:
    """How many labels have a heading, pitch or distance that disagrees with their positions, and how many "labels"
    there are. `columns`: of the intermediates (see schemas.INTERMEDIATES).

    Angles disagree if they differ by more than MAX_ANGLE_DEG, modulo 360 degrees; distances if by more than
    MAX_DISTANCE_SHARE of the one between the positions. A target within NEAR_M of the point above or below the
    camera has no bearing, so any heading agrees there; one within NEAR_M of the camera has no pitch either. In
    both cases the distance may differ by MAX_DISTANCE_SHARE of NEAR_M.
    """
    camera_lat, camera_lon, camera_height = _of("camera", columns)
    target_lat, target_lon, target_height = _of("target", columns)
    heading, pitch, distance = (np.asarray(columns[name], np.float64) for name in ("heading", "pitch", "distance"))

    horizontal_m = geo.distance_m(camera_lat, camera_lon, target_lat, target_lon)
    up_m = target_height - camera_height
    bearing_deg = _bearing_deg(camera_lat, camera_lon, target_lat, target_lon)
    elevation_deg = np.degrees(np.arctan2(up_m, horizontal_m))

    wrong_heading = (_angle_deg(heading, bearing_deg) > MAX_ANGLE_DEG) & (horizontal_m >= NEAR_M)
    wrong_pitch = (_angle_deg(pitch, elevation_deg) > MAX_ANGLE_DEG) & (np.hypot(horizontal_m, up_m) >= NEAR_M)
    wrong_distance = np.abs(distance - horizontal_m) > MAX_DISTANCE_SHARE * np.maximum(horizontal_m, NEAR_M)
    return Counter(
        labels=len(distance),
        heading=int(wrong_heading.sum()),
        pitch=int(wrong_pitch.sum()),
        distance=int(wrong_distance.sum()),
    )


def summary(counts: Counter[str]) -> str:
    """One clause for the summary of a run; empty if all labels agree."""
    wrong = {name: counts[name] for name in ("heading", "pitch", "distance")}
    if not any(wrong.values()):
        return ""
    listed = ", ".join(f"{name} {count:,}" for name, count in wrong.items())
    return f"labels that disagree with their positions: {listed} of {counts['labels']:,}"


def _of(what: str, columns: Mapping[str, Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitudes and longitudes in degrees and heights in metres of the cameras or targets: (N,) float64 each."""
    lat, lon, height = (np.asarray(columns[f"{what}_{name}"], np.float64) for name in ("lat", "lon", "height"))
    return lat, lon, height


def _bearing_deg(from_lat: np.ndarray, from_lon: np.ndarray, to_lat: np.ndarray, to_lon: np.ndarray) -> np.ndarray:
    """Initial bearings of great circles between points, -180 to 180 degrees clockwise from north."""
    lat1, lat2, turn = np.radians(from_lat), np.radians(to_lat), np.radians(to_lon - from_lon)
    # sin(lat2 - lat1) + ..., not cos * sin - sin * cos: that difference has no digits left for points metres apart
    north = np.sin(lat2 - lat1) + 2 * np.sin(lat1) * np.cos(lat2) * np.sin(turn / 2) ** 2
    return np.degrees(np.arctan2(np.sin(turn) * np.cos(lat2), north))


def _angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between two directions, 0 to 180 degrees, whichever way each is counted."""
    return np.abs((a - b + 180) % 360 - 180)
