"""Intermediates of an older or foreign writer, brought to the current columns and types.

Nothing is guessed: a change that would lose a digit, or a file that contradicts itself, is Unfixable.
"""

import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from common import files, parquet, provenance, stages
from common.archives import tars
from common.errors import first_line
from common.provenance import Provenance
from common.schemas import INTERMEDIATES, REJECTS

_TEXT_IDS = {"building_id": "target_id", "streetview_image_id": "patch_id"}  # "<dataset>_<number>"
_EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}  # larger whole numbers may be rounded

Columns = dict[str, pa.ChunkedArray]


class Unfixable(Exception):
    """The file lacks something that does not follow from the rest of it, or contradicts itself."""


def fix(table: pa.Table, stem: str) -> tuple[pa.Table, list[str]]:
    """The table in the schema of the intermediates, and what had to change for that; nothing if it was right.

    `stem`: the name of the file, and of its tar, without a suffix. Raises Unfixable.
    """
    names = table.column_names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise Unfixable(f"has {', '.join(repeated)} more than once")
    columns = {field.name: _cast(table[field.name], field) for field in INTERMEDIATES if field.name in names}
    casts = {name: (table[name].type, column.type) for name, column in columns.items()}
    changes = [f"{name} from {old} to {new}" for name, (old, new) in casts.items() if old != new]
    extra = [name for name in names if name not in columns]
    changes += [f"drops {', '.join(extra)}"] if extra else []
    for name, value in (("dataset_id", int(stem) if stem.isdecimal() else None), ("tar_file", f"{stem}.tar")):
        if name not in columns and value is not None:
            columns[name] = pa.chunked_array(
                [pa.repeat(value, table.num_rows).cast(INTERMEDIATES.field(name).type)]
            )
    missing = [name for name in INTERMEDIATES.names if name not in columns and name not in _TEXT_IDS]
    if missing:
        raise Unfixable(f"lacks {', '.join(missing)}")
    for name, number in _TEXT_IDS.items():
        ids = _text_ids(columns["dataset_id"], columns[number])
        row = pc.index(pc.equal(columns.setdefault(name, ids), ids), False).as_py()
        if row >= 0:
            raise Unfixable(f"has {name} {columns[name][row]} in row {row:,}, whose numbers make it {ids[row]}")
    changes += [f"adds {name}" for name in sorted(columns.keys() - set(names))]
    _refuse_wrong_rows(columns, stem)
    if names != INTERMEDIATES.names and not changes:
        changes.append("reorders the columns")
    if b"pandas" in (table.schema.metadata or {}):
        changes.append("drops pandas' metadata")
    return pa.Table.from_arrays([columns[name] for name in INTERMEDIATES.names], schema=INTERMEDIATES), changes


def _text_ids(dataset: pa.ChunkedArray, number: pa.ChunkedArray) -> pa.ChunkedArray:
    """ "0088_1234" from 88 and 1234."""
    dataset = pc.utf8_lpad(dataset.cast(pa.string()), 4, "0")
    return pc.binary_join_element_wise(dataset, number.cast(pa.string()), "_")


def _refuse_wrong_rows(columns: Columns, stem: str) -> None:
    """Raise Unfixable if rows are not of the tar, or dataset, that the file is named after, or repeat an image."""
    for tar in pc.unique(columns["tar_file"]).to_pylist():
        if tars.stem(Path(tar)) != stem:
            raise Unfixable(f"has rows with tar_file = {tar}")
    for dataset in pc.unique(columns["dataset_id"]).to_pylist():
        if stem.isdecimal() and dataset != int(stem):
            raise Unfixable(f"has rows of dataset {dataset}")
    counts = pc.value_counts(columns["patch_id"])
    if len(counts) < len(columns["patch_id"]):
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]
        raise Unfixable(f"has patch_id {repeated['values']} in {repeated['counts'].as_py():,} rows")


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column in the field's type, with every value unchanged. Raises Unfixable."""
    try:
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        if plain.null_count:
            raise Unfixable(f"has {plain.null_count:,} rows without {field.name}")
        cast = _cast_exactly(plain, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        reason = first_line(error)
        raise Unfixable(f"has {field.name} as {column.type}, not {field.type}: {reason}") from None
    if pa.types.is_floating(field.type) and pc.any(pc.invert(pc.is_finite(cast))).as_py():
        raise Unfixable(f"has {field.name} that is not finite")
    return cast


def _cast_exactly(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """`column`: without nulls. Raises one of Arrow's errors where a value would change."""
    if column.type == pa.int64() and kind == pa.uint64():  # writers without unsigned numbers keep the same bits
        return pa.chunked_array([chunk.view(pa.uint64()) for chunk in column.chunks], pa.uint64())
    if column.type in _EXACT and pa.types.is_integer(kind):
        largest = pc.max(pc.abs(column.cast(pa.float64()))).as_py() or 0
        if largest > _EXACT[column.type]:
            raise pa.ArrowInvalid(f"{largest:.17g} may have been rounded")
    if pa.types.is_floating(column.type) and pa.types.is_floating(kind) and column.type.bit_width < kind.bit_width:
        raise pa.ArrowInvalid("its numbers have been rounded")  # a latitude as float32: by 0.4 m
    if pa.types.is_boolean(column.type) and not pa.types.is_boolean(kind):
        raise pa.ArrowInvalid("it holds no numbers")
    cast = column.cast(kind)
    if pa.types.is_boolean(kind) and pa.types.is_integer(column.type) and cast.cast(column.type) != column:
        raise pa.ArrowInvalid("it holds other numbers than 0 and 1")
    return cast


def source_of(path: Path, raw_dir: Path) -> tuple[Provenance, bool]:
    """The file's record and whether it is new: a foreign file is recorded as made from the tar of its name."""
    if parquet.has_provenance(path):
        return parquet.read_provenance(path), False
    candidates = sorted(raw_dir.glob(f"{glob.escape(path.stem)}.*"))
    named = [tar for tar in candidates if tars.is_named_so(tar) and tars.stem(tar) == path.stem]
    if not named:
        raise Unfixable(f"does not say what it was made from, and {raw_dir / path.stem}.tar does not exist")
    return provenance.record("process_tar", {}, stages.ids(named[:1])), True


def replace(path: Path, fixed: pa.Table, record: Provenance, is_foreign: bool, changes: list[str]) -> None:
    """Replace the file. For a foreign one, record among its rejects that rejected files are unknown."""
    rejects = files.beside(path.parent, "rejects") / path.name
    if is_foreign and not rejects.exists():
        with parquet.writer(rejects, REJECTS, record) as out:
            out.facts = {"unknown": "the intermediates were not made by process_tar.py"}
    with parquet.writer(path, INTERMEDIATES, record) as out:
        out.append(fixed)
        out.rows = {name: count for name, count in record.rows.items() if name != "out"}
        out.facts = {"schema_fixed": changes}
        if out.num_rows != parquet.num_rows(path):
            raise AssertionError(f"{path}: {out.num_rows} rows would replace {parquet.num_rows(path)}")
