"""The map: cells of the largest datasets, a panel each, coloured by split."""

import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from common.places import geo

COLOURS = {"train": "#4c78a8", "val": "#f2a93b", "test": "#d1495b", "all": "#4c78a8"}
_MAX_PANELS = 12  # the datasets with the most images
_COLUMNS = 4


def count_cells(dataset_id, cell: np.ndarray, split: np.ndarray | str) -> pd.DataFrame:
    """Images for each (dataset_id, cell, split) that has any. `split`: (N,) names, or the name for all images."""
    frame = pd.DataFrame({"dataset_id": dataset_id, "cell": cell, "split": split})
    return frame.groupby(["dataset_id", "cell", "split"], observed=True).size().reset_index(name="images")


def draw(cells: pd.DataFrame, cell_m: float) -> Figure:
    """A picture of `count_cells`, without buildings that have no position. A cell has the colour of the split that
    most of its images are in."""
    cells = cells[cells["cell"] < geo.OWN_CELLS]
    cells = cells.sort_values("images", ascending=False, kind="stable").drop_duplicates(["dataset_id", "cell"])
    sizes = cells.groupby("dataset_id")["images"].sum()
    largest = sorted(sizes.nlargest(_MAX_PANELS).index)
    columns = min(_COLUMNS, max(1, len(largest)))
    rows = max(1, -(-len(largest) // columns))
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows + 0.5), dpi=100, layout="constrained")
    for place, dataset in enumerate(largest, 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_panel(axes, cells[cells["dataset_id"] == dataset], cell_m)
        axes.set_title(f"{dataset:04d}: {sizes[dataset]:,} images", fontsize=9)
    if not len(cells):
        figure.text(0.5, 0.5, "no building has a position", ha="center", va="center")
    handles = [Patch(color=COLOURS[name], label=name) for name in COLOURS if name in set(cells["split"])]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_panel(axes, cells: pd.DataFrame, cell_m: float) -> None:
    lat, lon = geo.cell_corners(cells["cell"].to_numpy(), cell_m)
    corners = np.stack([lon[:, [0, 1, 1, 0]], lat[:, [0, 0, 1, 1]]], axis=-1)  # (cells, 4, 2)
    colours = [COLOURS[name] for name in cells["split"]]
    squares = PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.3)  # type: ignore[arg-type] # arrays are accepted
    axes.add_collection(squares)
    axes.set_aspect(1 / np.cos(np.radians(lat.mean())))
    axes.autoscale_view()
    axes.ticklabel_format(useOffset=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=6)
