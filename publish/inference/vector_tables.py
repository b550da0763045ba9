"""Parquet files of any origin, with images or embeddings for the published model, read by row groups."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types
from pyarrow.parquet import ParquetFile

from common import parquet
from common.errors import PipelineError
from common.imagery.tar_images import TarImages
from common.provenance import digest_of
from common.schemas import Reject, Rejected

BATCH_ROWS = 8_192  # read at a time: 25 MB of float32 embeddings at 768 dimensions
EMBEDDING = "embedding"  # the column that is written
LOCATION = {"tar_file", "image_offset", "image_size"}  # columns of the intermediates: where an image is
_TAIL_BYTES = 65_536  # of a file, with its footer: the places, sizes and extremes of the row groups


class Columns(NamedTuple):
    """The columns to use, by name."""

    data: str | None = None  # of embeddings or images; None: the only one that fits
    id: str | None = None  # what rejects are called; None: "row 5"
    valid: str | None = None  # false or empty: the row is rejected, whatever its data are; None: no row


class TableSource:
    """A Parquet file and its usable column. Raises PipelineError without one, or without another that is named."""

    def __init__(self, path: Path, columns: Columns, store: TarImages):
        """`store`: the tars of intermediates."""
        self.path, self.name, self._store = path, path.stem, store
        with parquet.open_file(path) as file:
            schema = pa.schema([field.with_type(_without_views(field.type)) for field in file.schema_arrow])
            self._group_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = list(accumulate(self._group_rows))
        self._all = schema
        self.column, self.holds_images = _usable(path, schema, columns.data)
        self.schema = pa.schema([field for field in schema if field.name != self.column])  # the columns to keep
        self._id, self._valid = columns.id, columns.valid
        self._require(self._id, "names", types.is_integer, types.is_string, types.is_large_string)
        self._require(self._valid, "true or false", types.is_boolean, types.is_integer)
        self.settings = {"column": self.column, "valid": self._valid}
        size = path.stat().st_size
        with path.open("rb") as tail:
            tail.seek(max(0, size - _TAIL_BYTES))
            self._identity = f"{size} bytes, {digest_of(tail.read())}"

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """Rows start..stop of each part: whole row groups, at least `size` rows."""
        start, ends = 0, self._ends or [0]
        for number, end in enumerate(ends, 1):
            if end - start >= size or number == len(ends):
                yield start, end
                start = end

    def identity(self, start: int, stop: int) -> dict:
        """The inputs of a part's provenance: the file's size and its end, where Parquet describes the rest."""
        return {self.path.name: self._identity}

    def names_of(self, start: int, stop: int) -> pa.ChunkedArray:
        """What the rows of a part are called: their ids, or where these are absent their numbers."""
        numbers = pa.chunked_array([[f"row {row}" for row in range(start, stop)]], pa.string())
        return pc.coalesce(self._column(start, stop, self._id).cast(pa.string()), numbers) if self._id else numbers

    def failed(self, start: int, stop: int) -> dict[int, Rejected]:
        """The rows of a part that the validity column rejects, by their numbers in it."""
        if not self._valid:
            return {}
        valid = pc.fill_null(self._column(start, stop, self._valid).cast(pa.bool_()), False)
        why = Rejected(Reject.MARKED_INVALID, f"{self._valid} is not true")
        return dict.fromkeys(np.flatnonzero(~valid.to_numpy()).tolist(), why)

    def columns(self, start: int, stop: int, *more: str) -> Iterator[pa.Table]:
        """The columns of `schema` and `more` of a part, some rows of a row group at a time."""
        return self._rows(start, stop, [*self.schema.names, *more])

    def _column(self, start: int, stop: int, name: str) -> pa.ChunkedArray:
        """A column of `schema` of a part."""
        return pa.concat_tables([self.schema.empty_table().select([name]), *self._rows(start, stop, [name])])[name]

    def _require(self, column: str | None, what: str, *kinds: Callable[[pa.DataType], bool]) -> None:
        """Raise PipelineError unless the column, if one is named, is one of `schema` and of one of these kinds."""
        if column is None:
            return
        if column not in self.schema.names:
            listing = ", ".join(self.schema.names) or "none"
            raise PipelineError(f"{self.path} has no column {column} beside that of the data: {listing}")
        kind = self.schema.field(column).type
        if not any(fits(kind) for fits in kinds):
            raise PipelineError(f"{self.path}: the column {column} ({kind}) cannot be read as {what}")

    def _rows(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.Table]:
        with parquet.open_file(self.path) as file:
            for group in range(bisect_right(self._ends, start), bisect_right(self._ends, stop)):
                yield from self._batches(file, group, columns)

    def _batches(self, file: ParquetFile, group: int, columns: list[str]) -> Iterator[pa.Table]:
        for batch in parquet.batches_of(self.path, file, range(group, group + 1), columns, BATCH_ROWS):
            wanted = pa.schema([self._all.field(name) for name in batch.column_names])
            if not batch.schema.equals(wanted):
                batch = pa.table([_read_as(batch[field.name], field.type) for field in wanted], schema=wanted)
            yield batch

    def reader(self, start: int, stop: int) -> Callable[[int, int], Sequence[bytes | Rejected | None]]:
        """A function that reads encoded images of a part by their numbers in it, best in nearly rising order."""
        read, failed = self._image_reader(start, stop), self.failed(start, stop)
        return lambda first, last: [
            failed.get(number, image) for number, image in enumerate(read(first, last), first)
        ]

    def _image_reader(self, start: int, stop: int) -> Callable[[int, int], Iterable[bytes | None]]:
        if self.column is None:
            rows = pa.concat_tables([self.schema.empty_table(), *self.columns(start, stop)])
            return lambda first, last: self._store.read(rows.slice(first, last - first))
        column, file, lock = self.column, parquet.open_file(self.path), Lock()

        @lru_cache(2)  # threads take images out of two row groups at a time
        def images_of(group: int) -> pa.ChunkedArray:
            images = pa.concat_tables(self._batches(file, group, [column]))[column]
            return pc.struct_field(images, "bytes") if types.is_struct(images.type) else images

        def read(first: int, last: int) -> list[bytes | None]:
            images: list[bytes | None] = []
            with lock:
                while len(images) < last - first:
                    row = start + first + len(images)
                    group = bisect_right(self._ends, row)
                    offset = row - (self._ends[group] - self._group_rows[group])
                    images += images_of(group).slice(offset, last - first - len(images)).to_pylist()
            return images

        return read


def tables(source: Path, out: Path, columns: Columns, store: TarImages) -> Iterator[TableSource]:
    """The Parquet files at `source`. Raises PipelineError if there are none, or if they are in `out`."""
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not source.exists():
        raise PipelineError(f"{source} {'holds no .parquet file' if source.exists() else 'does not exist'}")
    if paths[0].parent.resolve() == out.resolve():
        raise PipelineError(f"{out} is the folder of the input: its files would be replaced; name another")
    yield from (TableSource(path, columns, store) for path in paths)


def _usable(path: Path, schema: pa.Schema, column: str | None) -> tuple[str | None, bool]:
    """(the column to use, None for the columns of LOCATION; whether it holds images)."""
    kinds = {field.name: kind for field in schema if (kind := _kind(field.type))}
    if column is None and EMBEDDING in kinds:
        column = EMBEDDING
    if column is None and len(kinds) > 1:
        raise PipelineError(f"{path}: choose one of {', '.join(kinds)} with --column")
    if column is None and not kinds and set(schema.names) >= LOCATION:
        return None, True
    column = column or next(iter(kinds), "")
    if column not in kinds:
        listing = ", ".join(f"{field.name} ({field.type})" for field in schema)
        what = f"column {column}" if column else "column"
        raise PipelineError(f"{path} has no {what} of embeddings (lists of floats) or images (bytes): {listing}")
    if EMBEDDING in schema.names and column != EMBEDDING:
        raise PipelineError(f"{path} already has a column {EMBEDDING}: rename it, or drop --column to use it")
    return column, kinds[column] == "images"


def _kind(kind: pa.DataType) -> str | None:
    """What a column of this type may hold: "embeddings", "images" or neither."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "embeddings" if types.is_floating(kind.value_type) else None
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face stores images
        kind = kind.field("bytes").type
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return "images" if is_bytes else None


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The type as which a column is read: pyarrow cannot take rows of Arrow's view types."""
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.large_binary()  # a batch of images may have more than 2 GB
    if types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_without_views(kind.value_type)))
    return kind


def _read_as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column as a type of `_without_views`."""
    if types.is_list_view(column.type) or types.is_large_list_view(column.type):
        # by hand: pyarrow 26 casts n views to lists with n offsets, one too few
        lists = [_lists(chunk) for chunk in column.chunks]
        column = pa.chunked_array(lists, pa.large_list(column.type.value_field))
    return column if column.type == kind else column.cast(kind)


def _lists(views: pa.Array) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(views), 0).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
    kind = pa.large_list(views.type.value_field)
    return pa.LargeListArray.from_arrays(offsets, views.flatten(), type=kind, mask=views.is_null())
