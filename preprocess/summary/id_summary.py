"""Counts of buildings, images and panoramas, and how views, distances and headings are distributed."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup

from common import pages
from preprocess.split import cell_maps

# of the files that are summarised; ids of buildings and panoramas are unique within their dataset
COLUMNS = ["dataset_id", "target_id", "street_view_id", "target_lat", "target_lon", "heading", "distance"]
_TEMPLATE = Path(__file__).with_name("summary.html")
_VIEWS_EDGES = np.append(np.arange(1, 21), np.inf)  # the last bin: 20 views or more
_DISTANCE_EDGES_M = np.append(np.arange(0.0, 201.0, 5.0), np.inf)
_HEADING_EDGES_DEG = np.arange(0.0, 361.0, 10.0)


def by_dataset(images: pd.DataFrame, split: str) -> pd.DataFrame:
    """A row per dataset: see schemas.SUMMARY."""
    counts = images.groupby("dataset_id").agg(
        images=("target_id", "size"),
        panoramas=("street_view_id", "nunique"),
        distance_median=("distance", "median"),
        mean_lat=("target_lat", "mean"),
        mean_lon=("target_lon", "mean"),
    )
    views = images.groupby(["dataset_id", "target_id"]).size().groupby("dataset_id")
    views = views.agg(buildings="size", views_min="min", views_median="median", views_mean="mean", views_max="max")
    return counts.join(views).reset_index().assign(split=split)


def histograms(images: pd.DataFrame) -> dict[str, np.ndarray]:
    """Buildings by number of views; images by distance and by heading."""
    views = images.groupby(["dataset_id", "target_id"]).size()
    return {
        "views": np.histogram(views, _VIEWS_EDGES)[0],
        "distance": np.histogram(images["distance"], _DISTANCE_EDGES_M)[0],
        "heading": np.histogram(images["heading"] % 360, _HEADING_EDGES_DEG)[0],
    }


def totals(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Images, buildings, panoramas and datasets of each split, from the rows of `by_dataset`."""
    sums = rows.assign(datasets=1).groupby("split", sort=False)
    return sums[["images", "buildings", "panoramas", "datasets"]].sum().to_dict("index")


@matplotlib.rc_context(pages.STYLE)
def page(rows: pd.DataFrame, spread: dict[str, dict[str, np.ndarray]], places: pd.DataFrame, cell_m: float) -> str:
    """One self-contained HTML page. `spread`: histograms by split; `places`: the cells of all splits."""
    return pages.render(
        _TEMPLATE,
        totals=totals(rows),
        rows=rows.to_dict("records"),
        figures=[
            _bars(spread, "views", _VIEWS_EDGES, "images of a building", "buildings"),
            _bars(spread, "distance", _DISTANCE_EDGES_M, "horizontal distance, camera to target, m", "images"),
            _bars(spread, "heading", _HEADING_EDGES_DEG, "heading, degrees from north", "images"),
        ],
        map=pages.svg(cell_maps.draw(places, cell_m), "Map of the cells by split"),
    )


def _bars(spread: dict, name: str, edges: np.ndarray, xlabel: str, ylabel: str) -> Markup:
    """Stacked bars, a colour per split; the last bin, if it is open, is as wide as the others."""
    axes = pages.axes(xlabel, ylabel)
    width, below = edges[1] - edges[0], np.zeros(len(edges) - 1)
    for split, counts in spread.items():
        axes.bar(edges[:-1], counts[name], width, below, align="edge", color=cell_maps.COLOURS[split], label=split)
        below += counts[name]
    if np.isinf(edges[-1]):
        axes.text(1, 1, f"last bar: {edges[-2]:g} and more", transform=axes.transAxes, ha="right", fontsize=7)
    if len(spread) > 1:
        axes.legend()
    return pages.svg(axes.figure, f"{ylabel.capitalize()} by {xlabel}")
