"""Counts of buildings, images and panoramas, and how views, distances and headings are spread."""

import io
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from common import parquet
from common.places import geo
from preprocess.split import cell_maps

COLUMNS = ["dataset_id", "target_id", "street_view_id", "target_lat", "target_lon", "heading", "distance"]
_VIEWS_EDGES = np.append(np.arange(1, 21), np.inf)  # the last bin: 20 views or more
_DISTANCE_EDGES_M = np.append(np.arange(0.0, 201.0, 5.0), np.inf)
_HEADING_EDGES_DEG = np.arange(0.0, 361.0, 10.0)
_INK = "#0a0b0c"  # drawn with this, then replaced by the page's text colour
_STYLE: dict[Any, Any] = {  # matplotlib's own type lists the names of all settings
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "svg.hashsalt": "summary",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def read(path: Path) -> pd.DataFrame:
    """The columns that are summarised; a panorama and a building are numbered within their dataset."""
    return parquet.read(path, COLUMNS).to_pandas()


def by_dataset(images: pd.DataFrame, split: str) -> pd.DataFrame:
    """A row per dataset: see schemas.SUMMARY."""
    views = images.groupby(["dataset_id", "target_id"]).size().groupby("dataset_id")
    grouped = images.groupby("dataset_id")
    rows = pd.DataFrame(
        {
            "images": grouped.size(),
            "buildings": views.size(),
            "panoramas": grouped["street_view_id"].nunique(),
            "views_min": views.min(),
            "views_median": views.median(),
            "views_mean": views.mean(),
            "views_max": views.max(),
            "distance_median": grouped["distance"].median().astype(float),
            "mean_lat": grouped["target_lat"].mean(),
            "mean_lon": grouped["target_lon"].mean(),
        }
    )
    return rows.reset_index().assign(split=split)


def histograms(images: pd.DataFrame) -> dict[str, np.ndarray]:
    """Buildings by number of views; images by distance and by heading."""
    views = images.groupby(["dataset_id", "target_id"]).size()
    return {
        "views": np.histogram(views, _VIEWS_EDGES)[0],
        "distance": np.histogram(images["distance"], _DISTANCE_EDGES_M)[0],
        "heading": np.histogram(images["heading"] % 360, _HEADING_EDGES_DEG)[0],
    }


def cells(images: pd.DataFrame, split: str, cell_m: float) -> pd.DataFrame:
    """Images by dataset and cell: see maps.count_cells."""
    ids = geo.cell_ids(images["target_lat"], images["target_lon"], cell_m)
    return cell_maps.count_cells(images["dataset_id"].to_numpy(), ids, np.full(len(images), split))


def totals(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Images, buildings, panoramas and datasets of each split. Buildings and panoramas belong to one dataset."""
    found = rows.groupby("split", sort=False)[["images", "buildings", "panoramas"]].sum()
    found["datasets"] = rows.groupby("split", sort=False).size()
    return {split: {name: int(value) for name, value in row.items()} for split, row in found.iterrows()}


def page(rows: pd.DataFrame, spread: dict[str, dict[str, np.ndarray]], places: pd.DataFrame, cell_m: float) -> str:
    """One self-contained HTML page. `spread`: histograms by split."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    with matplotlib.rc_context(_STYLE):
        figures = [
            (
                "Views per building",
                _svg(_bars(spread, "views", _VIEWS_EDGES, "images of a building", "buildings")),
            ),
            (
                "Horizontal distance, m",
                _svg(_bars(spread, "distance", _DISTANCE_EDGES_M, "camera to target, m", "images")),
            ),
            ("Heading", _svg(_bars(spread, "heading", _HEADING_EDGES_DEG, "degrees from north", "images"))),
        ]
        drawn = _svg(cell_maps.draw(places, cell_m))
    return environment.get_template("summary.html").render(
        totals=totals(rows), rows=rows.to_dict("records"), figures=figures, map=drawn
    )


def _bars(spread: dict, name: str, edges: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """Stacked bars, a colour per split; the last bin, if it is open, is as wide as the others."""
    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    width, below = edges[1] - edges[0], np.zeros(len(edges) - 1)
    for split, counts in spread.items():
        axes.bar(edges[:-1], counts[name], width, below, align="edge", color=cell_maps.COLOURS[split], label=split)
        below += counts[name]
    if np.isinf(edges[-1]):
        axes.text(1, 1, f"last bar: {edges[-2]:g} and more", transform=axes.transAxes, ha="right", fontsize=7)
    if len(spread) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _svg(figure: Figure) -> str:
    """An <svg> element that takes the page's text colour. Equal figures give equal bytes."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(_INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
