"""Parquet files that record what made them: atomic writing, resuming, and vectors as numpy arrays.

Memory: a writer holds one row group, at most 32 MB, and as much again on its way to the disk; a reader holds one
batch.
"""

import contextlib
import functools
import hashlib
import os
import shlex
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

from common import errors, files
from common.errors import PipelineError, StaleArtefact, first_line
from common.provenance import Provenance, Redo, differences, digest_of, ways_out

MAX_ROW_GROUP_BYTES = 32 * 2**20  # threads read a group each, and writers of several files hold one of each
_SYNCED_BYTES = 8 * 2**20  # forced to the disk at a time
_WAITING_BYTES = 32 * 2**20  # how far the disk may be behind before the encoder waits for it
_CACHED_BYTES = 2**20  # of a matrix, read and checked while still in the processor's cache
_VALUES_AT_ONCE = 2**16  # by the encoder: a tenth less time for vectors than with its default, 1024
_PAGE_BYTES = 2**18  # encoded in the processor's cache: a fifth less time for vectors than with the default, 2**20
LARGEST = 1e17  # of a vector's values: the squares of thousands of them must not overflow float32
SMALLEST = 1e-12  # of a vector's largest value: shorter ones, and zeros, are not normalised to length 1
_MAX_READERS = 16  # threads; more do not make a file system faster
_KEY = b"provenance"


class _HashingFile:
    """Passes data on to `file`, front to back, and keeps a digest of it.

    In a thread, which also forces the data to the disk while more is encoded: one after the other, writing vectors
    takes twice as long.
    """

    def __init__(self, file: BinaryIO, thread: Executor):
        self._file, self._thread = file, thread
        self._size = self._passed_on = self._synced = 0  # bytes
        self._waiting: deque[Future[None]] = deque()
        self.digest = xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self._size += len(data)
        self._waiting.append(self._thread.submit(self._pass_on, data))
        while self._waiting and (self._waiting[0].done() or self._size - self._passed_on > _WAITING_BYTES):
            self._waiting.popleft().result()
        return len(data)

    def tell(self) -> int:
        return self._size

    def wait(self) -> None:
        """Wait until everything is passed on. Raises the disk's error, which the disk reports only once."""
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
        self.content = b""  # what the id is a digest of, if not all rows as written
        self._schema = schema
        self._group_rows = max(1, MAX_ROW_GROUP_BYTES // sum(_value_bytes(field.type) for field in schema))
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self.parquet = pq.ParquetWriter(
            file,
            schema,
            # compressing embeddings costs time and saves nothing
            compression={field.name: "NONE" if pa.types.is_nested(field.type) else "ZSTD" for field in schema},
            use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
            write_batch_size=_VALUES_AT_ONCE,
            data_page_size=_PAGE_BYTES,
            write_statistics=[field.name for field in schema if not pa.types.is_nested(field.type)],
        )

    def append(self, rows: pa.Table | dict) -> None:
        """Add a table, or a dict of columns (arrays or lists; an (n, D) array for a fixed-size list)."""
        table = rows if isinstance(rows, pa.Table) else _to_table(rows, self._schema)
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
def writer(path: Path, schema: pa.Schema, record: Provenance) -> Iterator[Writer]:
    """A Parquet file that appears, complete and with its provenance, if the `with` block succeeds. Its id is a
    digest of its rows as written and of the stage's name."""
    with files.atomic(path) as file, ThreadPoolExecutor(1) as thread:
        hashing = _HashingFile(file, thread)
        out = Writer(hashing, schema)
        try:
            yield out
            out.flush()
            hashing.wait()
            content_id = digest_of(out.content or hashing.digest.digest(), record.stage)
            finished = record.finished(content_id, {"out": out.num_rows, **out.rows}, out.facts)
            out.parquet.add_key_value_metadata({_KEY: finished.to_json().encode()})
            out.parquet.close()
            hashing.wait()
        except BaseException:
            # both destructors write a footer: prevent the outer one, and run the inner one now, while the
            # abandoned file is still open, not whenever garbage is collected
            out.parquet.is_open = False
            out.parquet.writer = None
            raise


def _to_table(columns: dict, schema: pa.Schema) -> pa.Table:
    """A table of `schema` from a dict of columns; (n, D) arrays become fixed-size lists."""
    vectors = {
        field.name: pa.FixedSizeListArray.from_arrays(pa.array(columns[field.name].ravel()), type=field.type)
        for field in schema
        if pa.types.is_fixed_size_list(field.type) and isinstance(columns[field.name], np.ndarray)
    }
    return pa.Table.from_pydict({**columns, **vectors}, schema=schema)


def to_matrix(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """A fixed-size-list column as an (n, D) array; without a copy if it is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)


def read_matrix(path: Path, column: str) -> np.ndarray:
    """A fixed-size-list column of a whole file as an (N, D) array, without a second copy of it in memory.

    Row groups are read in parallel. Raises PipelineError, naming the row, if a value is NaN, infinite or above
    LARGEST.
    """
    with open_file(path) as file:
        _require_columns(path, file, [column])
        kind = file.schema_arrow.field(column).type
        footer = file.metadata  # parsed once: with 1,600 row groups, 1.4 s instead of 68
        sizes = [footer.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    matrix = np.empty((sum(sizes), kind.list_size), kind.value_type.to_pandas_dtype())

    def read_group(group: int) -> None:
        row = ends[group] - sizes[group]
        size = max(1, _CACHED_BYTES // (matrix.itemsize * kind.list_size))
        with open_file(path, _CACHED_BYTES, footer) as file, _corruption_errors(path):
            for batch in file.iter_batches(size, row_groups=[group], columns=[column], use_threads=False):
                block = matrix[row : row + batch.num_rows]
                block[:] = to_matrix(batch.column(0))
                bad = _first_unusable(block)
                if bad is not None:
                    what = f"NaN, infinity, or more than {LARGEST:g}"
                    raise PipelineError(f"{path}: {column} of row {row + bad:,} holds {what}")
                row += len(block)

    with ThreadPoolExecutor(min(pa.cpu_count(), _MAX_READERS)) as pool:
        list(pool.map(read_group, range(len(sizes))))
    return matrix


def _first_unusable(matrix: np.ndarray) -> int | None:
    """The first row of (n, D) with a value that is not finite or exceeds LARGEST; None if there is none."""
    if matrix.dtype == np.float16:  # by its bits, which saves conversions: without the sign, infinity is 0x7C00
        usable = (matrix.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00
    else:
        usable = np.abs(matrix).max(initial=0) <= LARGEST
    return None if usable else int((np.abs(matrix.astype(np.float64)) <= LARGEST).all(axis=1).argmin())


def read_provenance(path: Path) -> Provenance:
    """The record in a file's footer. Raises PipelineError if the file is missing, damaged or not ours."""
    metadata = open_file(path).metadata.metadata or {}
    if _KEY not in metadata:
        raise PipelineError(f"{path} was not written by this pipeline (it has no provenance in its footer)")
    try:
        return Provenance.from_json(metadata[_KEY])
    except ValueError:
        raise PipelineError(
            f"{path} has a record that this version cannot read\nremove it, and rerun: rm {shlex.quote(str(path))}"
        ) from None


def has_provenance(path: Path) -> bool:
    """Whether this pipeline wrote the file. Raises PipelineError if it is missing or damaged."""
    return _KEY in (open_file(path).metadata.metadata or {})


def content_id(path: Path) -> str:
    """The id in the footer of a file, or, if another program wrote it, a digest of its bytes (files of the same
    images by two models may have the same size)."""
    if has_provenance(path):
        return read_provenance(path).id
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.cache  # called for each task of a plan
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return hashlib.blake2b(np.memmap(path, np.uint8, "r").data, digest_size=16).hexdigest()


def require(path: Path, script: str) -> Path:
    """`path`, which `script` writes. Raises PipelineError, naming the script, if it is missing."""
    if not path.exists():
        raise PipelineError(f"{path} does not exist: run {script} first")
    return path


def open_file(path: Path, buffer_bytes: int = 0, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The Parquet file at `path`. Raises PipelineError if it is missing or damaged.

    `buffer_bytes`: of a column, held while batches are read; 0: all of a row group. `footer`: if it has been read.
    """
    require(path, "the stage that writes it")
    with _corruption_errors(path):
        return pq.ParquetFile(path, metadata=footer, pre_buffer=False, buffer_size=buffer_bytes)


@contextlib.contextmanager
def _corruption_errors(path: Path) -> Iterator[None]:
    """Raise PipelineError for what Arrow raises on a damaged file; errors of the disk pass."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise PipelineError(
            f"{path} is damaged ({first_line(error)})\n"
            f"remove it, and rerun slurm/submit.py, or the stage that writes it: rm {shlex.quote(str(path))}"
        ) from None


def _require_columns(path: Path, file: pq.ParquetFile, columns: list[str] | None) -> None:
    missing = [column for column in columns or () if column not in file.schema_arrow.names]
    if missing:
        raise PipelineError(
            f"{path} has no column {', '.join(missing)}: another program or version wrote it\n"
            "preprocess/fix_intermediate_schema.py converts intermediates to the current columns"
        )


def is_done(path: Path, record: Provenance, redo: Redo) -> bool:
    """Whether `path` exists, is what a run with this `record` would write, and need not be recreated.

    Raises StaleArtefact, naming the differences and the ways out, if it exists, does not match, and `redo` does
    not allow to recreate it.
    """
    if redo == "all" or not path.exists():
        return False
    try:
        existing = read_provenance(path)
    except PipelineError:
        if redo:
            return False
        raise
    return matches(path, existing, record, redo, f"{existing.rows.get('out', 0):,} rows")


def matches(
    path: Path | str,
    existing: Provenance,
    expected: Provenance,
    redo: Redo,
    amount: str,
    script: str = "",
) -> bool:
    """Whether the record of a file or database, `existing`, is the `expected` one of this run.

    Raises StaleArtefact if it is not, and `redo` does not allow to recreate the file. `amount`: how much would
    have to be redone; `script`: what redoes it, if not this one.
    """
    reasons = differences(existing, expected)
    if reasons and not redo:
        ways = ways_out(existing, expected, functools.partial(errors.command, ""))
        ways.append(f"to redo it ({amount}): {errors.command(script, '--remake')}")
        raise StaleArtefact("\n".join([f"{path} {'; it '.join(reasons)}", *ways]))
    return not reasons


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns. Raises PipelineError if it is missing, damaged or lacks a column."""
    with open_file(path) as file, _corruption_errors(path):
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
    """The same for some row groups of an open file. Raises PipelineError if they are damaged."""
    with _corruption_errors(path):
        for batch in file.iter_batches(size, list(groups), columns):
            yield pa.Table.from_batches([batch])


def num_rows(path: Path) -> int:
    """How many rows a file has, from its footer."""
    with open_file(path) as file:
        return file.metadata.num_rows


def _value_bytes(kind: pa.DataType) -> int:
    """About how many bytes a value takes in memory: 16 for a string, or whatever has no fixed size."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _value_bytes(kind.value_type)
    return max(1, kind.bit_width // 8) if pa.types.is_primitive(kind) else 16


def embedding_matrix(
    path: Path,
    batch: pa.Table,
    column: str,
    name: Callable[[int], str],
    dim: int | None = None,
    dim_of: str = "the rows before it have",
) -> np.ndarray:
    """A column of lists of numbers, from any program: (n, D) float16 if it is that type, else float32.

    `name`: describes a row of the batch in messages. `dim`: the required D, and `dim_of` its source; None: that of
    the first row. Raises PipelineError, naming a row, if a list is missing or has another length, or if a value is
    missing, not finite or above LARGEST.
    """
    matrix = unchecked_matrix(path, batch, column, name, dim, dim_of)
    if (bad := _first_unusable(matrix)) is not None:
        raise PipelineError(
            f"{path}: the {column} of {name(bad)} holds a value that is missing, not finite, or above {LARGEST:g}"
        )
    return matrix


def unchecked_matrix(
    path: Path, batch: pa.Table, column: str, name: Callable[[int], str], dim: int | None, dim_of: str
) -> np.ndarray:
    """The same with whatever values there are; NaN for those that are missing."""
    lists = batch[column].combine_chunks()
    kind = lists.type
    if not len(lists):
        return np.empty((0, dim or 0), np.float32)
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
    return values.to_numpy(zero_copy_only=False).reshape(-1, dim)


def refuse_zeros(path: Path, column: str, matrix: np.ndarray, name: Callable[[int], str]) -> None:
    """Raise PipelineError, naming the row, if a row of (n, D) cannot be normalised to length 1: if none of
    its values is as large as SMALLEST. `name`: see `embedding_matrix`."""
    is_half = matrix.dtype == np.float16  # whose smallest value that is not 0 is larger
    has_direction = matrix.any(axis=1) if is_half else np.abs(matrix).max(axis=1, initial=0) >= SMALLEST
    if not has_direction.all():
        zero = name(int(has_direction.argmin()))
        raise PipelineError(f"{path}: the {column} of {zero} is zero, or too short to have a direction")
