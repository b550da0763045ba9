"""report.html: one self-contained page of an evaluation, for people."""

import json
from pathlib import Path

import pandas as pd

from common import files, pages, parquet
from common.errors import PipelineError
from common.imagery import tar_images
from common.sections import Config
from train import run_record
from train.evaluation import bootstrap, protocol
from train.evaluation.gallery import Gallery
from train.evaluation.metric_names import BUILDING_METRICS, MAIN_METRICS, TITLES, shown_recalls
from train.evaluation.metrics_json import flat, percent, share
from train.evaluation.protocol import Evaluated
from train.report import evaluation_figures, query_sheets

_TEMPLATE = Path(__file__).with_name("report.html")
# of the table of searches for buildings: title, search, metric
_BUILDING_COLUMNS = (
    ("image, Recall@1", "image_to_building", "recall@1"),
    ("image, Recall@5", "image_to_building", "recall@5"),
    ("half, Recall@1", "half_to_half", "recall@1"),
)
_XLABELS = {
    "heading_difference_deg": "angle between headings, degrees",
    "camera_distance_m": "horizontal distance to the target, metres (the farther camera)",
    "target_height_m": "target above the camera, metres",
    "views": "images of the building",
    "dataset": "dataset (city)",
}


def read_background(cfg: Config) -> tuple[pd.DataFrame | None, dict]:
    """The history of the config's run and the report of its split, if any. PipelineError if one is damaged."""
    history_path = run_record.run_dir(cfg) / run_record.HISTORY
    split_path = files.beside(cfg.paths.merged_dir, "report") / "split_report.json"
    history = parquet.read(history_path).to_pandas() if history_path.exists() else None
    try:
        split_report = json.loads(split_path.read_text()) if split_path.exists() else {}
    except ValueError as error:
        raise PipelineError(
            f"{split_path} is damaged ({error})\nrerun merge_and_split.py, or delete the file: it is optional here"
        ) from None
    split_report.pop("provenance", None)
    return history, split_report


def render(
    cfg: Config,
    figures: dict,
    history: pd.DataFrame | None,
    split_report: dict,
    gallery: Gallery,
    found: Evaluated,
    explorer: str,
) -> str:
    """The page. `figures`: as in metrics.json; `history`, `split_report`: see `read_background`, empty for a file
    of vectors; `found`: of `gallery`; `explorer`: where the run's explorer.html is, seen from the page."""
    shown = protocol.shown_of(list(found.per_query))
    store = tar_images.of_paths(cfg.paths)
    sheets = query_sheets.make(store, gallery, found.vectors, shown, found.per_query, cfg.global_.seed)
    tiles = [tile for rows in sheets.values() for row in rows for tile in row if tile.kind != "method"]
    first, *further = shown_recalls(figures["counts"]["gallery"])  # a phone shows the first two or three columns
    of_buildings = {*shown_recalls(figures["building_level"]["buildings"]), "median_rank"}
    return pages.render(
        _TEMPLATE,
        results=figures,
        subject=figures["subject"],
        shown=shown,
        metrics=[first, "map@r", *further, "median_rank"],
        building_metrics=[key for key in BUILDING_METRICS if key in of_buildings],
        titles=TITLES,
        explorer=explorer,
        share=share,
        min_cells=bootstrap.MIN_CELLS,
        recall_curve=evaluation_figures.recall_curve(figures["recall_curve"], figures["counts"]["gallery"]),
        breakdowns=[
            (classes, evaluation_figures.breakdown(classes, _XLABELS[name]))
            for name, classes in figures["breakdowns"].items()
        ],
        max_classes=evaluation_figures.MAX_CLASSES,
        histogram=evaluation_figures.histogram(figures["similarity_histograms"], shown),
        training_curves=None if history is None else evaluation_figures.training_curves(history),
        band_shares=None if history is None else evaluation_figures.band_shares(history),
        sheets=sheets,
        missing_pictures=sum(tile.picture is None for tile in tiles),
        num_pictures=len(tiles),
        raw_dir=cfg.paths.raw_dir,
        split_report=flat(split_report),
        settings={**figures["subject"].get("config", {}), **figures["provenance"]["config"]},
    )


def table(figures: dict) -> str:
    """The figures that matter as plain text, in percent, with their 95 % intervals."""
    counts = figures["counts"]
    lines = [
        f"{counts['queries']:,} queries of {counts['buildings']:,} buildings in {counts['cells']:,} cells, "
        f"{counts['gallery']:,} images in the gallery ({figures['gallery']}), "
        f"ignore zone {figures['ignore_radius_m']:g} m",
    ]
    if without := counts.get("buildings_without_position"):
        lines.append(f"{without:,} of the buildings have no position: each is a cell of its own, without a zone")
    if counts["queries_without_match"]:
        lines.append(f"{counts['queries_without_match']:,} more queries have no match and are excluded")
    lines += _columns({TITLES[key]: (figures, key) for key in MAIN_METRICS})
    level = figures["building_level"]
    lines.append(
        f"{level['buildings']:,} buildings, each the mean of its images, searched by an image or by half of them:"
    )
    lines += _columns({title: (level[search], key) for title, search, key in _BUILDING_COLUMNS})
    if next(iter(figures["methods"].values()))["map@r"]["low"] is None:
        lines.append(f"no intervals: the queries are in fewer than {bootstrap.MIN_CELLS} evenly filled cells")
    return "\n".join(lines)


def _columns(columns: dict[str, tuple[dict, str]]) -> list[str]:
    """A heading and a line for each method and difference; a column by its title: {"methods", "differences"}, and
    the metric that is taken of each."""
    tree, _ = next(iter(columns.values()))
    rows = [("methods", method, method, "") for method in tree["methods"]]
    rows += [("differences", pair, pair.replace("-", " - ", 1), "+") for pair in tree["differences"]]
    width = 1 + max(len(title) for *_, title, _ in rows)
    lines = [f"{'%':<{width}}" + "".join(f"{title:<22}" for title in columns)]
    for part, name, title, sign in rows:
        cells = [percent(of_column[part][name][key], sign) for of_column, key in columns.values()]
        lines.append(f"{title:<{width}}" + "".join(f"{cell:<22}" for cell in cells))
    return [line.rstrip() for line in lines]
