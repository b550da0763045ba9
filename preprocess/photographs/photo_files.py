"""The images of a listing: read and checked by several threads, and copied where they cannot be read in place."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from common import files, parquet, schemas
from common.archives import tars
from common.provenance import Provenance
from common.schemas import Reject, Rejected, count_reasons
from preprocess.photographs import photo_columns
from preprocess.photographs.photo_listing import Listing, Place
from preprocess.tars import jpegs
from preprocess.tars.jpegs import Jpeg

_AT_ONCE = 64  # photographs that the threads check before more are read


class Checked(NamedTuple):
    """A photograph of the listing."""

    number: int
    place: Place
    size: int  # bytes
    jpeg: Jpeg | Rejected


def check(
    listing: Listing, rows: pd.DataFrame, threads: int, copy: Callable[[str, bytes], int] | None
) -> Iterator[Checked]:
    """Every photograph, in order. `rows`: see `photo_columns.normalised`; `copy`: keeps an image that cannot be
    addressed, and returns its offset."""
    used_ids: set[str] = set()

    def inspect(task: tuple[int, Place, Rejected | None]) -> tuple[Checked, bytes]:
        number, place, why = task
        content = why or _content(listing.folder, place)
        if isinstance(content, Rejected):
            return Checked(number, place, 0, content), b""
        return Checked(number, place, len(content), jpegs.inspect(content)), b"" if place.file else content

    tasks = (
        (number, place, photo_columns.reject_of(row, used_ids))
        for (number, row), place in zip(enumerate(rows.itertuples()), listing.places(), strict=True)
    )
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(tasks, _AT_ONCE)):
            for checked, content in pool.map(inspect, batch):
                if content and copy and isinstance(checked.jpeg, Jpeg):
                    offset = copy(rows["name"].iloc[checked.number], content)
                    checked = checked._replace(place=Place("", offset))
                yield checked._replace(place=checked.place._replace(content=None))


def _content(folder: Path, place: Place) -> bytes | Rejected:
    if place.content is not None:
        return place.content
    try:
        return (folder / place.file).read_bytes() if place.file else Rejected(Reject.IMAGE_MISSING)
    except FileNotFoundError:
        return Rejected(Reject.IMAGE_MISSING, "there is no such file, or its name is not UTF-8")
    except OSError as error:
        return Rejected(Reject.JPEG_CORRUPT, f"cannot be read: {error.strerror}")


def packed(intermediates_dir: Path, name: str) -> Path:
    """The tar with the images of a set that cannot be read in place."""
    return files.beside(intermediates_dir, "images") / f"{name}.tar"


@contextlib.contextmanager
def packing(path: Path) -> Iterator[Callable[[str, bytes], int]]:
    """A tar that appears when whole; gives a function that adds an image and returns its offset."""
    with files.atomic(path) as file, tarfile.open(fileobj=file, mode="w") as tar:

        def add(name: str, content: bytes) -> int:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            return tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

        yield add


def rejects_of(rows: pd.DataFrame, photographs: list[Checked]) -> list[tuple[str, Rejected]]:
    """The names of the photographs that are rejected, and why."""
    return [(rows["name"].iloc[p.number], p.jpeg) for p in photographs if isinstance(p.jpeg, Rejected)]


def write_rejects(
    path: Path, rejected: list[tuple[str, Rejected]], num_photographs: int, record: Provenance
) -> dict:
    """Write why photographs are rejected; returns counts for records."""
    reasons = count_reasons(why for _, why in rejected)
    counts = {"in": num_photographs, "rejects": len(rejected), "rejected": reasons}
    with parquet.writer(path, schemas.REJECTS, record) as out:
        out.append(
            {
                "member": [tars.printable(name) for name, _ in rejected],
                "reason": [why.reason.value for _, why in rejected],
                "detail": [why.detail for _, why in rejected],
            }
        )
        out.rows = counts
    return counts


def write(
    path: Path, rows: pd.DataFrame, photographs: list[Checked], record: Provenance, counts: dict, folder: str
) -> list[str]:
    """Write the intermediates of the valid photographs; returns notes for the summary. `folder`: of the files, ""
    for those packed into a tar."""
    name = path.stem
    valid = [(p.number, p.place, p.size, p.jpeg) for p in photographs if isinstance(p.jpeg, Jpeg)]
    numbers, places, sizes, found = zip(*valid, strict=True)
    kept = rows.iloc[list(numbers)]
    location = {
        "image_path": kept["name"].tolist(),
        "tar_file": [f"{name}/{place.file or packed(path.parent, name).name}" for place in places],
        "image_offset": [place.offset for place in places],
        "image_size": list(sizes),
    }
    columns = photo_columns.columns(name, kept, found) | location
    with parquet.writer(path, schemas.INTERMEDIATES, record) as out:
        out.append(columns)
        out.rows = counts
        out.facts = {"folder": folder}
    return photo_columns.notes(columns)
