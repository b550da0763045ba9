"""metrics.json: its schema, reading and writing it, and what two of them say of one another."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.errors import PipelineError
from common.provenance import Provenance

FORMAT = 1  # raised when keys of metrics.json change their names or meanings
METRICS = ("recall@1", "recall@5", "recall@10", "recall@100", "recall@1000", "map@r", "median_rank")
_CHECKED = ("recall@1", "recall@5", "map@r")
TOLERANCE = 0.001  # a tenth of a percentage point: what another machine's rounding does not reach
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Figure(_Strict):
    """A figure with its 95 % interval; `low` and `high` are null where there are too few cells for one."""

    value: float
    low: float | None
    high: float | None


class Class(_Strict):
    """One class of a breakdown; without figures where no query has a match of it."""

    label: str = Field(alias="class")
    queries: Count
    matches: Count
    cells: Count
    methods: dict[str, dict[Literal["recall@1", "recall@5", "map@r"], Figure]]


class BreakdownFigures(_Strict):
    meaning: str
    classes: list[Class]


class Histograms(_Strict):
    """Pairs by cosine: edges of the bins, and how many pairs lie in each."""

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
    cells: Count
    matches: Count


class Proof(_Strict):
    """How many were compared, by split, and how many stand in two of them."""

    test: Count
    train: Count
    val: Count
    in_two_splits: Literal[0]


class Results(_Strict):
    """All of metrics.json."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    subject: dict[str, Any]  # what was evaluated: the run and its backbone, or a file
    methods: dict[str, dict[str, Figure]]  # method -> METRICS
    told: dict[str, str]  # method -> what it is
    differences: dict[str, dict[str, Figure]]  # "trained-raw" -> METRICS, paired
    recall_curve: RecallCurve
    breakdowns: dict[
        Literal["heading_difference_deg", "camera_distance_m", "target_height_m", "views", "dataset"],
        BreakdownFigures,
    ]
    similarity_histograms: Histograms
    ignore_radius_m: float
    gallery: Literal["test", "all", "file"]
    counts: Counts
    leakage: dict[Literal["buildings", "panoramas"], Proof] | None  # null where there are no splits
    provenance: dict[str, Any]  # see common/provenance.py

    @field_validator("methods", "differences")
    @classmethod
    def _complete(cls, found: dict) -> dict:
        for name, figures in found.items():
            if tuple(figures) != METRICS:
                raise ValueError(f"{name} must have the figures {', '.join(METRICS)}")
        return found

    @field_validator("provenance")
    @classmethod
    def _is_record(cls, found: dict) -> dict:
        try:
            Provenance(**found)
        except TypeError as error:
            raise ValueError(f"is no record of this version: {error}") from None
        return found


def to_json(found: dict) -> str:
    """The text of metrics.json; `found` fits the schema."""
    Results.model_validate(found)
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def read(path: Path) -> dict:
    """metrics.json as a dict. Raises PipelineError if it is absent, damaged or of another form."""
    try:
        found = json.loads(path.read_text())
        Results.model_validate(found)
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: run train/evaluate.py first") from None
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise PipelineError(
            f"{path} is not a metrics.json of this version ({where}: {first['msg']})\n"
            "evaluate again with --overwrite"
        ) from None
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}): delete it and evaluate again") from None
    return found


def check(first: Path, second: Path) -> tuple[str, bool]:
    """What two metrics.json say of one another, as text, and whether all figures that both have are alike."""
    one, other = read(first), read(second)
    lines = []
    for a, b in (
        (flat(one["subject"]), flat(other["subject"])),
        *((one["provenance"][what], other["provenance"][what]) for what in ("config", "inputs")),
    ):
        lines += [f"{key}: {a.get(key)}, {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    lines.append(f"{'%, first, second':<22}" + "".join(f"{key:<24}" for key in _CHECKED))
    for method in [name for name in one["methods"] if name in other["methods"]]:
        pairs = [[100 * found["methods"][method][key]["value"] for found in (one, other)] for key in _CHECKED]
        lines.append(f"{method:<22}" + "".join(f"{f'{a:.1f}, {b:.1f} ({b - a:+.2f})':<24}" for a, b in pairs))
    leaves = [flat(_comparable(found)) for found in (one, other)]
    shared = [key for key in leaves[0] if key in leaves[1]]
    different = [key for key in shared if not _alike(leaves[0][key], leaves[1][key])]
    lines.append(f"{len(different):,} of {len(shared):,} figures that both have differ")
    lines += [f"  {key}: {leaves[0][key]}, {leaves[1][key]}" for key in different[:5]]
    for path, found, without in ((first, leaves[0], leaves[1]), (second, leaves[1], leaves[0])):
        only = [key for key in found if key not in without]
        if only:
            lines.append(f"only in {path}: {len(only):,} figures, the first is {only[0]}")
    return "\n".join(line.rstrip() for line in lines), not different


def _comparable(found: dict) -> dict:
    """The figures alone; histograms as cumulative shares, which move little where a pair changes its bin."""
    histograms = dict(found["similarity_histograms"])
    for name in ("matches", "non_matches"):
        total = max(1, sum(histograms[name]))
        histograms[name] = [count / total for count in itertools.accumulate(histograms[name])]
    figures = {key: of_key for key, of_key in found.items() if key not in ("subject", "told", "provenance")}
    return {**figures, "similarity_histograms": histograms}


def _alike(a, b) -> bool:
    """Whether two leaves are equal, or, where both are no whole numbers, about equal."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < TOLERANCE * max(1.0, abs(a), abs(b))
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
