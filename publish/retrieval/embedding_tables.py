"""Parquet files with a column `embedding`, of the pipeline or of any program: unit vectors, and who made them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, provenance
from common.errors import PipelineError, StaleArtefact

EMBEDDING = "embedding"
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

    def batches(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Vectors (n, D) float16 of length 1, and the other columns, BATCH_ROWS at a time.

        Raises PipelineError, naming the row, if a vector is missing, not finite, all 0, or of another dimension.
        """
        for path in self.paths:
            start = 0
            for table in parquet.batches(path, [*self.schema.names, EMBEDDING], BATCH_ROWS):
                name = lambda row: f"row {start + row:,}"  # noqa: B023,E731
                vectors = parquet.embedding_matrix(path, table, EMBEDDING, name, self.dim).astype(np.float32)
                lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
                if not lengths.all():
                    raise PipelineError(f"{path}: the {EMBEDDING} of {name(int(lengths.argmin()))} is all 0")
                yield (vectors / lengths).astype(np.float16), table.drop_columns(EMBEDDING).cast(self.schema)
                start += len(vectors)

    def matrix(self) -> np.ndarray:
        """All vectors in memory, (N, D) float16."""
        vectors = np.empty((self.num_rows, self.dim), np.float16)
        start = 0
        for batch, _ in self.batches():
            vectors[start : start + len(batch)] = batch
            start += len(batch)
        return vectors


def paths_at(source: Path) -> list[Path]:
    """The Parquet files with a column `embedding` at `source`, a file or a folder; empty if there are none."""
    if source.is_dir():
        paths = sorted(source.glob("*.parquet"))
    else:
        paths = [source] if source.suffix == ".parquet" and source.is_file() else []
    return [path for path in paths if EMBEDDING in parquet.open_file(path).schema_arrow.names]


def tables_at(source: Path) -> EmbeddingTables:
    """The vectors at `source`. Raises PipelineError if there are none, or if the files differ in their columns;
    StaleArtefact if two models made them."""
    paths = paths_at(source)
    if not paths:
        raise PipelineError(
            f"{source} holds no Parquet file with a column {EMBEDDING}\n"
            "make vectors with publish/generate_embeddings_from_parquet.py, or of images with ..._from_hf.py"
        )
    schemas = {path: _other_columns(path) for path in paths}
    first = paths[0]
    if not len(schemas[first]):
        raise PipelineError(f"{first} has no column beside {EMBEDDING}: nothing would say what a vector is of")
    for path in paths:
        if not schemas[path].equals(schemas[first]):
            raise PipelineError(f"{path} has other columns than {first}: keep them in folders of their own")
    model, num_rows = model_of(paths), sum(map(parquet.num_rows, paths))
    if not num_rows:
        raise PipelineError(f"{source} holds no vectors: its tables are empty")
    return EmbeddingTables(paths, num_rows, _dim_of(paths), model, schemas[first], _by(first))


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
    """The dimension of the first vector."""
    batches = (table for path in paths for table in parquet.batches(path, [EMBEDDING], 1))
    return parquet.embedding_matrix(paths[0], next(batches), EMBEDDING, lambda _: "the first row").shape[1]


def _identity(path: Path) -> str:
    return parquet.read_provenance(path).id if parquet.has_provenance(path) else provenance.identity(path)
