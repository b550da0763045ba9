"""The parts of a tar: runs of rows of its intermediates, each of which has a file of its own in later stages.

Parts are what those stages resume by, and what their tasks share: where there are more tasks than tars, several
take parts of one tar.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common import files, parquet, provenance, schemas
from common.archives import tars
from common.config import values
from common.errors import StaleArtefact
from common.provenance import Provenance
from common.sections import Config


@dataclass(frozen=True)
class TarPart:
    """Rows start..start + count of a tar's intermediates, and the file that is made from them."""

    tar: Path
    source: Path  # the tar's intermediates
    start: int
    count: int
    target: Path
    made: Provenance

    def rows(self) -> pa.Table:
        """The part's rows of the intermediates."""
        return parquet.read(self.source, schemas.INTERMEDIATES.names).slice(self.start, self.count)


def of_tar(cfg: Config, tar: Path, folder: Path, stage: str, settings: dict) -> list[TarPart]:
    """A tar's parts in `folder`, made by `stage`; one part without rows if the tar has no valid image."""
    source = cfg.paths.intermediates_dir / f"{tars.stem(tar)}.parquet"
    parquet.require(source, "preprocess/process_tar.py")
    size, num_rows = cfg.data.rows_per_part, parquet.num_rows(source)
    made = provenance.record(stage, {**settings, **values(cfg, "data.rows_per_part")}, [tar, source])
    return [
        TarPart(tar, source, number * size, min(size, num_rows - number * size), path, made)
        for number, path in enumerate(targets(folder, tar, count(num_rows, size)))
    ]


def missing(
    cfg: Config, folder: Path, stage: str, settings: dict, shard: int, num_shards: int, overwrite: bool
) -> tuple[list[TarPart], int]:
    """The parts that a task has to make, and how many of its parts there are in all.

    Raises StaleArtefact for files in `folder` that are of something else, or of another division; to `overwrite`
    the former are made again and the latter removed.
    """
    todo, total = [], 0
    for share in tars.shares_of(tars.of_shard(cfg.paths.raw_dir, 0, 1), shard, num_shards):
        whole = of_tar(cfg, share.tar, folder, stage, settings)
        own = [whole[number] for number in share.of(len(whole))]
        todo += [part for part in own if not parquet.is_done(part.target, part.made, overwrite)]
        total += len(own)
        refuse_surplus(folder, tars.stem(share.tar), len(whole), overwrite)
    return todo, total


def count(num_rows: int, rows_per_part: int) -> int:
    """How many parts so many rows have."""
    return max(1, -(-num_rows // rows_per_part))


def targets(folder: Path, tar: Path, num_parts: int) -> list[Path]:
    """The files of a tar's parts."""
    return [folder / f"{tars.stem(tar)}-{number}.parquet" for number in range(num_parts)]


def refuse_surplus(folder: Path, name: str, num_parts: int, overwrite: bool) -> None:
    """Files <name>-<part> beyond the parts that there are hold images twice: an error, or removed to overwrite."""
    escaped = glob.escape(name)
    surplus = [
        path
        for place in (folder, files.beside(folder, "rejects"))
        for path in place.glob(f"{escaped}-*.parquet")
        if path.stem.removeprefix(f"{name}-").isdecimal() and int(path.stem.rpartition("-")[2]) >= num_parts
    ]
    if surplus and not overwrite:
        raise StaleArtefact(
            f"{surplus[0]} is left from another division of {name}, which has {num_parts} parts now\n"
            "delete it, put data.rows_per_part or the images back, or redo it all with --overwrite"
        )
    for path in surplus:
        path.unlink(missing_ok=True)  # another task of the same tar may have been here
