"""Vectors of images in Parquet files of any origin, with the building of each.

Rows are numbered through all files, in the order of their names.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from common import parquet, provenance, schemas
from common.errors import PipelineError, command
from publish.retrieval import embedding_tables
from publish.retrieval.embedding_tables import EMBEDDING

log = logging.getLogger("pipeline")
BATCH_ROWS = 16_384  # read at a time: 17 MB of float32 at 256 dimensions
IDS = ("streetview_image_id", "image", "image_id")  # columns that name images: the first that there is
POSITIONS = (("target_lat", "target_lon"), ("lat", "lon"), ("latitude", "longitude"))


@dataclass(frozen=True)
class ImageVectors:
    """Files of vectors by one model."""

    paths: list[Path]
    num_rows: list[int]  # of each file
    splits: list[str]  # of each file: "train", "val", "test" or ""
    inputs: dict[str, str]  # file name -> identity, for records
    model: str  # digest of the weights of the model that made them, or embedding_tables.UNKNOWN
    by: str
    id: str | None  # the column that names the images; None: they have numbers
    position: tuple[str, str] | None  # the columns of latitude and longitude, degrees
    columns: list[str]  # that are in all files
    others: pa.Schema  # of them, those of single values that a building may have, too; all text as string

    def batches(self, *columns: str) -> Iterator[tuple[int, int, pa.Table]]:
        """(number of the file, number of the first row, rows), BATCH_ROWS at most at a time."""
        row = 0
        for number, path in enumerate(self.paths):
            for batch in parquet.batches(path, list(columns), BATCH_ROWS):
                yield number, row, batch
                row += len(batch)

    def buildings(self) -> pa.ChunkedArray:
        """The names of the rows' buildings, strings; null where there is none."""
        names = self._column(self.by)
        return pc.if_else(pc.equal(names, ""), None, names)

    def ids(self) -> pa.ChunkedArray:
        """The names of all images, large_string: "<file>:<row of it>" where they have none."""
        numbers = [
            pa.array([f"{path.stem}:{row}" for row in range(count)], pa.string())
            for path, count in zip(self.paths, self.num_rows, strict=True)
            if self.id is None or self._column(self.id).null_count
        ]
        if self.id is None:
            names = pa.chunked_array(numbers, pa.string())
        else:
            names = self._column(self.id)
            names = pc.coalesce(names, pa.chunked_array(numbers).combine_chunks()) if numbers else names
        return names.cast(pa.large_string())

    def take(self, rows: np.ndarray, columns: list[str]) -> pa.Table:
        """Some rows, by their numbers in any order."""
        order = np.argsort(rows, kind="stable")
        ascending, found = rows[order], []
        for _, start, batch in self.batches(*columns):
            first, last = np.searchsorted(ascending, [start, start + len(batch)])
            found.append(batch.take(pa.array(ascending[first:last] - start)))
        return pa.concat_tables(found).take(pa.array(np.argsort(order)))

    def _column(self, name: str) -> pa.ChunkedArray:
        tables = [parquet.read(path, [name])[name].cast(pa.string()) for path in self.paths]
        return pa.chunked_array([chunk for table in tables for chunk in table.chunks], pa.string())


def find(source: Path, by: str, image_id: str | None) -> ImageVectors:
    """The vectors at `source`, a Parquet file or a folder of them.

    Raises PipelineError if there are none or if columns are missing, StaleArtefact if several models made them.
    """
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source] if source.exists() else []
    if not paths:
        make = command("publish/generate_embeddings_from_parquet.py", "INPUT", str(source))
        raise PipelineError(f"{source} holds no Parquet files: make vectors of images first: {make}")
    counts, tables = [], []
    for path in paths:
        with parquet.open_file(path) as file:
            counts.append(file.metadata.num_rows)
            tables.append(file.schema_arrow)
        _require(path, tables[-1], by, image_id)
    columns = [name for name in tables[0].names if all(name in schema.names for schema in tables)]
    fields = [tables[0].field(name) for name in columns]
    fields = [field for field in fields if all(schema.field(field.name).type == field.type for schema in tables)]
    usable = {EMBEDDING, by, image_id, *(field.name for field in fields)}  # of the first three, types may differ
    if dropped := sorted({name for schema in tables for name in schema.names} - usable):
        log.warning("leaving out columns that not all files have, or not with one type: %s", ", ".join(dropped))
    numbers = {field.name for field in fields if types.is_floating(field.type)}
    records = [parquet.read_provenance(path) if parquet.has_provenance(path) else None for path in paths]
    return ImageVectors(
        paths,
        num_rows=counts,
        splits=[_split(record) for record in records],
        inputs=embedding_tables.identities(paths),
        model=embedding_tables.model_of(paths),
        by=by,
        id=image_id or next((name for name in IDS if name in columns and name != by), None),
        position=next((pair for pair in POSITIONS if numbers.issuperset(pair)), None),
        columns=columns,
        others=pa.schema([kept for field in fields if field.name != by and (kept := _kept(field))]),
    )


def _require(path: Path, schema: pa.Schema, by: str, image_id: str | None) -> None:
    """Raise PipelineError if columns are missing from a file, or cannot name buildings."""
    for name in filter(None, (EMBEDDING, by, image_id)):
        if name not in schema.names:
            raise PipelineError(f"{path} has no column {name}: its columns are {', '.join(schema.names)}")
    kind = schema.field(by).type
    if not (types.is_integer(kind) or _is_text(kind)):
        raise PipelineError(f"{path}: {by} holds {kind}; convert the names of buildings to integers or strings")


def _kept(field: pa.Field) -> pa.Field | None:
    """A column as one of the building table's: single values, of a name that is not taken there; else None."""
    kind = pa.string() if _is_text(field.type) else field.type
    plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_temporal(kind) or types.is_string(kind)
    plain |= types.is_float32(kind) or types.is_float64(kind)
    return pa.field(field.name, kind) if plain and field.name not in schemas.buildings(1).names else None


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any of Arrow's forms."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def _split(record: provenance.Provenance | None) -> str:
    """The split that a file was made from, by its record; "" if that is none."""
    names = {Path(name).stem for name in record.inputs} if record else set()
    return names.pop() if len(names) == 1 and names <= set(schemas.SPLITS) else ""
