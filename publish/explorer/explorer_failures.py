"""Queries whose first result is wrong, and classes to filter them by.

Of the methods in queries.parquet the page compares two: the raw backbone and the trained head.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from common import parquet, stages
from common.errors import PipelineError, StaleArtefact, command
from publish.retrieval.embedding_tables import UNKNOWN
from train import run_record
from train.evaluation.breakdowns import CAMERA_M, HEADING_DEG, heading_difference_deg

METHODS = ("raw", "trained")
MAX_FAILURES = 2_000  # in the page
_QUERY = ["streetview_image_id", "building_id", "dataset_id", "heading", "distance"]
_PER_METHOD = ("rank", "match", "match_cosine", "wrong", "wrong_cosine")


def read(path: Path) -> pa.Table | None:
    """The queries that have a match, with the columns that the page needs; None if there is no file."""
    if not path.exists():
        return None
    known = set(parquet.open_file(path).schema_arrow.names)
    compared = [method for method in METHODS if f"rank_{method}" in known]
    table = parquet.read(path, [*_QUERY, *(f"{name}_{method}" for method in compared for name in _PER_METHOD)])
    return table.filter(pc.field(f"rank_{compared[0]}") > 0) if compared else None


def doubt_of_model(tables: list[Path], queries_path: Path, published_dir: Path) -> str:
    """Why it is not known whether one model made the tables of buildings and answered the queries; "" if it did.
    Raises StaleArtefact if two did. The published folder tells which weights are those of a checkpoint."""
    if not queries_path.exists():
        return ""
    checkpoint = parquet.read_provenance(queries_path).inputs.get(run_record.BEST)
    if not checkpoint:
        return f"{queries_path} names no checkpoint"
    try:
        published = stages.record_of(published_dir / "provenance.json")
    except (OSError, PipelineError):
        return f"{published_dir} holds no published model to compare with"
    for path in tables:
        known = parquet.read_provenance(path).config if parquet.has_provenance(path) else {}
        model = known.get("model.weights", UNKNOWN)
        if model == UNKNOWN:
            return f"{path} does not say which model made it"
        is_evaluated = published.inputs.get(run_record.BEST) == checkpoint
        if not is_evaluated and model != published.id:
            return f"neither {path} nor {queries_path} is of the model in {published_dir}"
        if not is_evaluated or model != published.id:
            raise StaleArtefact(
                "\n".join([f"{path} is of another model than {queries_path}", *_ways(is_evaluated)])
            )
    return ""


def _ways(is_evaluated: bool) -> list[str]:
    """What can be done about a table of another model than the queries, which are of the published one or not."""
    scripts = ["train/evaluate.py", "publish/convert_to_hf.py"] if not is_evaluated else []
    scripts += ["publish/generate_embeddings_from_parquet.py", "publish/aggregate_buildings.py"]
    return [
        f"to redo what is older: {' && '.join(command(script, '--remake') for script in scripts)}",
        f"to show the table without failures: {command('', '--set', 'paths.evaluation_dir=FOLDER')}",
    ]


def methods_of(queries: pa.Table | pd.DataFrame) -> list[str]:
    """The compared methods that were evaluated; the last one is the one judged."""
    columns = queries.columns if isinstance(queries, pd.DataFrame) else queries.column_names
    return [method for method in METHODS if f"rank_{method}" in columns]


def share_found(queries: pa.Table) -> pd.Series:
    """The share of each building's queries whose first result is right, by the name of the building."""
    first = pc.equal(queries[f"rank_{methods_of(queries)[-1]}"], 1).to_numpy()
    return pd.Series(first.astype(float)).groupby(queries["building_id"].to_numpy()).mean()


def listed(queries: pa.Table | None, tables: list[Path], seed: int) -> tuple[pd.DataFrame, int, int]:
    """The queries of buildings in these tables for which a method's first result is wrong; how many these are, and
    how many are of other buildings. If there are more than MAX_FAILURES, that many at random. First those whose
    wrong result is most similar, compared with the best match."""
    if queries is None:
        return pd.DataFrame({"streetview_image_id": [], "building_id": []}), 0, 0
    methods = methods_of(queries)
    is_wrong = np.any([queries[f"rank_{method}"].to_numpy() > 1 for method in methods], axis=0)
    names = pa.concat_tables(parquet.read(path, ["building"]) for path in tables)["building"]
    is_known = pc.is_in(queries["building_id"], names.cast(pa.string()).combine_chunks()).to_numpy()
    chosen = wrong = np.flatnonzero(is_wrong & is_known)
    if len(wrong) > MAX_FAILURES:
        chosen = np.random.default_rng(seed).choice(wrong, MAX_FAILURES, replace=False)
    rows = queries.take(np.sort(chosen)).to_pandas()
    margin = rows[f"wrong_cosine_{methods[-1]}"] - rows[f"match_cosine_{methods[-1]}"]
    return (
        rows.iloc[np.argsort(-margin.to_numpy(), kind="stable")].reset_index(drop=True),
        len(wrong),
        int((is_wrong & ~is_known).sum()),
    )


def image_ids(failures: pd.DataFrame) -> list[str]:
    """The images that the page shows of them: each failure's query, matches and wrong results, in turn."""
    columns = ["streetview_image_id"]
    columns += [f"{name}_{method}" for method in methods_of(failures) for name in ("match", "wrong")]
    return [one for one in pd.unique(failures[columns].to_numpy().ravel()) if one]


def classes(values: np.ndarray, edges: tuple[int, ...], unit: str) -> tuple[np.ndarray, list[str]]:
    """The class of each of n values, -1 for NaN, and the labels of the classes, which include their lower ends."""
    between = [f"{low} to {high}{unit}" for low, high in pairwise((0, *edges))]
    codes = np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="right"))
    return codes, [*between, f"{edges[-1]}{unit} or more"]


def content(failures: pd.DataFrame, total: int, images: dict[str, dict], names: list[str]) -> dict[str, Any]:
    """What the page shows of the failures. `images`: building_id and heading of images, by id, as far as known;
    `names`: of the buildings shown, whose rows the failures name (-1: not shown)."""
    if not len(failures):
        return {"failures": None}
    row_of, methods = {name: row for row, name in enumerate(names)}, methods_of(failures)

    def facts_of(columns: str, name: str) -> np.ndarray:
        return np.array([images.get(one, {}).get(name) for one in failures[columns]], object)

    def rows_of(columns: str) -> list[int]:
        return [row_of.get(name, -1) for name in facts_of(columns, "building_id")]

    matched_heading = facts_of(f"match_{methods[-1]}", "heading").astype(float)  # None becomes NaN
    angles = heading_difference_deg(failures["heading"].to_numpy(), matched_heading)
    angle, angle_classes = classes(angles, HEADING_DEG, "°")
    distance, distance_classes = classes(failures["distance"].to_numpy(float), CAMERA_M, " m")
    queries: dict[str, Any] = {
        "id": failures["streetview_image_id"],
        "building": [row_of.get(name, -1) for name in failures["building_id"]],
        "city": [f"{number:04d}" for number in failures["dataset_id"]],
        "angle": angle.tolist(),
        "distance": distance.tolist(),
    }
    for method in methods:
        queries |= {f"{name}_{method}": failures[f"{name}_{method}"].tolist() for name in _PER_METHOD}
        queries |= {f"{name}_building_{method}": rows_of(f"{name}_{method}") for name in ("match", "wrong")}
    table = pd.DataFrame(queries).round(4).astype(object)
    listed_queries = table.where(table.notna(), None).to_dict("records")
    return {
        "failures": {
            "total": total, "methods": methods, "queries": listed_queries,
            "angle_classes": angle_classes, "distance_classes": distance_classes,
        }
    }  # fmt: skip
