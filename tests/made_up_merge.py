"""A merge without images: files as merge_and_split writes them, with vectors that look like a backbone's.

A building has a place on a street and a look; its images add a view's strong directions, which whitening removes,
and noise; some are mirrored, which turns the sign of two thirds of the look: only something nonlinear undoes that.
Buildings of one street look alike, and stand 12 m apart: the ignore zone holds some of them.
"""

from pathlib import Path

import numpy as np

from common import config, parquet, provenance, schemas
from common.places import geo
from preprocess import merge_and_split

MODEL = {
    "name": "made-up",
    "revision": "0",
    "pooling": "cls",
    "dtype": "float32",
    "dim": 24,
    "weights": "00",
}


def write_merge(folder: Path, seed: int = 0, streets: tuple[int, int, int] = (12, 6, 6), dim: int = 24) -> None:
    """merged/{train,val,test}.parquet under `folder`, with so many streets of 10 buildings in each."""
    rng = np.random.default_rng(seed)
    views = rng.normal(size=(4, dim))  # the directions in which the views of all buildings differ
    settings = config.values(config.load(), *merge_and_split.STAGE.settings)
    made = provenance.record("merge_and_split", settings | {"global.seed": seed}, {})
    for number, split in enumerate(("train", "val", "test")):
        rows = _rows(rng, 100 * number, streets[number], dim, views)
        with parquet.writer(folder / f"{split}.parquet", schemas.merged(dim), made) as out:
            out.append(rows)
            out.facts = {"embedding_model": {**MODEL, "dim": dim}}


def _rows(rng: np.random.Generator, first_street: int, streets: int, dim: int, views: np.ndarray) -> dict:
    buildings = 10 * streets
    of_row = np.repeat(np.arange(buildings), rng.integers(2, 6, buildings))
    n, street = len(of_row), np.arange(buildings) // 10
    looks = rng.normal(size=(streets, dim))[street] + 0.7 * rng.normal(size=(buildings, dim))
    seen = rng.normal(size=(n, len(views)))
    mirrored = np.where(np.arange(dim) < 2 * dim // 3, rng.choice([-1, 1], (n, 1)), 1)
    embeddings = looks[of_row] * mirrored + 0.9 * seen @ views + 0.2 * rng.normal(size=(n, dim))
    lat = (first_street + street) * 0.01
    lon = np.arange(buildings) % 10 * 12 / geo.METRES_PER_DEGREE
    target = first_street * 10 + np.arange(buildings)
    zeros = np.zeros(n)
    return {
        "building_id": [f"0001_{t}" for t in target[of_row]],
        "streetview_image_id": [f"0001_{first_street * 100 + i}" for i in range(n)],
        "dataset_id": np.ones(n),
        "target_id": target[of_row],
        "patch_id": first_street * 100 + np.arange(n),
        "street_view_id": first_street * 100 + rng.integers(0, n, n) // 2 + of_row,
        "target_lat": lat[of_row],
        "target_lon": lon[of_row],
        "target_height": zeros,
        "camera_lat": lat[of_row],
        "camera_lon": lon[of_row],
        "heading": zeros,
        "pitch": zeros,
        "distance": zeros + 10,
        "cell_id": street[of_row],
        "tar_file": ["0001.tar"] * n,
        "image_offset": zeros,
        "image_size": zeros,
        "embedding": embeddings.astype(np.float16),
    }
