"""Parquet files that say what made them: atomic writing, resuming, and vectors as numpy arrays.

Memory: a writer holds one row group, at most 32 MB, and as much that is on its way to the disk; a reader of
batches holds what it was asked for.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from common import files
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance, differences, digest_of

MAX_ROW_GROUP_BYTES = 32 * 2**20  # threads read a group each, and writers of several files hold one of each
_SYNCED_BYTES = 8 * 2**20  # forced to the disk at a time
_WAITING_BYTES = 32 * 2**20  # that the disk is behind, before the encoder waits for it
_CACHED_BYTES = 2**20  # of a matrix, read and looked at while it is still in the processor's cache
_VALUES_AT_ONCE = 2**16  # by the encoder: a tenth less time for vectors than with its default, 1024
_PAGE_BYTES = 2**18  # encoded in the processor's cache: a fifth less time for vectors than with the default, 2**20
LARGEST = 1e17  # of a vector's values: in float32 the squares of thousands must add up
_MAX_READERS = 16  # threads; more do not make a file system faster
_KEY = b"provenance"


class _HashingFile:
    """Passes what is written on to `file` and keeps a digest of it. (Parquet is written front to back.)

    In a thread, which also forces the data to the disk, now and then, while more is encoded: half of the time of
    writing vectors, if one thing is done after the other.
    """

    def __init__(self, file: BinaryIO, thread: Executor):
        self._file, self._thread = file, thread
        self._size = self._passed_on = self._synced = 0  # bytes
        self._waiting: deque[Future[None]] = deque()
        self.digest = xxhash.xxh3_128()  # of two files with other rows, by accident, never the same

    def write(self, data: bytes) -> int:
        self._size += len(data)
        self._waiting.append(self._thread.submit(self._pass_on, data))
        while self._waiting and (self._waiting[0].done() or self._size - self._passed_on > _WAITING_BYTES):
            self._waiting.popleft().result()
        return len(data)

    def tell(self) -> int:
        return self._size

    def wait(self) -> None:
        """Until all is passed on. Raises the disk's error, which it tells only once."""
        while self._waiting:
            self._waiting.popleft().result()

    def _pass_on(self, data: bytes) -> None:
        self.digest.update(data)
        self._file.write(data)
        self._passed_on += len(data)
        if self._passed_on - self._synced >= _SYNCED_BYTES:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = self._passed_on

    def __getattr__(self, name):
        return getattr(self._file, name)


class Writer:
    """Rows on their way into a file; see `writer`. `rows` and `facts` may be filled in until the block ends."""

    def __init__(self, file: _HashingFile, schema: pa.Schema):
        self.num_rows = 0
        self.rows: dict = {}  # counts for the provenance, besides "out"
        self.facts: dict = {}
        self._schema = schema
        self._group_rows = max(1, MAX_ROW_GROUP_BYTES // row_bytes(schema))
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self.parquet = pq.ParquetWriter(
            file,
            schema,
            compression={field.name: _codec(field.type) for field in schema},
            use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
            write_batch_size=_VALUES_AT_ONCE,
            data_page_size=_PAGE_BYTES,
            write_statistics=[field.name for field in schema if not pa.types.is_nested(field.type)],
        )

    def append(self, rows: pa.Table | dict) -> None:
        """Add a table, or a dict of columns (arrays or lists; an (n, D) array for a fixed-size list)."""
        table = rows if isinstance(rows, pa.Table) else to_table(rows, self._schema)
        self._pending.append(table.select(self._schema.names).cast(self._schema))
        self._pending_rows += table.num_rows
        self.num_rows += table.num_rows
        if self._pending_rows >= self._group_rows:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as row groups of at most MAX_ROW_GROUP_BYTES."""
        if self._pending_rows:
            self.parquet.write_table(pa.concat_tables(self._pending), row_group_size=self._group_rows)
        self._pending, self._pending_rows = [], 0


@contextlib.contextmanager
def writer(path: Path, schema: pa.Schema, made: Provenance) -> Iterator[Writer]:
    """A Parquet file that appears, whole and with its provenance, when the `with` block ends well.

    Its id is a digest of its rows as written, and of the stage's name.
    """
    with files.atomic(path) as file, ThreadPoolExecutor(1) as thread:
        hashing = _HashingFile(file, thread)
        out = Writer(hashing, schema)
        try:
            yield out
            out.flush()
            hashing.wait()
            content_id = digest_of(hashing.digest.digest(), made.stage)
            finished = made.finished(content_id, {"out": out.num_rows, **out.rows}, out.facts)
            out.parquet.add_key_value_metadata({_KEY: finished.to_json().encode()})
            out.parquet.close()
            hashing.wait()
        except BaseException:
            # both destructors write a footer: this one not at all, the inner one now, while the abandoned file is
            # still open, and not at any later time when garbage is collected
            out.parquet.is_open = False
            out.parquet.writer = None
            raise


def to_table(columns: dict, schema: pa.Schema) -> pa.Table:
    """A table of `schema` from a dict of columns; (n, D) arrays become fixed-size lists."""
    arrays = []
    for field in schema:
        column = columns[field.name]
        if pa.types.is_fixed_size_list(field.type) and isinstance(column, np.ndarray):
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), type=field.type))
        elif isinstance(column, (pa.Array, pa.ChunkedArray)):
            arrays.append(column)
        else:
            arrays.append(pa.array(column, type=field.type))
    return pa.Table.from_arrays(arrays, names=schema.names)


def to_matrix(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """A fixed-size-list column as an (n, D) array; without a copy when it is one chunk."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dim = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, dim), column.type.value_type.to_pandas_dtype())


def read_matrix(path: Path, column: str) -> np.ndarray:
    """A fixed-size-list column of a whole file as an (N, D) array, without a second copy of it in memory.

    Row groups are read side by side. Raises PipelineError, naming the row, where a value is above LARGEST or none.
    """
    with open_file(path) as file:
        _require_columns(path, file, [column])
        kind = file.schema_arrow.field(column).type
        footer = file.metadata  # of 1,600 row groups, read again for each: 68 s instead of 1.4
        sizes = [footer.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    matrix = np.empty((sum(sizes), kind.list_size), kind.value_type.to_pandas_dtype())

    def read_group(group: int) -> None:
        end = ends[group] - sizes[group]
        size = max(1, _CACHED_BYTES // (matrix.itemsize * kind.list_size))
        with open_file(path, _CACHED_BYTES, footer) as file, _damage_told(path):
            for batch in file.iter_batches(size, row_groups=[group], columns=[column], use_threads=False):
                block = matrix[end : end + batch.num_rows]
                block[:] = to_matrix(batch.column(0))
                if not is_usable(block):
                    bad = np.flatnonzero(~(np.abs(block.astype(np.float64)) <= LARGEST).all(axis=1))
                    raise PipelineError(
                        f"{path}: {column} of row {end + bad[0]:,} holds NaN, infinity, or more than {LARGEST:g}"
                    )
                end += len(block)

    with ThreadPoolExecutor(min(pa.cpu_count(), _MAX_READERS)) as pool:
        list(pool.map(read_group, range(len(sizes))))
    return matrix


def is_usable(block: np.ndarray) -> bool:
    """Whether all values of some vectors are numbers, and none is larger than LARGEST."""
    if block.dtype != np.float16:
        return bool(np.abs(block).max(initial=0) <= LARGEST)
    # numpy converts each half to look at it; read as whole numbers, those that are not finite are the largest with
    # a sign (of the unsigned ones) and without (of the signed)
    largest, largest_positive = (block.view(kind).max(initial=0) for kind in (np.uint16, np.int16))
    return bool(largest < 0xFC00 and largest_positive < 0x7C00)


def read_provenance(path: Path) -> Provenance:
    """The record in a file's footer. Raises PipelineError if the file is absent, damaged or not ours."""
    metadata = open_file(path).metadata.metadata or {}
    if _KEY not in metadata:
        raise PipelineError(f"{path} was not written by this pipeline (it has no provenance in its footer)")
    try:
        return Provenance.from_json(metadata[_KEY])
    except (ValueError, TypeError):
        raise PipelineError(
            f"{path} has a record that this version cannot read: make it again, with --overwrite"
        ) from None


def has_provenance(path: Path) -> bool:
    """Whether this pipeline wrote the file. Raises PipelineError if it is absent or damaged."""
    return _KEY in (open_file(path).metadata.metadata or {})


def require(path: Path, script: str) -> Path:
    """`path`, which `script` makes. Raises PipelineError, naming the script, if it is absent."""
    if not path.exists():
        raise PipelineError(f"{path} does not exist: run {script} first")
    return path


def open_file(path: Path, buffer_bytes: int = 0, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The Parquet file at `path`. Raises PipelineError if it is absent or damaged.

    `buffer_bytes`: of a column, held at a time while batches are read; 0: all of it in a row group.
    `footer`: of this file, if it has been read already.
    """
    if not path.exists():
        raise PipelineError(f"{path} does not exist: run the stage that writes it first")
    with _damage_told(path):
        return pq.ParquetFile(path, metadata=footer, pre_buffer=False, buffer_size=buffer_bytes)


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's: the file may be whole
        raise PipelineError(
            f"{path} is damaged ({first_line(error)}): delete it and run its stage again"
        ) from None


def _require_columns(path: Path, file: pq.ParquetFile, columns: list[str] | None) -> None:
    missing = [column for column in columns or () if column not in file.schema_arrow.names]
    if missing:
        raise PipelineError(
            f"{path} has no column {', '.join(missing)}: another program or version wrote it\n"
            "intermediates are brought to today's columns by preprocess/fix_intermediate_schema.py"
        )


def is_done(path: Path, made: Provenance, overwrite: bool) -> bool:
    """Whether `path` is what a run that records `made` would write.

    False if it is missing, or if `overwrite` says to make it again; True if settings and inputs match. Raises
    StaleArtefact, with what differs and the two ways out, if it is there and does not match.
    """
    if overwrite or not path.exists():
        return False
    there = read_provenance(path)
    refuse_stale(path, there, made, f"{there.rows.get('out', 0):,} rows")
    return True


def refuse_stale(path: Path | str, there: Provenance, made: Provenance, amount: str) -> None:
    """Raise StaleArtefact if what stands at `path`, or in that database, is not what `made` would make. `amount`:
    what redoing costs."""
    reasons = differences(there, made)
    if reasons:
        raise StaleArtefact(
            f"{path} {'; it '.join(reasons)}\nput that back, or redo it with --overwrite ({amount})"
        )


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns, in memory. Raises PipelineError if absent, damaged, or without one."""
    with open_file(path) as file, _damage_told(path):
        _require_columns(path, file, columns)
        return file.read(columns=columns)


def batches(path: Path, columns: list[str] | None = None, size: int = 65_536) -> Iterator[pa.Table]:
    """The rows of a file, in order, at most `size` at a time. Raises PipelineError as `read` does."""
    with open_file(path) as file:
        _require_columns(path, file, columns)
        yield from batches_of(path, file, range(file.num_row_groups), columns, size)


def batches_of(
    path: Path, file: pq.ParquetFile, groups: range, columns: list[str] | None = None, size: int = 65_536
) -> Iterator[pa.Table]:
    """The same of some row groups of a file that is open. Raises PipelineError if it is damaged there."""
    found = file.iter_batches(size, list(groups), columns)
    while True:
        with _damage_told(path):
            batch = next(found, None)
        if batch is None:
            return
        yield pa.Table.from_batches([batch])


def num_rows(path: Path) -> int:
    """How many rows a file has, from its footer."""
    with open_file(path) as file:
        return file.metadata.num_rows


def row_bytes(schema: pa.Schema) -> int:
    """About how many bytes a row of `schema` takes in memory (16 for a string, or whatever has no fixed size)."""
    return sum(_value_bytes(field.type) for field in schema)


def first_line(error: BaseException) -> str:
    """The first line of an error's text: what a user is shown of a library's error."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _value_bytes(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _value_bytes(kind.value_type)
    try:
        return max(1, kind.bit_width // 8)
    except ValueError:  # strings, lists, structs
        return 16


def _codec(kind: pa.DataType) -> str:
    """Embeddings do not compress: it costs time and saves nothing."""
    return "NONE" if pa.types.is_nested(kind) else "ZSTD"


def embedding_matrix(
    path: Path,
    batch: pa.Table,
    column: str,
    name: Callable[[int], str],
    dim: int | None = None,
    dim_of: str = "the rows before it have",
) -> np.ndarray:
    """A column of lists of numbers, as any program may write it: (n, D) float16 if it holds that, else float32.

    `name`: of a row of the batch, for messages. `dim`: the required D, and `dim_of` what requires it; None: that
    of the first row. Raises PipelineError, naming a row, if it has no list or one of another length, or if a value
    is missing, not finite or above LARGEST.
    """
    lists = batch[column].combine_chunks()
    kind = lists.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise PipelineError(f"{path}: the column {column} holds {kind}, not lists of numbers")
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy()
    if (lengths < 0).any():
        raise PipelineError(f"{path}: {name(int(lengths.argmin()))} has no {column}")
    dim = int(lengths[0]) if dim is None else dim
    if (lengths != dim).any() or not dim:
        row = int((lengths != dim).argmax())
        raise PipelineError(f"{path}: the {column} of {name(row)} has {lengths[row]} dimensions; {dim_of} {dim}")
    values = lists.flatten()
    values = values if pa.types.is_float16(values.type) else values.cast(pa.float32(), safe=False)
    matrix = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    if not is_usable(matrix):
        row = int((np.abs(matrix.astype(np.float64)) <= LARGEST).all(axis=1).argmin())
        raise PipelineError(
            f"{path}: the {column} of {name(row)} holds a value that is missing, not finite, or above {LARGEST:g}"
        )
    return matrix
