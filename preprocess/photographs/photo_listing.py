"""What a user's photographs are: a folder per building, a table, or a Hugging Face dataset on disk, as one list.

Images are read in the order of the list. Those of an Arrow file (datasets' save_to_disk) are addressed in it;
those inside Parquet files, which are compressed and encoded, cannot be.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from pyarrow import types

from common import parquet, provenance
from common.archives import tars
from common.errors import PipelineError, first_line
from common.imagery import decoding

TEXTS = ("id", "building", "panorama", "camera", "date")
NUMBERS = ("latitude", "longitude", "target_latitude", "target_longitude", "heading")  # degrees; null: not known
LISTED = pa.schema(
    [("name", pa.string()), *((n, pa.string()) for n in TEXTS), *((n, pa.float64()) for n in NUMBERS)]
)
_KINDS = (
    "a folder with a subfolder for each building, a CSV or Parquet table, or a folder of datasets' save_to_disk"
)
_ROWS = 64  # images of a table in memory at a time


class Place(NamedTuple):
    """Where an encoded image is, or the image itself."""

    file: str = ""  # relative to the listing's folder, or absolute; "": nowhere that can be addressed
    offset: int = 0  # bytes from the start of the file
    content: bytes | None = None  # None: the whole file


class Listing(NamedTuple):
    """N photographs, as they are described; nothing is checked."""

    folder: Path  # that files are relative to
    rows: pa.Table  # LISTED
    places: Callable[[], Iterator[Place]]  # of the N photographs, in order
    inputs: dict[str, str]  # for the record
    notes: list[str]  # what is not used
    is_packed: bool = False  # images that cannot be addressed are to be copied


def of(source: Path) -> Listing:
    """The photographs at `source`. Raises PipelineError if it is none of the four kinds, or empty."""
    states = sorted([*source.glob("state.json"), *source.glob("*/state.json")])  # of a dataset, or of its splits
    if states := [path for path in states if "_data_files" in path.read_text()]:
        listing = _of_dataset(source, states)
    elif tables := sorted([*source.glob("*.parquet"), *source.glob("data/*.parquet")]):
        listing = _of_tables(source, tables)
    elif source.is_dir():
        listing = _of_folder(source)
    elif source.suffix.lower() in (".csv", ".parquet") and source.is_file():
        listing = _of_csv(source) if source.suffix.lower() == ".csv" else _of_tables(source.parent, [source])
    else:
        what = "is none of these" if source.exists() else "does not exist"
        raise PipelineError(f"{source} {what}: {_KINDS}")
    if not listing.rows.num_rows:
        raise PipelineError(f"{source} holds no photographs: name {_KINDS}")
    return listing


def _of_folder(folder: Path) -> Listing:
    """The images of each subfolder are of the building that is called like it."""
    files = [path.relative_to(folder) for path in _files_below(folder)]
    # under a name that can be stored there is no file: it becomes a reject
    names = sorted(tars.printable(path.as_posix()) for path in files if decoding.is_named_image(path))
    buildings = [name.split("/")[0] if "/" in name else None for name in names]
    rows = _completed(pa.table({"name": names, "building": pa.array(buildings, pa.string())}), folder)
    others = len(files) - len(names)
    notes = [f"ignored files that are no images: {others:,}"] if others else []
    return Listing(folder, rows, lambda: map(Place, names), _inputs(folder, rows, names), notes)


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files but hidden ones, also in linked folders; a link to nothing counts as one. `above`: the
    folders that led here."""
    real = os.path.realpath(folder)
    for path in folder.iterdir() if real not in above else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, (*above, real))
        else:
            yield path


def _of_csv(path: Path) -> Listing:
    as_text = dict.fromkeys([*TEXTS, "label", "path"], pa.string())  # "0012" stays "0012"
    as_number = dict.fromkeys(NUMBERS, pa.float64())
    in_order = pyarrow.csv.ReadOptions(use_threads=False)  # messages then have the row
    options = pyarrow.csv.ConvertOptions(column_types=as_text | as_number, strings_can_be_null=True)
    try:
        table = pyarrow.csv.read_csv(path, in_order, convert_options=options)
    except pa.ArrowInvalid as error:
        raise PipelineError(
            f"{path} cannot be read as a CSV table: {first_line(error)}\n"
            "columns must be separated by commas, numbers have a decimal point, and the text be UTF-8"
        ) from None
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise PipelineError(f"{path} has a column twice: {', '.join(twice)}")
    return _of_paths(path, table)


def _of_paths(path: Path, table: pa.Table) -> Listing:
    """A table whose column `path` names files."""
    if "path" not in table.column_names:
        raise _no_column(path, "`path` of files, or `image` of encoded images", table)
    names = [name or "" for name in table["path"].cast(pa.string()).to_pylist()]
    rows = _completed(_named(table, names), path)
    inputs, notes = _inputs(path.parent, rows, names), _ignored(table, "path")
    return Listing(path.parent, rows, lambda: map(Place, names), inputs, notes)


def _of_tables(folder: Path, paths: list[Path]) -> Listing:
    """Parquet files with the images in them, or of paths."""
    schema = parquet.open_file(paths[0]).schema_arrow
    columns = [name for name in schema.names if name != "image"]
    table = _joined(folder, [parquet.read(path, columns) for path in paths])
    if "image" not in schema.names:
        return _of_paths(paths[0], table)
    _refuse_unencoded(paths[0], schema.field("image").type)

    def places() -> Iterator[Place]:
        for path in paths:
            for batch in parquet.batches(path, ["image"], _ROWS):
                for image in batch["image"].to_pylist():
                    image = image if isinstance(image, dict) else {"bytes": image}
                    content, file = image["bytes"], image.get("path")
                    yield Place(str((folder / file).absolute()) if file and content is None else "", 0, content)

    rows = _completed(_numbered(table), paths[0])
    return Listing(folder, rows, places, _files(paths), _ignored(table, "image"), is_packed=True)


def _of_dataset(folder: Path, states: list[Path]) -> Listing:
    """The Arrow files of a dataset, or of all splits of a DatasetDict."""
    paths = [
        state.parent / file["filename"]
        for state in states
        for file in json.loads(state.read_text())["_data_files"]
    ]
    batches = [(path, *_mapped(path)) for path in paths]
    table = _joined(folder, [pa.Table.from_batches(of_file) for _, _, of_file in batches if of_file])
    if "image" not in table.column_names:
        raise _no_column(folder, "`image`", table)
    _refuse_unencoded(folder, table.schema.field("image").type)

    def places() -> Iterator[Place]:
        for path, whole, of_file in batches:
            for batch in of_file:
                yield from _addressed(path.relative_to(folder).as_posix(), whole, batch["image"])

    rows = _completed(_numbered(table.drop_columns("image")), folder)
    return Listing(folder, rows, places, _files(paths), _ignored(table, "image"))


def _joined(folder: Path, tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:  # there are none, or columns differ
        raise PipelineError(f"the tables in {folder} do not fit together: {first_line(error)}") from None


def _refuse_unencoded(path: Path, kind: pa.DataType) -> None:
    encoded = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(encoded) or types.is_large_binary(encoded)):
        raise PipelineError(f"{path}: the column `image` holds {kind}, not encoded images (bytes)")


def _mapped(path: Path) -> tuple[pa.Buffer, list[pa.RecordBatch]]:
    """An Arrow file in memory, without reading it, and its batches, which point into it."""
    try:
        whole = pa.memory_map(str(path)).read_buffer()
        return whole, list(pa.ipc.open_stream(pa.BufferReader(whole)))
    except (OSError, pa.ArrowInvalid) as error:
        raise PipelineError(f"{path} cannot be read as an Arrow stream: {first_line(error)}") from None


def _addressed(file: str, whole: pa.Buffer, images: pa.Array) -> Iterator[Place]:
    """The places of a column of images. Raises PipelineError if the file is compressed."""
    paths: Sequence[str | None] = [None] * len(images)
    if types.is_struct(images.type):
        paths = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else paths
        images = images.field("bytes")
    _, offsets, content = images.buffers()
    if content is None:  # all by path
        yield from (Place(path or "") for path in paths)
        return
    kind = np.int64 if types.is_large_binary(images.type) else np.int32
    starts = np.frombuffer(offsets, kind)[images.offset :][: len(images) + 1].astype(np.int64)
    starts += content.address - whole.address
    if starts.min() < 0 or starts.max() > whole.size:
        raise PipelineError(f"{file} is compressed: its images cannot be read in place; write Parquet files")
    for (start, stop), path, is_here in zip(
        pairwise(starts.tolist()), paths, images.is_valid().to_pylist(), strict=True
    ):
        yield Place(file, start, whole[start:stop].to_pybytes()) if is_here else Place(path or "")


def _numbered(table: pa.Table) -> pa.Table:
    """With the number of each row as its name, and as its id if it has none."""
    numbers = pa.array([str(row) for row in range(table.num_rows)], pa.string())
    table = table if "id" in table.column_names else table.append_column("id", numbers)
    return _named(table, pc.binary_join_element_wise("row", numbers, " "))


def _named(table: pa.Table, names: Sequence[str] | pa.Array) -> pa.Table:
    table = table.drop_columns("name") if "name" in table.column_names else table
    return table.append_column("name", pa.array(names, pa.string()))


def _completed(table: pa.Table, path: Path) -> pa.Table:
    """The columns LISTED: in its types, null where absent. Raises PipelineError if there is no building."""
    if "building" not in table.column_names and "label" in table.column_names:  # as datasets call it
        table = table.append_column("building", table["label"])
    if "building" not in table.column_names:
        raise _no_column(path, "`building`", table)
    columns = []
    for field in LISTED:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        try:
            if types.is_floating(column.type) and types.is_string(field.type):  # pandas' way to have missing ids
                column = column.cast(pa.int64())
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            what = f"column {field.name} ({column.type}) cannot be read as {field.type}"
            raise PipelineError(f"{path}: {what}: {first_line(error)}") from None
    return pa.table(columns, schema=LISTED)


def _no_column(path: Path, what: str, table: pa.Table) -> PipelineError:
    columns = ", ".join(table.column_names)
    return PipelineError(
        f"{path} has no column {what}: {columns}\nnames of columns are in lower case, and separated by commas"
    )


def _ignored(table: pa.Table, *used: str) -> list[str]:
    names = [name for name in table.column_names if name not in (*TEXTS, *NUMBERS, *used, "label")]
    return [f"ignored columns: {', '.join(names)}"] if names else []


def _inputs(folder: Path, rows: pa.Table, names: list[str]) -> dict[str, str]:
    """For a record: the photographs by what is said of each, and the sizes of their files."""
    paths = [folder / name for name in names]
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    lines = ("\t".join(map(str, row.values())) for row in rows.append_column("size", [sizes]).to_pylist())
    return {"photographs": f"{len(names)} photographs, {provenance.digest_of(chr(10).join(lines))}"}


def _files(paths: list[Path]) -> dict[str, str]:
    """For a record: tables by number, since the splits of a dataset have files of the same name."""
    return {f"{number} {path.name}": provenance.identity(path) for number, path in enumerate(paths)}
