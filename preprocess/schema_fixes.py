"""Intermediates of an older or foreign writer, brought to today's columns and types."""

import pyarrow as pa
import pyarrow.compute as pc

from common.schemas import INTERMEDIATES

_TEXT_IDS = {"building_id": "target_id", "streetview_image_id": "patch_id"}  # "<dataset>_<number>"


class Unfixable(Exception):
    """The file lacks something that does not follow from the rest of it."""


def fix(table: pa.Table, stem: str) -> tuple[pa.Table, list[str]]:
    """The table in the schema of the intermediates, and what was changed for that; nothing if it was right.

    `stem`: of the file's name, that of its tar. Raises Unfixable.
    """
    changes = []
    columns = {name: table[name] for name in table.column_names if name in INTERMEDIATES.names}
    extra = [name for name in table.column_names if name not in columns]
    if extra:
        changes.append(f"drops {', '.join(extra)}")
    for name in _add_what_follows(columns, stem, table.num_rows):
        changes.append(f"adds {name}")
    missing = [field.name for field in INTERMEDIATES if field.name not in columns]
    if missing:
        raise Unfixable(f"lacks {', '.join(missing)}")
    for field in INTERMEDIATES:
        column = columns[field.name]
        if column.null_count:
            raise Unfixable(f"has {column.null_count:,} rows without {field.name}")
        if column.type != field.type:
            changes.append(f"{field.name} from {column.type} to {field.type}")
            columns[field.name] = _cast(column, field)
    for name, number in _TEXT_IDS.items():
        ids = _text_ids(columns["dataset_id"], columns[number])
        if not pc.all(pc.equal(ids, columns[name])).as_py() and table.num_rows:
            changes.append(f"writes {name} as in {ids[0].as_py()}")
            columns[name] = ids
    if table.column_names != INTERMEDIATES.names and not changes:
        changes.append("puts the columns in order")
    if b"pandas" in (table.schema.metadata or {}):
        changes.append("drops pandas' metadata")
    return pa.Table.from_arrays([columns[name] for name in INTERMEDIATES.names], schema=INTERMEDIATES), changes


def _add_what_follows(columns: dict[str, pa.ChunkedArray], stem: str, num_rows: int) -> list[str]:
    """Add the missing columns that others, or the file's name, determine; returns their names."""
    before = set(columns)
    for name, number in _TEXT_IDS.items():
        if name in columns and not {"dataset_id", number} <= set(columns):
            parts = pc.extract_regex(columns[name].cast(pa.string()), r"^(?P<dataset>\d+)_(?P<number>\d+)$")
            columns.setdefault("dataset_id", pc.struct_field(parts, "dataset").cast(pa.int32()))
            columns.setdefault(number, pc.struct_field(parts, "number").cast(pa.int64()))
    if "dataset_id" not in columns and stem.isascii() and stem.isdigit():
        columns["dataset_id"] = pa.chunked_array([pa.repeat(pa.scalar(int(stem), pa.int32()), num_rows)])
    for name, number in _TEXT_IDS.items():
        if name not in columns and {"dataset_id", number} <= set(columns):
            columns[name] = _text_ids(columns["dataset_id"], columns[number])
    columns.setdefault("tar_file", pa.chunked_array([pa.repeat(f"{stem}.tar", num_rows)]))
    return sorted(set(columns) - before)


def _text_ids(dataset: pa.ChunkedArray, number: pa.ChunkedArray) -> pa.ChunkedArray:
    """ "0088_1234" from 88 and 1234."""
    dataset = pc.utf8_lpad(dataset.cast(pa.string()), 4, "0")
    return pc.binary_join_element_wise(dataset, number.cast(pa.int64()).cast(pa.string()), "_")


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type == pa.int64() and field.type == pa.uint64():  # writers without unsigned numbers: the same bits
        return pa.chunked_array([chunk.view(pa.uint64()) for chunk in column.chunks], pa.uint64())
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise Unfixable(f"{field.name} is {column.type}, not {field.type}: {error}") from None
