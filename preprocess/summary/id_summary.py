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
_VIEWS_EDGES = np.append(np.arange(1, 51), np.inf)  # the last bin: 50 views or more
_DISTANCE_EDGES_M = np.append(np.arange(0.0, 501.0), np.inf)
_HEADING_EDGES_DEG = np.arange(0.0, 361.0, 10.0)
_MAX_BARS = 40
_SHOWN = 0.99  # of what is counted, before the bar for all beyond


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
        colours={split: pages.SPLIT_COLOURS[split] for split in spread},
        figures=[
            _bars(spread, "views", _VIEWS_EDGES - 0.5, "images of a building", "buildings"),
            _bars(spread, "distance", _DISTANCE_EDGES_M, "horizontal distance, camera to target, m", "images"),
            _bars(spread, "heading", _HEADING_EDGES_DEG, "heading, degrees from north", "images"),
        ],
        maps=[
            pages.svg(cell_maps.draw_one(cells, cell_m), f"Map of the cells of {cells['dataset_id'].iloc[0]:04d}")
            for cells in cell_maps.largest(places)
        ],
    )


def fit_bins(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer, wider bins where the data is: at most _MAX_BARS up to _SHOWN of it, the last for all beyond.

    `counts` (splits, bins), of which the last bin is open, with their edges (bins + 1,). Returns (splits, n) and
    (n + 1,), whose last edge is inf if something is beyond.
    """
    reached = np.cumsum(counts.sum(axis=0))
    shown = min(int(np.searchsorted(reached, _SHOWN * reached[-1])) + 1, counts.shape[1] - 1)
    width = next((step for step in (1, 2, 5, 10) if shown <= step * _MAX_BARS), 20)
    starts = np.arange(0, shown, width)
    end = min(int(starts[-1]) + width, counts.shape[1] - 1)
    if counts[:, end:].any():
        return np.add.reduceat(counts, [*starts, end], axis=1), np.append(edges[[*starts, end]], np.inf)
    return np.add.reduceat(counts[:, :end], starts, axis=1), edges[[*starts, end]]


def _bars(spread: dict, name: str, edges: np.ndarray, xlabel: str, ylabel: str) -> Markup:
    """Stacked bars, a colour per split; the last bin, if it is open, is as wide as the others."""
    counts = np.stack([of_split[name] for of_split in spread.values()])
    if np.isinf(edges[-1]):
        counts, edges = fit_bins(counts, edges)
    if np.isinf(edges[-1]):
        xlabel += f"\n(last bar: {np.ceil(edges[-2]):g} and more)"
    axes = pages.axes(xlabel, ylabel)
    if not counts.any():  # of photographs without positions
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center")
    width, below = edges[1] - edges[0], np.zeros(len(edges) - 1)
    for split, of_split in zip(spread, counts, strict=True):
        axes.bar(edges[:-1], of_split, width, below, align="edge", color=pages.SPLIT_COLOURS[split])
        below += of_split
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return pages.svg(axes.figure, f"{ylabel.capitalize()} by {xlabel}")
