"""What an evaluation ranks: rows of merged/test plus, as distractors, of train and val; and what it refuses.

Memory: G rows x D x 2 bytes for the embeddings and about 150 bytes a row for the other columns.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from common import errors, parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact
from common.places import zones
from common.provenance import Provenance
from common.sections import Config
from train import run_record

TEST_FIRST = ("test", "train", "val")
COLUMNS = (
    "building_id streetview_image_id dataset_id target_id street_view_id target_lat target_lon camera_lat "
    "camera_lon heading pitch distance cell_id tar_file image_offset image_size"
).split()
_SCHEMA = schemas.merged(1)
_MAY_BE_UNKNOWN = ("target_lat", "target_lon", "camera_lat", "camera_lon", "heading", "pitch", "distance")


@dataclass(frozen=True)
class Gallery:
    """G rows, of which the first `num_queries`, those of test, are also queries."""

    num_queries: int
    table: pa.Table  # COLUMNS
    embeddings: np.ndarray  # (G, D), raw, float16 (float32 where a file has more digits)
    zones: zones.Zones  # buildings are numbered over all rows: an id is in one split only

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


def files_of(cfg: Config) -> list[Path]:
    """The splits that evaluation.gallery asks for, test first."""
    names = TEST_FIRST if cfg.evaluation.gallery == "all" else TEST_FIRST[:1]
    return [cfg.paths.merged_dir / f"{name}.parquet" for name in names]


def load(paths: list[Path], ignore_radius_m: float) -> Gallery:
    """The rows of these files, the queries' first. Raises PipelineError if a column is missing or has the wrong
    type, a value is not finite, or a building's rows are not contiguous."""
    sizes = [parquet.num_rows(path) for path in paths]
    if not sizes[0]:
        raise PipelineError(f"{paths[0]} has no rows: nothing to evaluate")
    tables, start, embeddings = [], 0, np.empty(0)
    for batch, vectors in batches(paths, COLUMNS):
        if not start:
            embeddings = np.empty((sum(sizes), vectors.shape[1]), vectors.dtype)
        embeddings[start : start + len(vectors)] = vectors
        tables.append(batch)
        start += len(vectors)
    table = pa.concat_tables(tables)
    buildings = zones.number_buildings(table["dataset_id"].to_numpy(), table["target_id"].to_numpy())
    firsts = np.flatnonzero(np.diff(buildings, prepend=-1))
    again = table.select(["dataset_id", "target_id"]).take(firsts).to_pandas().duplicated().to_numpy()
    if again.any():
        building = table["building_id"][int(firsts[again.argmax()])]
        raise PipelineError(
            f"{paths[0]}: the rows of building {building} are not contiguous\n"
            "sort the file by dataset_id and target_id"
        )
    lat, lon = table["target_lat"].to_numpy(), table["target_lon"].to_numpy()
    return Gallery(sizes[0], table, embeddings, zones.make_zones(buildings, lat, lon, ignore_radius_m))


def refuse_missing_columns(path: Path, columns: list[str] = COLUMNS) -> None:
    """Raise PipelineError unless the file exists and has these columns and an embedding."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist or is not a file")
    with parquet.open_file(path) as file:
        missing = sorted({*columns, "embedding"} - set(file.schema_arrow.names))
    if missing:
        raise PipelineError(
            f"{path} has no column {', '.join(missing)}\n"
            "--embeddings needs the columns of merged/test.parquet, --compare streetview_image_id and embedding"
        )


def batches(paths: list[Path], columns: list[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The columns and the embeddings (n, D), all of one dimension, a batch of rows at a time; errors as `load`."""
    dim = None
    for path in paths:
        for batch in parquet.batches(path, [*columns, "embedding"]):
            images = batch["streetview_image_id"]
            name = lambda row, images=images: f"image {images[row]}"  # noqa: E731
            vectors = parquet.embedding_matrix(path, batch, "embedding", name, dim)
            parquet.refuse_zeros(path, "embedding", vectors, name)
            dim = vectors.shape[1]
            yield pa.table({name: _cast(path, name, batch[name]) for name in columns}), vectors


def _cast(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in its type in merged/test.parquet. Other programs write, for instance, ids as floats, and NaN (not
    known, of an imported photograph) as empty values."""
    if name in _MAY_BE_UNKNOWN and pa.types.is_floating(column.type):
        column = pc.fill_null(column, float("nan"))
        most = {"target_lat": 90, "camera_lat": 90, "target_lon": 360, "camera_lon": 360}.get(name, np.inf)
        if (beyond := np.abs(column.to_numpy()) > most).any():
            raise PipelineError(f"{path}: column {name} holds {column[int(beyond.argmax())]}, in place of degrees")
        if not np.isinf(column.to_numpy()).any():
            return column.cast(_SCHEMA.field(name).type)
    if column.null_count or (pa.types.is_floating(column.type) and not np.isfinite(column.to_numpy()).all()):
        raise PipelineError(f"{path}: column {name} has empty or non-finite values")
    kind = _SCHEMA.field(name).type
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = errors.first_line(error)
        raise PipelineError(f"{path}: column {name} is {column.type}, not {kind} ({reason})") from None


def refuse_foreign_head(cfg: Config, path: Path, checkpoint: dict, records: dict[Path, Provenance]) -> None:
    """Raise StaleArtefact, naming both sides, unless the head at `path` was trained on this merge (of another one
    it may have seen the test images) and on embeddings of the same model. `records`: of the splits, test first."""
    (test, of_test), *training_splits = records.items()
    for split, record in training_splits:
        if checkpoint["provenance"]["inputs"].get(split.name) != record.id:
            again = errors.command("train/train.py", *_settings_of(cfg, path, checkpoint), "--remake")
            raise StaleArtefact(
                f"{path} was trained on an earlier version of {split}\nrepeat the run that made it: {again}"
            )
    ours, theirs = provenance.embedding_model(of_test), provenance.with_views(checkpoint["embedding_model"])
    if ours != theirs:
        raise StaleArtefact(
            f"{path} was trained on embeddings of {_model_name(theirs)}\n"
            f"{test} holds embeddings of {_model_name(ours)}"
        )


def _settings_of(cfg: Config, path: Path, checkpoint: dict) -> list[str]:
    """The flags that make of `cfg` the settings of the run whose checkpoint or published folder is at `path`."""
    run, now = (path if path.is_dir() else path.parent).name, run_record.recorded(cfg)
    then = checkpoint.get("config", {})  # a published model has none
    changed = {key: json.dumps(then[key]) for key in now if key in then and then[key] != now[key]}
    changed |= {"training.run": run} if run != cfg.training.run else {}
    return [word for key, value in changed.items() for word in ("--set", f"{key}={value}")]


def _model_name(model: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted((model or {"model": "unknown"}).items()))


def refuse_leaks(merged_dir: Path) -> dict[str, dict[str, int]]:
    """Raise PipelineError, naming one, if a building or a panorama is in two splits. Else the proof: the number of
    buildings and panoramas compared, by split."""
    columns = ["dataset_id", "target_id", "street_view_id"]
    rows = {split: parquet.read(merged_dir / f"{split}.parquet", columns).to_pandas() for split in TEST_FIRST}
    proof = {}
    for what, column in (("building", "target_id"), ("panorama", "street_view_id")):
        ids = {split: frame[["dataset_id", column]].drop_duplicates() for split, frame in rows.items()}
        for one, other in combinations(TEST_FIRST, 2):
            shared = pd.merge(ids[one], ids[other])
            if len(shared):
                dataset, number = shared.iloc[0]
                raise PipelineError(
                    f"{what} {dataset:04d}_{number} is in both {one}.parquet and {other}.parquet of {merged_dir} "
                    f"(and {len(shared) - 1:,} more are): metrics would be inflated\n"
                    f"merge again: {errors.command('preprocess/merge_and_split.py', '--overwrite')}"
                )
        proof[f"{what}s"] = {**{split: len(frame) for split, frame in ids.items()}, "in_two_splits": 0}
    return proof
