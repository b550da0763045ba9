"""report.html: one self-contained page of an evaluation, for people."""

import json
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd
import torch

from common import files, parquet
from common.errors import PipelineError
from common.imagery import tar_images
from common.sections import Config
from train.evaluation import bootstrap, protocol
from train.evaluation.gallery import Gallery
from train.evaluation.metric_names import MAIN_METRICS, RECALL_AT, TITLES
from train.evaluation.metrics import PerQuery
from train.evaluation.metrics_json import flat
from train.report import evaluation_figures, query_sheets

_TEMPLATE = "report.html"
# a phone shows the first two or three columns
_COLUMNS = ("recall@1", "map@r", *(f"recall@{k}" for k in RECALL_AT[1:]))
_XLABELS = {
    "heading_difference_deg": "angle between headings, degrees",
    "camera_distance_m": "horizontal distance to the target, metres (the farther camera)",
    "target_height_m": "target above the camera, metres",
    "views": "images of the building",
    "dataset": "dataset (city)",
}


class Background(NamedTuple):
    """What the page tells of a run besides its figures; nothing, of a file of vectors."""

    history: pd.DataFrame | None
    split_report: dict


def read_background(cfg: Config) -> Background:
    """That of the config's run, as far as it is there. Raises PipelineError where a file is damaged."""
    history_path = cfg.paths.checkpoints_dir / cfg.training.run / "history.parquet"
    split_path = files.beside(cfg.paths.merged_dir, "report") / "split_report.json"
    history = parquet.read(history_path).to_pandas() if history_path.exists() else None
    try:
        split_report = json.loads(split_path.read_text()) if split_path.exists() else {}
    except ValueError as error:
        raise PipelineError(
            f"{split_path} is damaged ({error}): delete it, the report does without, or merge again"
        ) from None
    return Background(history, {key: value for key, value in split_report.items() if key != "provenance"})


def render(
    cfg: Config,
    found: dict,
    background: Background,
    gallery: Gallery,
    vectors: torch.Tensor,
    per_query: dict[str, PerQuery],
) -> str:
    """The page. `found`: what metrics.json says; `vectors`: of the method shown; see `protocol.evaluate`."""
    shown = protocol.shown_of(list(per_query))
    history, split_report = background
    pictures = query_sheets.make(
        tar_images.of_paths(cfg.paths), gallery, vectors, per_query[shown], per_query["raw"], cfg.global_.seed
    )
    tiles = [tile for sheet in pictures.values() for row in sheet for tile in row]
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            found=found,
            subject=found["subject"],
            shown=shown,
            metrics={key: TITLES[key] for key in _COLUMNS},
            min_cells=bootstrap.MIN_CELLS,
            recall_curve=evaluation_figures.recall_curve(found["recall_curve"]),
            breakdowns=[
                (b, evaluation_figures.breakdown(b, _XLABELS[name])) for name, b in found["breakdowns"].items()
            ],
            max_classes=evaluation_figures.MAX_CLASSES,
            histogram=evaluation_figures.histogram(found["similarity_histograms"], shown),
            training_curves=None if history is None else evaluation_figures.training_curves(history),
            band_shares=None if history is None else evaluation_figures.band_shares(history),
            sheets=pictures,
            missing_pictures=sum(tile.picture is None for tile in tiles),
            num_pictures=len(tiles),
            raw_dir=cfg.paths.raw_dir,
            split_report=flat(split_report),
            settings={**found["subject"].get("config", {}), **found["provenance"]["config"]},
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, has_intervals=has_intervals)
    return environment


def number(value) -> str:
    """Counts with thousands separators, everything else as it is."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(figures: dict) -> str:
    """The figures that matter as plain text, in percent, with their 95 % intervals."""
    counts = figures["counts"]
    lines = [
        f"{counts['queries']:,} queries of {counts['buildings']:,} buildings in {counts['cells']:,} cells, "
        f"{counts['gallery']:,} images in the gallery ({figures['gallery']}), "
        f"ignore zone {figures['ignore_radius_m']:g} m",
    ]
    if counts["queries_without_match"]:
        lines.append(f"{counts['queries_without_match']:,} more queries have no match and are left out")
    names = [*figures["methods"], *(f"{pair}  " for pair in figures["differences"])]  # with " - " in place of "-"
    width = 1 + max(map(len, names))
    lines.append(f"{'%':<{width}}" + "".join(f"{TITLES[key]:<22}" for key in MAIN_METRICS).rstrip())
    for method, found in figures["methods"].items():
        lines.append(f"{method:<{width}}" + "".join(f"{percent(found[key]):<22}" for key in MAIN_METRICS).rstrip())
    for pair, found in figures["differences"].items():
        name = " - ".join(pair.split("-", 1))
        lines.append(
            f"{name:<{width}}" + "".join(f"{percent(found[key], '+'):<22}" for key in MAIN_METRICS).rstrip()
        )
    if not has_intervals(figures):
        lines.append(f"no intervals: the queries lie in fewer than {bootstrap.MIN_CELLS} evenly filled cells")
    return "\n".join(lines)


def has_intervals(figures: dict) -> bool:
    return next(iter(figures["methods"].values()))["map@r"]["low"] is not None


def percent(figure: dict, sign: str = "") -> str:
    """ "48.3 [45.1, 51.2]", or "48.3" where there is no interval."""
    value = share(figure["value"], sign)
    if figure["low"] is None:
        return value
    return f"{value} [{share(figure['low'], sign)}, {share(figure['high'], sign)}]"


def share(value: float, sign: str = "") -> str:
    """A share in percent, to a tenth; `sign` "+" shows it, and there is no -0.0."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"
