"""Intermediates of an older or foreign writer, brought to today's columns and types.

Nothing is guessed: what would lose a digit, or contradicts the rest of the file, is Unfixable.
"""

import pyarrow as pa
import pyarrow.compute as pc

from common.schemas import INTERMEDIATES

_TEXT_IDS = {"building_id": "target_id", "streetview_image_id": "patch_id"}  # "<dataset>_<number>"
_TEXT_ID = r"^(?:(?P<dataset>\d{1,9})_)?(?P<number>\d{1,18})$"
_EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}  # up to here a float is a whole number


class Unfixable(Exception):
    """The file lacks something that does not follow from the rest of it, or contradicts itself."""


def fix(table: pa.Table, stem: str) -> tuple[pa.Table, list[str]]:
    """The table in the schema of the intermediates, and what was changed for that; nothing if it was right.

    `stem`: of the file's name, that of its tar. Raises Unfixable.
    """
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise Unfixable(f"has {', '.join(twice)} more than once")
    changes, columns = [], {}
    extra = [name for name in table.column_names if name not in INTERMEDIATES.names]
    if extra:
        changes.append(f"drops {', '.join(extra)}")
    for field in INTERMEDIATES:
        if field.name in table.column_names:
            column = table[field.name]
            columns[field.name] = _cast(column, field)
            if column.type != field.type:
                changes.append(f"{field.name} from {column.type} to {field.type}")
    for name in _add_what_follows(columns, stem, table.num_rows):
        changes.append(f"adds {name}")
    missing = [field.name for field in INTERMEDIATES if field.name not in columns]
    if missing:
        raise Unfixable(f"lacks {', '.join(missing)}")
    for name, number in _TEXT_IDS.items():
        ids = _text_ids(columns["dataset_id"], columns[number])
        if ids != columns[name]:
            _refuse_contradiction(name, columns[name], ids)
            changes.append(f"writes {name} as in {ids[0].as_py()}")
            columns[name] = ids
    _refuse_another_tar(columns, stem)
    _refuse_twice(columns["patch_id"])
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
            for part, text in _parts(columns[name]).items():
                found = number if part == "number" else "dataset_id"
                if found not in columns and not text.null_count:
                    columns[found] = text.cast(INTERMEDIATES.field(found).type)
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
    return pc.binary_join_element_wise(dataset, number.cast(pa.string()), "_")


def _parts(ids: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """The dataset and the number of ids with these two in any notation, or the number alone; else null."""
    parts = pc.extract_regex(ids, _TEXT_ID)
    dataset, number = (pc.struct_field(parts, name) for name in ("dataset", "number"))
    return {"dataset": pc.if_else(pc.equal(dataset, ""), None, dataset), "number": number}


def _refuse_contradiction(name: str, there: pa.ChunkedArray, ids: pa.ChunkedArray) -> None:
    """Raise Unfixable unless ids differ in their notation alone. `ids`: those that follow from the numbers."""
    says, follows = _parts(there), _parts(ids)
    same = pc.equal(says["number"].cast(pa.int64()), follows["number"].cast(pa.int64()))
    of_dataset = pc.equal(says["dataset"].cast(pa.int64()), follows["dataset"].cast(pa.int64()))
    same = pc.and_kleene(pc.fill_null(same, False), pc.fill_null(of_dataset, True))
    row = pc.index(same, False).as_py()
    if row >= 0:
        raise Unfixable(
            f"has {name} {there[row].as_py()} in row {row:,}, whose numbers make it {ids[row].as_py()}"
        )


def _refuse_another_tar(columns: dict[str, pa.ChunkedArray], stem: str) -> None:
    """Raise Unfixable where a row is of another tar, or dataset, than the file's name says."""
    for tar in pc.unique(columns["tar_file"]).to_pylist():
        if tar.rpartition(".")[0] != stem:
            raise Unfixable(f"has rows with tar_file = {tar}")
    for dataset in pc.unique(columns["dataset_id"]).to_pylist():
        if stem.isascii() and stem.isdigit() and dataset != int(stem):
            raise Unfixable(f"has rows of dataset {dataset}")


def _refuse_twice(patch_id: pa.ChunkedArray) -> None:
    found = pc.value_counts(patch_id)
    if len(found) < len(patch_id):
        often = found.filter(pc.greater(found.field("counts"), 1))[0]
        raise Unfixable(f"has patch_id {often['values'].as_py()} in {often['counts'].as_py():,} rows")


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column in the field's type, each value being as before. Raises Unfixable."""
    try:
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        if plain.null_count:
            raise Unfixable(f"has {plain.null_count:,} rows without {field.name}")
        cast = _cast_exactly(plain, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        why = str(error).splitlines()[0]
        raise Unfixable(f"has {field.name} as {column.type}, not {field.type}: {why}") from None
    if pa.types.is_floating(field.type) and pc.any(pc.invert(pc.is_finite(cast))).as_py():
        raise Unfixable(f"has {field.name} that is not finite")
    return cast


def _cast_exactly(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """`column`: without nulls. Raises one of Arrow's errors where a value would change."""
    if column.type == pa.int64() and kind == pa.uint64():  # writers without unsigned numbers: the same bits
        return pa.chunked_array([chunk.view(pa.uint64()) for chunk in column.chunks], pa.uint64())
    if column.type in _EXACT and pa.types.is_integer(kind):
        largest = pc.max(pc.abs(column.cast(pa.float64()))).as_py() or 0
        if largest > _EXACT[column.type]:
            raise pa.ArrowInvalid(f"{largest:.17g} may have been rounded")
    if pa.types.is_floating(column.type) and pa.types.is_floating(kind) and column.type.bit_width < kind.bit_width:
        raise pa.ArrowInvalid("its numbers have been rounded")  # a latitude as float32: by 0.4 m
    if pa.types.is_boolean(column.type) and not pa.types.is_boolean(kind):
        raise pa.ArrowInvalid("it holds no numbers")
    if pa.types.is_boolean(kind) and pa.types.is_integer(column.type):
        minimum, maximum = pc.min_max(column).values()
        if len(column) and not 0 <= minimum.as_py() <= maximum.as_py() <= 1:
            raise pa.ArrowInvalid("it holds other numbers than 0 and 1")
    return column.cast(kind)
