"""report.html: one self-contained page of an evaluation, for people."""

import json
from pathlib import Path

import pandas as pd
import torch

from common import files, pages, parquet
from common.errors import PipelineError
from common.imagery import tar_images
from common.sections import Config
from train import run_record
from train.evaluation import bootstrap, protocol
from train.evaluation.gallery import Gallery
from train.evaluation.metric_names import MAIN_METRICS, RECALL_AT, TITLES
from train.evaluation.metrics import PerQuery
from train.evaluation.metrics_json import flat, percent, share
from train.report import evaluation_figures, query_sheets

_TEMPLATE = Path(__file__).with_name("report.html")
# a phone shows the first two or three columns
_COLUMNS = ("recall@1", "map@r", *(f"recall@{k}" for k in RECALL_AT[1:]))
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
    vectors: torch.Tensor,
    per_query: dict[str, PerQuery],
) -> str:
    """The page. `figures`: as in metrics.json; `history`, `split_report`: see `read_background`, empty for a file
    of vectors; `vectors`: of the method shown, see `protocol.evaluate`."""
    shown = protocol.shown_of(list(per_query))
    sheets = query_sheets.make(
        tar_images.of_paths(cfg.paths), gallery, vectors, per_query[shown], per_query["raw"], cfg.global_.seed
    )
    tiles = [tile for rows in sheets.values() for row in rows for tile in row]
    return pages.render(
        _TEMPLATE,
        results=figures,
        subject=figures["subject"],
        shown=shown,
        metrics={key: TITLES[key] for key in _COLUMNS},
        share=share,
        min_cells=bootstrap.MIN_CELLS,
        recall_curve=evaluation_figures.recall_curve(figures["recall_curve"]),
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
    rows = [(method, "", metrics) for method, metrics in figures["methods"].items()]
    rows += [(pair.replace("-", " - ", 1), "+", metrics) for pair, metrics in figures["differences"].items()]
    width = 1 + max(len(name) for name, _, _ in rows)
    lines.append(f"{'%':<{width}}" + "".join(f"{TITLES[key]:<22}" for key in MAIN_METRICS).rstrip())
    for name, sign, metrics in rows:
        columns = "".join(f"{percent(metrics[key], sign):<22}" for key in MAIN_METRICS)
        lines.append(f"{name:<{width}}{columns.rstrip()}")
    if next(iter(figures["methods"].values()))["map@r"]["low"] is None:
        lines.append(f"no intervals: the queries are in fewer than {bootstrap.MIN_CELLS} evenly filled cells")
    return "\n".join(lines)
