"""Parquet files of any origin through the published model, a row group at a time, in parts that resume."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from common import cli, parquet, provenance, schemas
from common.cli import Progress
from common.errors import PipelineError
from common.imagery.tar_images import TarImages
from common.provenance import Provenance, digest_of
from common.schemas import Rejected, count_reasons
from common.sections import Infrastructure
from generate import embedding_parts, loop
from publish.inference.published_model import Published

PROJECT_ROWS = 8_192  # embeddings through the head at a time: 25 MB of float32 at 768 dimensions
IMAGE_ROWS = 1_024  # encoded images held at a time: 40 MB of the dataset's
EMBEDDING = "embedding"  # the column that is written
MEMBER = ("tar_file", "image_offset", "image_size")  # of the intermediates: where an image lies
_TAIL_BYTES = 65_536  # of a file, with its footer: where the row groups lie, their sizes and extremes


@dataclass(frozen=True)
class VectorTable:
    """A run of row groups of a Parquet file, and the file for their vectors."""

    path: Path
    column: str | None  # that the vectors are made of; None: the columns that say where in a tar an image lies
    holds_images: bool
    others: pa.Schema  # the columns carried through
    groups: range  # row groups
    start: int  # number of the first row
    num_rows: int
    target: Path
    made: Provenance

    def schema(self, dim: int) -> pa.Schema:
        return self.others.append(pa.field(EMBEDDING, schemas.vector(pa.float32(), dim)))


def files(source: Path, out: Path) -> list[Path]:
    """The Parquet files that `source` means. Raises PipelineError if there are none, or `out` replaces them."""
    found = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not found or not source.exists():
        raise PipelineError(f"{source} {'holds no .parquet file' if source.exists() else 'does not exist'}")
    if found[0].parent.resolve() == out.resolve():
        raise PipelineError(f"{out} is the folder of the input: its files would be replaced; name another")
    return found


def parts_of(path: Path, out: Path, column: str | None, size: int, model: dict) -> list[VectorTable]:
    """A file's parts: whole row groups, at least `size` rows. `model`: see `inference.identity`.

    Raises PipelineError without a usable column.
    """
    with parquet.open_file(path) as file:
        schema = file.schema_arrow
        group_rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    chosen, holds_images, others = _usable(path, schema, column)
    settings = {**model, "column": chosen, "data.rows_per_part": size}
    made = provenance.record("generate_embeddings_from_parquet", settings, {path.name: _identity(path)})
    found: list[VectorTable] = []
    first = start = 0
    for group in range(max(len(group_rows), 1)):
        count = sum(group_rows[first : group + 1])
        if count >= size or group + 1 >= len(group_rows):
            target = out / f"{path.stem}-{len(found)}.parquet"
            groups = range(first, min(group + 1, len(group_rows)))
            found.append(VectorTable(path, chosen, holds_images, others, groups, start, count, target, made))
            first, start = group + 1, start + count
    return found


def _usable(path: Path, schema: pa.Schema, column: str | None) -> tuple[str | None, bool, pa.Schema]:
    """(the column to use, whether it holds images, the other columns); see `VectorTable`."""
    kinds = {field.name: _kind(field.type) for field in schema if _kind(field.type)}
    listing = ", ".join(f"{field.name} ({field.type})" for field in schema)
    chosen = column or (EMBEDDING if EMBEDDING in kinds else None)
    if chosen is None and len(kinds) == 1:
        chosen = next(iter(kinds))
    if chosen is None and len(kinds) > 1:
        raise PipelineError(f"{path}: choose one of {', '.join(kinds)} with --column")
    if chosen is None and not kinds and set(MEMBER) <= set(schema.names):
        return None, True, schema.remove_metadata()
    if chosen not in kinds:
        what = f"column {chosen}" if chosen else "column"
        raise PipelineError(f"{path} has no {what} of embeddings (lists of floats) or images (bytes): {listing}")
    others = schema.remove(schema.get_field_index(chosen)).remove_metadata()
    if EMBEDDING in others.names:
        raise PipelineError(f"{path} has a column {EMBEDDING} already: rename it, or drop --column to use it")
    return chosen, kinds[chosen] == "images", others


def _kind(kind: pa.DataType) -> str | None:
    """What a column of this type can hold for us: "embeddings", "images" or nothing."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "embeddings" if pa.types.is_floating(kind.value_type) else None
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "images" if "bytes" in names and _kind(kind.field("bytes").type) == "images" else None
    return "images" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _identity(path: Path) -> str:
    """What a Parquet file of any origin is known by: its size and its end, where Parquet describes the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        return f"{size} bytes, {digest_of(file.read())}"


def project(table: VectorTable, published: Published, times: loop.Times, progress: Progress) -> None:
    """Embeddings of a file through the head."""
    with parquet.writer(table.target, table.schema(published.dim), table.made) as out:
        times.lap()
        for rows, ends_group in _batches(table, PROJECT_ROWS):
            embeddings = _matrix(rows[table.column], published.model.config.input_dim, table)
            times.read += times.lap()
            vectors = published.project(torch.from_numpy(embeddings)).numpy()
            times.compute += times.lap()
            _append(out, rows.drop([table.column]), vectors, ends_group)
            progress.add(len(vectors))
            times.write += times.lap()
        out.rows = {"in": table.num_rows}


class _Rows(NamedTuple):
    """What a job of the loop is known by."""

    table: VectorTable
    others: pa.Table  # its rows, without the images
    ends_group: bool


def embed_images(
    tables: list[VectorTable],
    store: TarImages,
    published: Published,
    settings: Infrastructure,
    times: loop.Times,
    progress: Progress,
) -> None:
    """Images of files through the whole model, in one go: the device does not wait between two files.

    Rows without a whole image become rejects, by their number.
    """
    results = loop.embed(
        (job for table in tables for job in _jobs(table, store)),
        published.forward,
        published.preprocessing,
        published.device,
        settings,
        times,
        progress,
    )
    for table, of_table in groupby(results, key=lambda result: result.job.name.table):
        _write_vectors(table, of_table, published.dim)
        cli.check_stop()


def _write_vectors(table: VectorTable, results: Iterable[loop.Result], dim: int) -> None:
    failed: dict[str, Rejected] = {}
    start = table.start
    with parquet.writer(table.target, table.schema(dim), table.made) as out:
        for result in results:
            if changed := embedding_parts.change_of(result.failed):
                raise PipelineError(changed)
            numbers = pa.array([f"row {start + row}" for row in range(result.job.count)])
            vectors = result.vectors.reshape(-1, dim)
            embedding_parts.refuse_not_finite(vectors, numbers.take(pa.array(result.rows)), table.path)
            rows = result.job.name.others.take(pa.array(result.rows))
            _append(out, rows, vectors, result.job.name.ends_group)
            failed |= embedding_parts.named(result.failed, numbers)
            start += result.job.count
        embedding_parts.write_rejects(table.target, table.made, failed)
        out.rows = {"in": table.num_rows, **count_reasons(failed.values())}


def _batches(table: VectorTable, size: int) -> Iterator[tuple[pa.Table, bool]]:
    """The rows of a part, at most `size` at a time, and whether they end a row group."""
    with parquet.open_file(table.path) as file:
        for group in table.groups:
            missing = file.metadata.row_group(group).num_rows
            for rows in parquet.batches_of(table.path, file, range(group, group + 1), size=size):
                missing -= rows.num_rows
                yield rows, missing == 0


def _jobs(table: VectorTable, store: TarImages) -> Iterator[loop.Job]:
    """What the loop reads of a file; one job without images if it has no rows."""
    if not table.num_rows:
        yield loop.Job(_Rows(table, table.others.empty_table(), False), 0, lambda start, stop: [])
    for rows, ends_group in _batches(table, IMAGE_ROWS):
        if table.column is None:
            name = _Rows(table, rows, ends_group)
            yield loop.Job(name, rows.num_rows, _reader_of_members(store, rows))
            continue
        images = rows[table.column].combine_chunks()
        if pa.types.is_struct(images.type):
            images = images.field("bytes")
        name = _Rows(table, rows.drop([table.column]), ends_group)
        yield loop.Job(name, rows.num_rows, _reader(images))


def _reader_of_members(store: TarImages, rows: pa.Table):
    return lambda start, stop: store.read(rows.slice(start, stop - start))


def _reader(images: pa.Array):
    return lambda start, stop: images[start:stop].to_pylist()


def _matrix(column: pa.ChunkedArray, dim: int, table: VectorTable) -> np.ndarray:
    """A column of lists as (n, dim) float32. Raises PipelineError where a row has no, another number of, or no
    usable numbers.
    """
    where = f"{table.path}, column {table.column}"
    lists = column.combine_chunks()
    if lists.null_count:
        raise PipelineError(f"{where}: {lists.null_count:,} of {len(lists):,} rows hold no embedding; remove them")
    others = set(pc.unique(pc.list_value_length(lists)).to_pylist()) - {dim}
    if others:
        raise PipelineError(
            f"{where} holds vectors of {min(others)} numbers; the model's head takes {dim}: those of its backbone "
            "and pooling"
        )
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)
    if not parquet.is_usable(values):
        raise PipelineError(f"{where} holds vectors with numbers that are missing, not finite, or too large")
    return values


def _append(out: parquet.Writer, others: pa.Table, vectors: np.ndarray, ends_group: bool) -> None:
    """Add rows; the row groups of the input end in the output too, whatever its columns weigh."""
    columns = {name: others[name] for name in others.column_names}
    out.append({**columns, EMBEDDING: np.ascontiguousarray(vectors, np.float32)})
    if ends_group:
        out.flush()
