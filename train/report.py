"""report.html: one self-contained page of an evaluation, for people."""

import json
from pathlib import Path

import jinja2
import torch

from common import parquet
from common.config import Config
from common.errors import PipelineError
from train import figures, protocol, sheets
from train.gallery import Gallery
from train.metrics import RECALL_AT, PerQuery

_TEMPLATE = "report.html"
TITLES = {
    **{f"recall@{k}": f"Recall@{k}" for k in RECALL_AT},
    "map@r": "mAP@R",
}
_PRINTED = ("recall@1", "recall@5", "map@r")
_XLABELS = {
    "heading_difference_deg": "angle between headings, degrees",
    "camera_distance_m": "camera to target, metres (the farther camera)",
}


def render(
    cfg: Config,
    found: dict,
    checkpoint: dict,
    gallery: Gallery,
    vectors: torch.Tensor,
    per_query: dict[str, PerQuery],
) -> str:
    """The page. `found`: what metrics.json says; `vectors`: of the trained head; see `protocol.evaluate`."""
    history_path = cfg.paths.checkpoints_dir / cfg.training.run / "history.parquet"
    split_path = cfg.paths.merged_dir / "split_report.json"
    history = parquet.read(history_path).to_pandas() if history_path.exists() else None
    pictures = sheets.make(cfg.paths.raw_dir, gallery, vectors, per_query, cfg.global_.seed)
    tiles = [tile for sheet in pictures.values() for row in sheet for tile in row]
    asked = per_query["raw"].has_match
    page = _environment().get_template(_TEMPLATE)
    return page.render(
        found=found,
        run=cfg.training.run,
        model=checkpoint["embedding_model"],
        epoch=checkpoint["epoch"],
        metrics=TITLES,
        recall_curve=figures.recall_curve({m: per_query[m].best_rank[asked] for m in protocol.METHODS}),
        breakdowns=[(b, figures.breakdown(b, _XLABELS[name])) for name, b in found["breakdowns"].items()],
        histogram=figures.histogram(found["similarity_histograms"]),
        training_curves=None if history is None else figures.training_curves(history),
        band_shares=None if history is None else figures.band_shares(history),
        sheets=pictures,
        missing_pictures=sum(tile.picture is None for tile in tiles),
        num_pictures=len(tiles),
        raw_dir=cfg.paths.raw_dir,
        split_report=flat(_read_json(split_path)) if split_path.exists() else {},
        settings={**checkpoint["config"], **found["provenance"]["config"]},
    )


def flat(tree: dict, prefix: str = "") -> dict:
    """{"dropped.duplicates": 3} from {"dropped": {"duplicates": 3}}."""
    rows = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}): delete it and run its stage again") from None


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": share}
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
    lines.append(f"{'%':<20}" + "".join(f"{TITLES[key]:<22}" for key in _PRINTED).rstrip())
    for method, found in figures["methods"].items():
        lines.append(f"{method:<20}" + "".join(f"{percent(found[key]):<22}" for key in _PRINTED).rstrip())
    for pair, found in figures["differences"].items():
        name = " - ".join(pair.split("-"))
        lines.append(f"{name:<20}" + "".join(f"{percent(found[key], '+'):<22}" for key in _PRINTED).rstrip())
    if figures["methods"]["raw"]["map@r"]["low"] is None:
        lines.append("no intervals: the queries lie in fewer than 20 cells of the map")
    return "\n".join(lines)


def percent(figure: dict, sign: str = "") -> str:
    """ "48.3 [45.1, 51.2]", or "48.3" where there is no interval."""
    value = share(figure["value"], sign)
    if figure["low"] is None:
        return value
    return f"{value} [{share(figure['low'], sign)}, {share(figure['high'], sign)}]"


def share(value: float, sign: str = "") -> str:
    """A share in percent, to a tenth; `sign` "+" shows it, and there is no -0.0."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"
