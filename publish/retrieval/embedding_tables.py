"""Parquet files with a column `embedding`, of the pipeline or of any program: unit vectors, and who made them."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact

log = logging.getLogger("pipeline")
EMBEDDING = "embedding"
UNUSABLE = "missing, zero or not finite"  # a vector without a direction
UNKNOWN = "unknown"  # the model of vectors whose files do not say which it was
BATCH_ROWS = 65_536  # read at a time


@dataclass(frozen=True)
class EmbeddingTables:
    """Parquet files of vectors by one model, with the same other columns."""

    paths: list[Path]
    num_rows: int
    dim: int
    model: str  # digest of the weights, as generate_embeddings_from_parquet.py records it; or UNKNOWN
    schema: pa.Schema  # of the other columns
    by: str | None  # of a table by aggregate_buildings.py: the images' column that named the buildings

    @property
    def inputs(self) -> dict[str, str]:
        """File name -> identity, for a record."""
        return identities(self.paths)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str], pa.Table]]:
        """Vectors (n, D) float16 of length 1, BATCH_ROWS at a time; which rows have one, (n,) bool, those of the
        others are 0; "<file>:<row>" of the latter; the other columns.

        Raises PipelineError, naming the row, if a vector has another dimension.
        """
        for path in self.paths:
            start = 0
            for table in parquet.batches(path, [*self.schema.names, EMBEDDING], BATCH_ROWS):
                units, usable = unit_vectors(path, table, start, self.dim)
                lacking = [f"{path.stem}:{start + row}" for row in np.flatnonzero(~usable)]
                yield units.astype(np.float16), usable, lacking, table.drop_columns(EMBEDDING).cast(self.schema)
                start += len(table)

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """The vectors (N, D) float16 in memory, and which rows have one, (N,) bool."""
        vectors, usable = np.empty((self.num_rows, self.dim), np.float16), np.empty(self.num_rows, bool)
        start = 0
        for batch, has_one, *_ in self.batches():
            rows = slice(start, start + len(batch))
            vectors[rows], usable[rows] = batch, has_one
            start += len(batch)
        return vectors, usable


def unit_vectors(path: Path, batch: pa.Table, start: int, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(the embeddings scaled to length 1, (n, D) float32; (n,) whether there is one with a direction).

    `start`: number of the first row, for messages. Raises PipelineError for lists of another length.
    """
    present = batch[EMBEDDING].is_valid().to_numpy()
    lists = batch if present.all() else batch.filter(pa.array(present))
    numbers = start + np.flatnonzero(present)
    matrix = parquet.unchecked_matrix(
        path, lists, EMBEDDING, lambda row: f"row {numbers[row]:,}", dim, "the rows before it have"
    )
    matrix = matrix.astype(np.float64)  # squares of small float16 and float32 values vanish otherwise
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    units = np.zeros((len(batch), matrix.shape[1]), np.float32)
    units[present] = np.divide(matrix, lengths, out=np.zeros_like(matrix), where=usable)
    present[present] = usable[:, 0]
    return units, present


def paths_at(source: Path) -> list[Path]:
    """The Parquet files with a column `embedding` at `source`, a file or a folder; empty if there are none. Raises
    PipelineError if some files of a folder have it, and others do not."""
    if source.is_dir():
        paths = sorted(source.glob("*.parquet"))
    else:
        paths = [source] if source.suffix == ".parquet" and source.is_file() else []
    lacking = [path for path in paths if EMBEDDING not in parquet.open_file(path).schema_arrow.names]
    if lacking and len(lacking) < len(paths):
        raise PipelineError(f"{lacking[0]} has no column {EMBEDDING}, unlike others of its folder: move it away")
    return [] if lacking else paths


def warn_of_missing_splits(vectors_dir: Path, merged_dir: Path) -> None:
    """Warn if splits of the merged tables have no vectors in the run's folder: their making was interrupted."""
    splits = [split for split in schemas.SPLITS if (merged_dir / f"{split}.parquet").exists()]
    missing = [split for split in splits if not any(vectors_dir.glob(f"{split}-*.parquet"))]
    if missing:
        remedy = "run publish/generate_embeddings_from_parquet.py"
        log.warning("%s: the vectors of %s are missing: %s", vectors_dir, " and ".join(missing), remedy)


def tables_at(source: Path) -> EmbeddingTables:
    """The vectors at `source`. Raises PipelineError if there are none, or if the files differ in their columns;
    StaleArtefact if two models made them."""
    paths = paths_at(source)
    if not paths:
        raise PipelineError(
            f"{source} holds no Parquet file with a column {EMBEDDING}\n"
            "make vectors with publish/generate_embeddings_from_parquet.py, or of images with ..._from_hf.py"
        )
    columns = {path: _other_columns(path) for path in paths}
    first = paths[0]
    if not len(columns[first]):
        raise PipelineError(f"{first} has no column beside {EMBEDDING}: nothing would say what a vector is of")
    for path in paths:
        if not columns[path].equals(columns[first]):
            raise PipelineError(f"{path} has other columns than {first}: keep them in folders of their own")
    model, num_rows = model_of(paths), sum(map(parquet.num_rows, paths))
    if not num_rows:
        raise PipelineError(f"{source} holds no vectors: its tables are empty")
    return EmbeddingTables(paths, num_rows, _dim_of(paths), model, columns[first], _by(first))


def _by(path: Path) -> str | None:
    return parquet.read_provenance(path).config.get("by") if parquet.has_provenance(path) else None


def _other_columns(path: Path) -> pa.Schema:
    schema = parquet.open_file(path).schema_arrow
    return pa.schema([pa.field(field.name, field.type) for field in schema if field.name != EMBEDDING])


def model_of(paths: list[Path]) -> str:
    """What identifies the model of all files: the digest of a published model's weights, a digest of what is
    recorded of a backbone, or UNKNOWN. Raises StaleArtefact if two of them differ."""
    models = [_model_of(path) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if model != models[0]:
            raise StaleArtefact(
                f"{path} has vectors by another model ({model[:8]}) than {paths[0]} ({models[0][:8]})\n"
                "make all of them with one model, or name a folder of its vectors alone"
            )
    return models[0]


def _model_of(path: Path) -> str:
    if not parquet.has_provenance(path):
        return UNKNOWN
    record = parquet.read_provenance(path)
    if "model.weights" in record.config:
        return record.config["model.weights"]
    backbone = provenance.embedding_model(record)
    return provenance.digest_of(json.dumps(backbone, sort_keys=True)) if backbone else UNKNOWN


def identities(paths: list[Path]) -> dict[str, str]:
    """File name -> identity, for a record."""
    return {path.name: _identity(path) for path in paths}


def _dim_of(paths: list[Path]) -> int:
    """The dimension of the first vector. Raises PipelineError if there is none."""
    for path in paths:
        for table in parquet.batches(path, [EMBEDDING], BATCH_ROWS):
            if dim := unit_vectors(path, table, 0, None)[0].shape[1]:
                return dim
    raise PipelineError(f"{paths[0].parent} holds no vectors: {EMBEDDING} is empty in all rows")


def _identity(path: Path) -> str:
    return parquet.read_provenance(path).id if parquet.has_provenance(path) else provenance.identity(path)
