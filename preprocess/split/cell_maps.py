"""The maps: cells of the largest datasets, coloured by split, with a scale bar."""

import math

import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common import pages
from common.places import geo

_MAX_MAPS = 12  # the datasets with the most images
_COLUMNS = 4
_WIDTH_IN, _HEADER_IN, _SCALE_IN = 3.2, 0.5, 0.35  # of a map, and of what is above and below it
_HEIGHTS_IN = (0.8, 3.2)  # of a map
_LEGEND_IN = 6.8  # its width, with counts of millions


def count_cells(dataset_id, cell: np.ndarray, split: np.ndarray | str) -> pd.DataFrame:
    """Images for each (dataset_id, cell, split) that has any. `split`: (N,) names, or the name for all images."""
    frame = pd.DataFrame({"dataset_id": dataset_id, "cell": cell, "split": split})
    return frame.groupby(["dataset_id", "cell", "split"], observed=True).size().reset_index(name="images")


def largest(cells: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of `count_cells` of each of the datasets with the most images, by id. Buildings that have no
    position are in none."""
    cells = cells[cells["cell"] < geo.OWN_CELLS]
    chosen = cells.groupby("dataset_id")["images"].sum().nlargest(_MAX_MAPS).index
    return [cells[cells["dataset_id"] == dataset] for dataset in sorted(chosen)]


def draw(cells: pd.DataFrame, cell_m: float) -> Figure:
    """A picture of `count_cells`, a map for each of the largest datasets."""
    found = largest(cells)
    columns = min(_COLUMNS, max(1, len(found)))
    lines = [found[first : first + columns] for first in range(0, len(found), columns)]
    heights = [max(_height_in(of_one, cell_m) for of_one in line) for line in lines] or [1.0]
    figure = Figure(
        figsize=(max(_WIDTH_IN * columns, _LEGEND_IN), sum(heights) + 0.4), dpi=100, layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for place, of_one in enumerate(found):
        _draw_map(figure.add_subplot(grid[divmod(place, columns)]), of_one, cell_m)
    if not found:
        figure.text(0.5, 0.5, "no building has a position", ha="center", va="center")
    images = cells.groupby("split", observed=True)["images"].sum()
    names = [name for name in pages.SPLIT_COLOURS if name in images]
    handles = [Patch(color=pages.SPLIT_COLOURS[name], label=f"{name}: {images[name]:,} images") for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    return figure


def draw_one(cells: pd.DataFrame, cell_m: float) -> Figure:
    """The map of one dataset of `largest`, as high as its cells need."""
    figure = Figure(figsize=(_WIDTH_IN, _height_in(cells, cell_m)), layout="constrained")
    _draw_map(figure.add_subplot(), cells, cell_m)
    return figure


def _corners_m(cells: pd.DataFrame, cell_m: float) -> np.ndarray:
    """(cells, 4, 2) metres east and north of the dataset's south-western corner."""
    lat, lon = geo.cell_corners(cells["cell"].to_numpy(), cell_m)  # (cells, 2) each
    lon = lon.clip(-180, 180)  # at a pole a cell goes all around, and has hardly a width
    east_m = (lon - lon.min()) * geo.METRES_PER_DEGREE * np.cos(np.radians(np.clip(lat.mean(), -89, 89)))
    north_m = (lat - lat.min()) * geo.METRES_PER_DEGREE
    return np.stack([east_m[:, [0, 1, 1, 0]], north_m[:, [0, 0, 1, 1]]], axis=-1)


def _height_in(cells: pd.DataFrame, cell_m: float) -> float:
    east_m, north_m = _corners_m(cells, cell_m).max(axis=(0, 1))
    return float(np.clip(_WIDTH_IN * north_m / east_m, *_HEIGHTS_IN)) + _HEADER_IN + _SCALE_IN


def _draw_map(axes, cells: pd.DataFrame, cell_m: float) -> None:
    """The cells of a dataset, each in the colour of the split that most of its images are in."""
    of_split = cells.groupby("split", observed=True)["images"].sum()
    counts = [f"{name} {of_split[name]:,}" for name in pages.SPLIT_COLOURS if name in of_split]
    title = f"{cells['dataset_id'].iloc[0]:04d}: {of_split.sum():,} images"
    axes.set_title(title + f"\n{', '.join(counts)}" * (len(counts) > 1), fontsize=9)
    shown = cells.sort_values("images", ascending=False, kind="stable").drop_duplicates("cell")
    corners = _corners_m(shown, cell_m)
    colours = [pages.SPLIT_COLOURS[name] for name in shown["split"]]
    squares = PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.3)  # type: ignore[arg-type] # arrays are accepted
    axes.add_collection(squares)
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.set_axis_off()
    length_m = scale_m(corners[..., 0].max())
    ends, below = [0, length_m], axes.get_xaxis_transform()  # metres east, shares of the map's height
    axes.plot(ends, [-0.04, -0.04], color=pages.INK, linewidth=2, transform=below, clip_on=False)
    label = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    axes.text(length_m / 2, -0.07, label, ha="center", va="top", fontsize=9, transform=below)


def scale_m(width_m: float) -> float:
    """The length of a scale bar: 1, 2 or 5 times a power of ten, at most a third of the map's width."""
    power = 10.0 ** math.floor(math.log10(width_m / 3))
    return max(step * power for step in (1, 2, 5) if step * power <= width_m / 3)
