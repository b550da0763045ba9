"""metrics.json: its schema, how it is read and written, and how two of them differ."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, create_model

from common import errors, parquet
from common.errors import PipelineError
from common.provenance import Provenance, Redo
from train.evaluation.metric_names import BUILDING_METRICS, MAIN_METRICS, METRICS, TITLES

FORMAT = 3  # raised when keys of metrics.json change their names or meanings
TOLERANCE = 0.001  # a tenth of a percentage point: more than the rounding of another machine
Count = NonNegativeInt


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Figure(_Strict):
    """A figure with its 95 % interval; `low` and `high` are null where there are too few cells for one."""

    value: float
    low: float | None
    high: float | None


class Figures(create_model("", __base__=_Strict, **dict.fromkeys(METRICS, (Figure, ...)))):  # type: ignore[misc]
    """METRICS of a method."""


class MainFigures(create_model("", __base__=_Strict, **dict.fromkeys(MAIN_METRICS, (Figure, ...)))):  # type: ignore[misc]
    """MAIN_METRICS of a method in a class of matches."""


class BuildingFigures(create_model("", __base__=_Strict, **dict.fromkeys(BUILDING_METRICS, (Figure, ...)))):  # type: ignore[misc]
    """BUILDING_METRICS of a method."""


class BuildingSearch(_Strict):
    """A search for buildings by so many queries; see building_level.py."""

    queries: Count
    methods: dict[str, BuildingFigures]
    differences: dict[str, BuildingFigures]  # as in Results


class BuildingLevel(_Strict):
    buildings: Count  # in the gallery
    image_to_building: BuildingSearch
    half_to_half: BuildingSearch


class Class(_Strict):
    """One class of a breakdown; without methods where no query has a match of it."""

    label: str = Field(alias="class")
    queries: Count
    matches: Count
    cells: Count
    methods: dict[str, MainFigures]


class BreakdownFigures(_Strict):
    meaning: str
    classes: list[Class]


class Histograms(_Strict):
    """Numbers of pairs by cosine, and the edges of the bins."""

    edges: list[float]
    matches: list[Count]
    non_matches: list[Count]


class RecallCurve(_Strict):
    k: list[Count]
    methods: dict[str, list[float]]


class Counts(_Strict):
    queries: Count
    queries_without_match: Count
    gallery: Count
    buildings: Count
    buildings_without_position: Count = 0  # each a cell of its own, without an ignore zone
    cells: Count
    matches: Count


class Proof(_Strict):
    """How many were compared, by split, and how many are in two of them."""

    test: Count
    train: Count
    val: Count
    in_two_splits: Literal[0]


class Results(_Strict):
    """All of metrics.json."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    subject: dict[str, Any]  # what was evaluated: the run and its backbone, or a file
    methods: dict[str, Figures]
    descriptions: dict[str, str]  # of each method
    differences: dict[str, Figures]  # "trained-raw" and others, paired
    building_level: BuildingLevel
    recall_curve: RecallCurve
    breakdowns: dict[
        Literal["heading_difference_deg", "camera_distance_m", "target_height_m", "views", "dataset"],
        BreakdownFigures,
    ]
    similarity_histograms: Histograms
    ignore_radius_m: float
    gallery: Literal["test", "all", "file"]
    counts: Counts
    leakage: dict[Literal["buildings", "panoramas"], Proof] | None  # null for a file, which has no splits
    provenance: Provenance


def to_json(results: dict) -> str:
    """The text of metrics.json. Raises ValueError if `results` does not fit the schema."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    Results.model_validate_json(text)
    return text


def read(path: Path) -> dict:
    """metrics.json as a dict. Raises PipelineError if it is missing, damaged or of another version."""
    try:
        content = path.read_bytes()
        Results.model_validate_json(content)
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: run train/evaluate.py first") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "all of it"
        raise PipelineError(
            f"{path} is damaged or from another version ({where}: {problem['msg']})\n"
            f"evaluate again: {errors.command('train/evaluate.py', '--remake')}"
        ) from None
    return json.loads(content)


def kept(path: Path, record: Provenance, redo: Redo) -> dict | None:
    """An existing metrics.json that need not be made again; None if there is none. Raises StaleArtefact if it was
    made otherwise than `record` says, and PipelineError if it is damaged, unless `redo` allows to replace it."""
    if redo == "all" or not path.exists():
        return None
    try:
        results = read(path)
    except PipelineError:
        if redo:
            return None
        raise
    existing = Provenance.from_dict(results["provenance"])
    amount = f"{existing.rows.get('in', 0):,} queries"
    return results if parquet.matches(path, existing, record, redo, amount) else None


def check(first: Path, second: Path) -> tuple[str, bool]:
    """How two metrics.json differ, as text, and whether all figures in both are about equal."""
    one, other = read(first), read(second)
    a, b = (
        {**flat(file["subject"]), **file["provenance"]["config"], **file["provenance"]["inputs"]}
        for file in (one, other)
    )
    lines = [f"{key}: {a.get(key)}, {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    lines.append(f"{'%, first, second':<22}" + "".join(f"{TITLES[key]:<24}" for key in MAIN_METRICS))
    for method in [name for name in one["methods"] if name in other["methods"]]:
        pairs = [[100 * file["methods"][method][key]["value"] for file in (one, other)] for key in MAIN_METRICS]
        lines.append(f"{method:<22}" + "".join(f"{f'{x:.1f}, {y:.1f} ({y - x:+.2f})':<24}" for x, y in pairs))
    a, b = _figures(one), _figures(other)
    shared = [key for key in a if key in b]
    different = [key for key in shared if not _alike(a[key], b[key])]
    lines.append(f"{len(different):,} of {len(shared):,} figures in both files differ")
    lines += [f"  {key}: {a[key]}, {b[key]}" for key in different[:5]]
    for path, here, there in ((first, a, b), (second, b, a)):
        if only := [key for key in here if key not in there]:
            lines.append(f"only in {path}: {len(only):,} figures, the first is {only[0]}")
    return "\n".join(line.rstrip() for line in lines), not different


def _figures(results: dict) -> dict:
    """All figures by dotted key; histograms as cumulative shares, which barely change if a pair changes bins."""
    figures = {key: results[key] for key in results if key not in ("subject", "descriptions", "provenance")}
    histograms = dict(results["similarity_histograms"])
    for name in ("matches", "non_matches"):
        histograms[name] = (np.cumsum(histograms[name]) / max(1, sum(histograms[name]))).tolist()
    return flat({**figures, "similarity_histograms": histograms})


def _alike(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return a == b


def flat(tree: dict | list, prefix: str = "") -> dict:
    """{"dropped.duplicates": 3} from {"dropped": {"duplicates": 3}}; lists by position."""
    rows: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        nested = isinstance(value, (dict, list))
        rows |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return rows


def percent(figure: dict, sign: str = "") -> str:
    """ "48.3 [45.1, 51.2]", or "48.3" where there is no interval."""
    value = share(figure["value"], sign)
    if figure["low"] is None:
        return value
    return f"{value} [{share(figure['low'], sign)}, {share(figure['high'], sign)}]"


def share(value: float, sign: str = "") -> str:
    """A share in percent, to a tenth; `sign` "+" shows it, and there is no -0.0."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"
