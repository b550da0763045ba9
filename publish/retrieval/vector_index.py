"""An index: a folder of vectors in which to search by cosine. publish/build_index.py writes it.

vectors.npy   (n, D) float16 in C order, each of length 1 up to rounding; may be memory-mapped
rows.parquet  n rows in the same order: every other column of the vectors' table, of rows that have a vector
index.json    `rows` (n), `dim` (D), `kind` ("exact" or "ivf"), `model` (digest of the weights that made the
              vectors, generate.model_files.weights_digest of the published folder; "unknown" if their files do not
              say), `by` (of buildings: the column that named them, or null), `bytes` and `seconds` of the build,
              `provenance` (with the identity of each other file); of an "ivf" also `nlist`, `nprobe`, and
              `recall@10` and `recall@100` at that nprobe
index.faiss   of an "ivf" only: faiss's IVF{nlist},SQfp16 by inner product, whose ids are the row numbers

To search by hand: the rows of the largest products `vectors @ query`, for a query of length 1 by the same model.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from common import parquet, provenance, stages
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from publish.retrieval import inverted_file
from publish.retrieval.cosine_search import CPU, most_similar
from publish.retrieval.embedding_tables import EMBEDDING, UNKNOWN, UNUSABLE, EmbeddingTables

log = logging.getLogger("pipeline")
VECTORS, ROWS, RECORD, INVERTED = "vectors.npy", "rows.parquet", "index.json", "index.faiss"


@dataclass(frozen=True)
class VectorIndex:
    """Vectors and the rows that they belong to."""

    name: str  # for messages
    vectors: np.ndarray  # (n, D) float16
    tables: Sequence[Path]  # Parquet files with the rows, in this order
    model: str  # digest of its weights, or UNKNOWN
    by: str | None = None  # of buildings: the images' column that named them, if known
    record: dict = field(default_factory=dict)  # index.json
    inverted: Any = None  # faiss's index of an "ivf"
    usable: np.ndarray | None = None  # (n,) bool, the rows that have a vector; None: all

    def search(
        self, queries: np.ndarray, k: int, mask: np.ndarray | None = None, device: torch.device = CPU
    ) -> tuple[np.ndarray, np.ndarray]:
        """(cosines (Q, k) float32, rows (Q, k) int64) of `queries` (Q, D) float32 of length 1, most similar first.

        `mask` (n,) bool: the rows to look at. Fewer columns if there are fewer rows. Exact, unless the index is an
        "ivf" and there is no mask; then -inf and -1 where the lists that are looked at hold fewer than k.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        mask = self.usable if mask is None else mask
        if self.inverted is not None and mask is None:
            return self.inverted.search(queries, min(k, len(self.vectors)))
        return most_similar(self.vectors, queries, k, None if mask is None else np.flatnonzero(mask), device)

    @property
    def columns(self) -> list[str]:
        """The names of the columns of its rows."""
        with parquet.open_file(self.tables[0]) as file:
            return [name for name in file.schema_arrow.names if name != EMBEDDING]

    def take(self, rows: np.ndarray) -> list[dict]:
        """The columns of some rows, by name."""
        wanted, found, start, columns = np.unique(rows), dict[int, dict](), 0, self.columns
        for path in self.tables:
            with parquet.open_file(path) as file:
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    here = wanted[(wanted >= start) & (wanted < stop)]
                    if len(here):
                        batches = parquet.batches_of(path, file, range(group, group + 1), columns)
                        values = pa.concat_tables(batches).take(pa.array(here - start)).to_pylist()
                        found |= dict(zip(here.tolist(), values, strict=True))
                    start = stop
        return [found[int(row)] for row in rows]

    def where(self, conditions: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) bool: the rows in which each column has the value named. Raises PipelineError if there is no such
        column, or no such row."""
        mask = np.ones(len(self.vectors), bool) if self.usable is None else self.usable.copy()
        for column, text in conditions:
            if column not in self.columns:
                raise PipelineError(f"{self.name} has no column {column}: it has {', '.join(self.columns)}")
            values = pa.concat_tables(parquet.read(path, [column]) for path in self.tables)[column]
            try:
                value = pa.scalar(text).cast(values.type)
                mask &= pc.fill_null(pc.equal(values, value), False).to_numpy()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise PipelineError(f"{self.name}: the column {column} ({values.type}) cannot be {text}") from None
        if not mask.any():
            stated = " and ".join(f"{column}={value}" for column, value in conditions)
            raise PipelineError(f"{self.name} has no row with {stated}")
        return mask


def open(folder: Path) -> VectorIndex:
    """The index in `folder`, memory-mapped. Raises PipelineError if there is none, or if its files are not those
    that were built together."""
    if not (folder / RECORD).is_file():
        raise PipelineError(f"{folder} holds no index (no {RECORD}): run publish/build_index.py first")
    record = json.loads((folder / RECORD).read_text())
    if not is_whole(folder, stages.record_of(folder / RECORD)):
        raise PipelineError(
            f"files in {folder} are missing, or not of one index: run publish/build_index.py --overwrite"
        )
    vectors = np.load(folder / VECTORS, mmap_mode="c")  # torch wants arrays that may be written
    inverted = inverted_file.read(folder / INVERTED, record["nprobe"]) if record["kind"] == "ivf" else None
    return VectorIndex(str(folder), vectors, (folder / ROWS,), record["model"], record["by"], record, inverted)


def is_whole(folder: Path, made: Provenance) -> bool:
    """Whether an index has the files that its record was written with, by their sizes and ends."""
    built = made.facts.get("files", {})
    return {VECTORS, ROWS} <= built.keys() and built == {
        name: provenance.identity(folder / name) for name in built if (folder / name).is_file()
    }


def of_tables(tables: EmbeddingTables) -> VectorIndex:
    """An index of vectors without one, in memory: N x D x 2 bytes."""
    name = str(tables.paths[0].parent)
    vectors, usable = tables.matrix()
    if usable.all():
        return VectorIndex(name, vectors, tables.paths, tables.model, tables.by)
    log.warning("%s: leaving out %d rows whose vector is %s", name, (~usable).sum(), UNUSABLE)
    return VectorIndex(name, vectors, tables.paths, tables.model, tables.by, usable=usable)


def refuse_other_model(index: VectorIndex, model: str, dim: int, folder: Path) -> None:
    """Raise StaleArtefact unless the index has vectors by the model in `folder`, whose weights have the digest
    `model`, and of dimension `dim`. Where nothing is known of them, only the dimension is compared."""
    if index.model not in (UNKNOWN, model):
        raise StaleArtefact(
            f"{index.name} has vectors by another model (weights {index.model[:8]}) than the one in {folder} "
            f"(weights {model[:8]})\nname the model that made them with --model, or make vectors with this one"
        )
    if index.vectors.shape[1] != dim:
        raise StaleArtefact(
            f"{index.name} has vectors of {index.vectors.shape[1]} dimensions; those of the model in {folder} "
            f"have {dim}\nmake vectors with this model (publish/generate_embeddings_from_parquet.py)"
        )
