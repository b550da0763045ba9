"""Which building an image shows, from labels alone: a user's table, or the intermediates of the dataset's tars.

The names of images say nothing: photographs of one's own may be called like the dataset's.
"""

import filecmp
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from common import parquet, provenance
from common.archives import tars
from common.errors import PipelineError, first_line

IMAGE, BUILDING = "image", "building"  # columns of a user's table


def of_table(path: Path) -> dict[str, str]:
    """Image -> building, of a CSV or Parquet table with these two columns. Raises PipelineError if it cannot be
    read, lacks one, or gives an image two buildings."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist: name a table with the columns {IMAGE} and {BUILDING}")
    table = parquet.read(path) if path.suffix == ".parquet" else _read_csv(path)
    missing = [name for name in (IMAGE, BUILDING) if name not in table.column_names]
    if missing:
        raise PipelineError(f"{path} has no column {missing[0]}: it has {', '.join(table.column_names)}")
    table = table.select([IMAGE, BUILDING]).drop_null()
    images, buildings = (table[name].cast(pa.string()).to_pylist() for name in (IMAGE, BUILDING))
    labels = dict(zip(images, buildings, strict=True))
    for image, building in zip(images, buildings, strict=True):
        if labels[image] != building:
            raise PipelineError(f"{path} gives {image} two buildings, {building} and {labels[image]}")
    return labels


def of_query(labels: dict[str, str], query: str, folder: Path | None) -> str | None:
    """The building of the image `query`: of the row with its path as typed, or else with the longest end of its
    path, down to the file's name. A row that names another image in `folder` is passed over."""
    if query in labels:
        return labels[query]
    parts = Path(query.replace(":", "/")).absolute().parts  # TAR:MEMBER
    ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
    return next((labels[end] for end in ends if end in labels and not _is_other(query, end, folder)), None)


def _is_other(query: str, name: str, folder: Path | None) -> bool:
    """Whether `name` is a file in `folder`, and not the same as the query."""
    if folder is None or not (folder / name).is_file():
        return False
    return not (Path(query).is_file() and filecmp.cmp(query, folder / name, shallow=False))


def of_tar(tar: Path, intermediates_dir: Path) -> dict[str, str]:
    """Member -> building of a tar of the dataset, from its intermediates; empty for any other tar."""
    path = intermediates_dir / f"{tars.stem(tar)}.parquet"
    if not (tar.is_file() and path.is_file()):
        return {}
    if parquet.read_provenance(path).inputs.get(tar.name) != provenance.identity(tar):
        return {}
    rows = parquet.read(path, ["image_path", "building_id"])
    return dict(zip(rows["image_path"].to_pylist(), rows["building_id"].to_pylist(), strict=True))


def of_member(name: str, intermediates_dir: Path) -> str | None:
    """The building of an image named TAR:MEMBER, if the tar is one of the dataset; else None."""
    tar, colon, member = name.rpartition(":")
    return of_tar(Path(tar), intermediates_dir).get(member) if colon and tars.is_named_so(Path(tar)) else None


def _read_csv(path: Path) -> pa.Table:
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys((IMAGE, BUILDING), pa.string()))
    try:
        return pyarrow.csv.read_csv(path, convert_options=as_text)
    except pa.ArrowInvalid as error:
        raise PipelineError(f"{path} cannot be read as a CSV table: {first_line(error)}") from None
