"""Images of an invented city as the splitting sees them: metadata, without pictures or files."""

import numpy as np
import pandas as pd

from common import config, sections
from common.places import geo
from preprocess.split import split_rules

METRE = 1 / geo.METRES_PER_DEGREE  # in degrees of latitude


def data(**changes) -> sections.Data:
    return config.load(None, [f"data.{key}={value}" for key, value in changes.items()]).data


def u64(values):
    return np.array(values, np.uint64)


def city(seed=0, buildings=400, datasets=2, side_m=2_000):
    """Random metadata in which every rule has something to drop."""
    rng = np.random.default_rng(seed)
    rows = []
    for dataset in range(1, datasets + 1):
        patch = 0
        for target in rng.permutation(buildings):
            north, east = rng.uniform(0, side_m, 2)
            lat = 40.0 + dataset + north * METRE
            lon = -74.0 + east * METRE / np.cos(np.radians(41))
            picture = rng.integers(1, 2**62)
            for number in range(rng.integers(1, 6)):
                patch += 1
                near = number == 0 or rng.random() < 0.1  # as the first view but for two bits
                hashed = int(picture ^ 3 * (number > 0)) if near else int(rng.integers(1, 2**62))
                content = int(rng.integers(1, 2**62)) if rng.random() > 0.02 else 404
                view = int(north // 120) * 100 + int(
                    east // 120
                )  # a panorama for each 120 m, more than the buffer
                rows.append((dataset, int(target), patch, view, lat, lon, content, hashed, hashed))
    columns = "dataset_id target_id patch_id street_view_id target_lat target_lon content_hash phash dhash".split()
    return pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=seed)


def images_of(frame):
    frame = frame.sort_values(["dataset_id", "target_id", "patch_id"])
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    for name in ("content_hash", "phash", "dhash"):
        columns[name] = columns[name].astype(np.uint64)
    has = columns.pop("has_embedding", np.ones(len(frame), bool))
    return split_rules.Images(**columns, has_embedding=has)
