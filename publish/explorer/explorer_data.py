"""From the table of buildings to the arrays of the explorer: places, colours, nearest buildings.

n buildings are shown, all or a sample. Codes number classes from 0; what is not known has a class of its own.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from common import cli, parquet, schemas
from common.errors import PipelineError
from common.places import geo

NEAREST = 8
_COLOURS = 24  # of categories: 8 hues in three shades; the smallest categories share a grey
_FACTS = ["building", "images", "spread", "image_ids", "lat", "lon", "split", "cluster"]
_FACTS += ["cluster_similarity", "x", "y"]
_AREA_KM, _AREA_CELL_M = 40, 10_000  # of a map where no city is known: its radius, and the cells it is made of
_IMAGES = {"1": 2, "2": 3, "3 or 4": 5, "5 to 8": 9}  # class -> first number that is above it


@dataclass(frozen=True)
class ShownBuildings:
    """In the order of the table."""

    total: int  # in the table
    facts: pd.DataFrame  # n rows with the columns _FACTS, and `city`: a name, an area's, or "" if unknown
    vectors: np.ndarray  # (n, D) float32

    def __len__(self) -> int:
        return len(self.facts)


def require_columns(paths: list[Path]) -> None:
    """Raises PipelineError if a file has not the columns of a table of buildings."""
    for path in paths:
        has = parquet.open_file(path).schema_arrow.names
        if missing := [name for name in [*_FACTS, "embedding"] if name not in has]:
            words = f"{path} is no table of buildings: it has no column {', '.join(missing)}"
            raise PipelineError(f"{words}\nname a table of publish/aggregate_buildings.py")


def read(paths: list[Path], kept: set[str], limit: int, seed: int) -> ShownBuildings:
    """The buildings of these files, at most `limit`: first those named in `kept`, then those that have a place in
    the projection, at random among equals.

    Raises PipelineError if a file is missing or damaged, and if there are no buildings.
    """
    all_rows = pa.concat_tables(parquet.read(path, ["building", "x"]) for path in paths)
    if not len(all_rows):
        raise PipelineError(f"{paths[0]} has no rows: no building to show")
    is_kept = pc.is_in(all_rows["building"].cast(pa.string()), pa.array(kept, pa.string())).to_numpy()
    rows = sample(2 - 2 * is_kept - np.isfinite(all_rows["x"].to_numpy()), limit, seed)
    vectors: list[np.ndarray] = []
    facts, start = [], 0
    for path in paths:
        has = parquet.open_file(path).schema_arrow.names
        optional = [name for name in ("dataset_id", "city") if name in has][:1]
        for batch in parquet.batches(path, [*_FACTS, *optional, "embedding"], 8_192):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))] - start
            start += len(batch)
            if not len(chosen):
                continue
            batch = batch.take(chosen)
            name = lambda row: f"building {batch['building'][row]}"  # noqa: B023,E731
            dim = vectors[0].shape[1] if vectors else None
            own = parquet.embedding_matrix(path, batch, "embedding", name, dim).astype(np.float32)
            vectors.append(own / np.linalg.norm(own, axis=1, keepdims=True).clip(1e-12))
            of_batch = batch.drop_columns("embedding").to_pandas().astype({"building": str})
            of_batch["city"] = list(map(_city, batch[optional[0]].to_pylist())) if optional else ""
            facts.append(of_batch)
    shown = pd.concat(facts, ignore_index=True)
    if not shown["city"].any():
        shown["city"] = areas(shown["lat"].to_numpy(), shown["lon"].to_numpy())
    return ShownBuildings(len(all_rows), shown, np.concatenate(vectors))


def _city(dataset) -> str:
    """The name of a dataset's city: "0088" for the pipeline's number 88; "" if it is not known."""
    return f"{dataset:04d}" if isinstance(dataset, int) else str(dataset or "")


def areas(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Names for the surroundings of n positions, (n,) of str: "area 1 (50.08, 14.43)" is the largest; "" where the
    position is not known. Each area lies around its densest cell, and is at most about 100 km wide."""
    names, known = np.full(len(lat), "", object), np.flatnonzero(geo.is_known(lat, lon))
    cells = geo.cell_ids(lat[known], lon[known], _AREA_CELL_M)
    ids, cell, sizes = np.unique(cells, return_inverse=True, return_counts=True)
    cell_lat, cell_lon = (sides.mean(axis=1) for sides in geo.cell_corners(ids, _AREA_CELL_M))
    area_of_cell = np.full(len(ids), -1)
    for densest in np.argsort(-sizes, kind="stable"):
        if area_of_cell[densest] < 0:
            away = geo.distance_m(cell_lat[densest], cell_lon[densest], cell_lat, cell_lon)
            area_of_cell[(area_of_cell < 0) & (away < _AREA_KM * 1000)] = densest
    area = area_of_cell[cell]
    largest_first = pd.Series(area).value_counts().index
    for number, one in enumerate(largest_first, 1):
        rows = known[area == one]
        middle_lat, middle_lon = _middle(lat[rows], lon[rows])
        names[rows] = f"area {number:0{len(str(len(largest_first)))}} ({middle_lat:.2f}, {middle_lon:.2f})"
    return names


def sample(priority: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of N rows, ascending: those of the lowest priority, and of equal ones any at random."""
    order = np.random.default_rng(seed).permutation(len(priority))
    return np.sort(order[np.argsort(priority[order], kind="stable")][:limit])


def nearest(
    vectors: np.ndarray, device: torch.device, memory_mb: int, progress: cli.Progress
) -> dict[str, np.ndarray]:
    """The NEAREST other rows of each of n unit vectors, most similar first: `nearest` (n, k) int32, and their
    `cosines` (n, k) float32. Exact, in float32; k is smaller if there are fewer."""
    matrix = torch.from_numpy(vectors).to(device)
    n, k = len(matrix), min(NEAREST, len(matrix) - 1)
    rows, cosines = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    block = max(1, memory_mb * 2**20 // (4 * n))
    for start in range(0, n, block):
        products = matrix[start : start + block] @ matrix.T  # (block, n)
        itself = torch.arange(len(products), device=device)
        products[itself, start + itself] = -torch.inf
        best = products.topk(k, dim=1)
        rows[start : start + block], cosines[start : start + block] = best.indices.cpu(), best.values.cpu()
        progress.add(len(products))
    return {"nearest": rows, "cosines": cosines}


def places(facts: pd.DataFrame, cell_m: float) -> dict[str, Any]:
    """Where buildings are: `city` (n,) int16, and `east` and `north` (n,) float32 of the middle of their city in
    metres, NaN if not known. `cities`: name and middle of each. `cells`: of the map, those that hold buildings:
    (C, 4) float32 of west, south, east and north, and `cell_city` (C,) int16.
    """
    names, city = np.unique(facts["city"], return_inverse=True)
    lat, lon = facts["lat"].to_numpy(), facts["lon"].to_numpy()
    known = geo.is_known(lat, lon)
    east, north = (np.full(len(facts), np.nan, np.float32) for _ in range(2))
    cities, cells = [], []
    for code, name in enumerate(names):
        rows = np.flatnonzero(known & (city == code))
        middle = _middle(lat[rows], lon[rows])
        cities.append({"name": name, "lat": middle[0], "lon": middle[1], "located": len(rows)})
        east[rows], north[rows] = _in_metres(lat[rows], lon[rows], *middle)
        south_north, west_east = geo.cell_corners(np.unique(geo.cell_ids(lat[rows], lon[rows], cell_m)), cell_m)
        x, y = _in_metres(south_north, west_east, *middle)
        cells.append(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1))
    cell_city = np.repeat(np.arange(len(names), dtype=np.int16), [len(each) for each in cells])
    drawn = np.concatenate(cells).astype(np.float32)
    return {
        "city": city.astype(np.int16), "east": east, "north": north, "cities": cities, "cells": drawn,
        "cell_city": cell_city,
    }  # fmt: skip


def _middle(lat: np.ndarray, lon: np.ndarray) -> tuple[float, float]:
    """The mean position in degrees, also across the 180th meridian; 0, 0 of none."""
    if not len(lat):
        return 0.0, 0.0
    return float(lat.mean()), float(lon[0] + ((lon - lon[0] + 180) % 360 - 180).mean())


def _in_metres(lat, lon, middle_lat: float, middle_lon: float) -> tuple[np.ndarray, np.ndarray]:
    """East and north of a city's middle, equirectangular: at 50 degrees, 0.2 % off 10 km north or south of it."""
    east = geo.METRES_PER_DEGREE * np.cos(np.radians(middle_lat)) * ((lon - middle_lon + 180) % 360 - 180)
    return east, geo.METRES_PER_DEGREE * (lat - middle_lat)


def colourings(facts: pd.DataFrame, share_found: pd.Series | None) -> list[dict[str, Any]]:
    """What buildings can be coloured by, as far as it is known and differs. Each has a name, a title, classes
    (label and colour, which the style defines) and `codes` (n,) uint8. `share_found`: of a building's queries,
    those whose first result is right, by its name.
    """
    clusters = facts["cluster"].map(lambda number: f"{number}" if number >= 0 else "")
    found = [
        _categories("city", "City", facts["city"].to_numpy(str)),
        _categories("split", "Split", facts["split"].to_numpy(str), schemas.SPLITS),
        _categories("cluster", "Cluster", clusters.to_numpy(str)),
    ]
    if share_found is not None:
        found.append(_verdicts(facts["building"].map(share_found).to_numpy(float)))
    spread = facts["spread"].to_numpy()
    edges = np.unique(np.quantile(spread, (0.2, 0.4, 0.6, 0.8)).round(3))
    marks = [f"{edge:g}" for edge in edges]
    labels = [f"below {marks[0]}", *map(" to ".join, pairwise(marks)), f"{marks[-1]} or more"]
    found.append(_steps("spread", "Spread of a building's images", spread, edges, labels))
    counts = "images", "Number of images", facts["images"].to_numpy()
    found.append(_steps(*counts, np.array(list(_IMAGES.values())), [*_IMAGES, "9 or more"]))
    return [each for each in found if len(np.unique(each["codes"])) > 1] or found[-1:]


def _categories(name: str, title: str, values: np.ndarray, ordered: tuple[str, ...] = ()) -> dict[str, Any]:
    """Classes of strings: those of `ordered`, then the largest first, in at most _COLOURS colours and a grey one
    for all others; "" is in none."""
    counts = pd.Series(values[values != ""]).value_counts().sort_index()
    by_size = counts.sort_values(ascending=False, kind="stable").index
    known = [*ordered, *(value for value in by_size if value not in ordered)]
    own = known[: _COLOURS if len(known) <= _COLOURS else _COLOURS - 1]
    code_of = {value: min(code, len(own)) for code, value in enumerate(known)}
    classes = [{"label": value, "colour": f"category-{code}"} for code, value in enumerate(own)]
    if others := len(known) - len(own):
        classes.append({"label": f"{others:,} others", "colour": "others"})
    code_of[""] = len(classes)
    if (values == "").any():
        classes.append({"label": "none", "colour": "none"})
    codes = pd.Series(values).map(code_of).to_numpy(np.uint8)
    return {"name": name, "title": title, "classes": classes, "codes": codes}


def _steps(name: str, title: str, values: np.ndarray, edges: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Ordered classes; a class includes its lower end."""
    classes = [{"label": label, "colour": f"step-{code}"} for code, label in enumerate(labels)]
    codes = np.searchsorted(edges, values, side="right").astype(np.uint8)
    return {"name": name, "title": title, "classes": classes, "codes": codes}


def _verdicts(share: np.ndarray) -> dict[str, Any]:
    """Classes of the shares of right queries; NaN: the building has none."""
    labels = {"all right": "right", "some right": "partly", "none right": "wrong", "no queries": "none"}
    classes = [{"label": label, "colour": colour} for label, colour in labels.items()]
    codes = np.select([share == 1, share > 0, share == 0], [0, 1, 2], 3).astype(np.uint8)
    return {"name": "right", "title": "Queries right or wrong", "classes": classes, "codes": codes}


def content(buildings: ShownBuildings, share_found: pd.Series | None, cell_m: float) -> dict[str, Any]:
    """All that the page shows of the buildings themselves, but for their nearest ones and their pictures."""
    facts = buildings.facts
    columns = {"images": np.int32, "spread": np.float32, "cluster": np.int32}
    columns |= dict.fromkeys(["cluster_similarity", "x", "y"], np.float32)
    return {
        "total": buildings.total,
        "names": facts["building"].tolist(),
        "colourings": colourings(facts, share_found),
        **{name: facts[name].to_numpy(kind) for name, kind in columns.items()},
        **places(facts, cell_m),
    }
