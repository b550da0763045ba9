"""The parts of a tar, or of an imported set (image_origins.py): runs of rows of its intermediates, each of which
has a file of its own in later stages.

Those stages resume by part, and divide the work by part if there are more tasks than tars.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common import errors, files, parquet, provenance, schemas, stages
from common.archives import image_origins, tars
from common.errors import StaleArtefact
from common.provenance import Provenance, Redo
from common.sections import Config
from common.stages import Output, Stage


@dataclass(frozen=True)
class TarPart:
    """Rows start..start + count of a tar's intermediates, and the file that is made from them."""

    tar: Path  # or the intermediates of an imported set
    source: Path  # the tar's intermediates
    start: int
    count: int
    target: Path
    record: Provenance

    def rows(self) -> pa.Table:
        """The part's rows of the intermediates."""
        return parquet.read(self.source, schemas.INTERMEDIATES.names).slice(self.start, self.count)


def of_tar(cfg: Config, stage: Stage, tar: Path, settings: dict) -> list[TarPart]:
    """A tar's parts as `stage` makes them; one part without rows if the tar has no valid image. `settings`: what
    the stage records.
    """
    source = image_origins.intermediates(cfg.paths, tar)
    size, num_rows = cfg.data.rows_per_part, parquet.num_rows(source)
    record = provenance.record(stage.name, settings, stages.ids([tar, source]))
    return [
        TarPart(tar, source, number * size, min(size, num_rows - number * size), path, record)
        for number, path in enumerate(targets(stage.folder(cfg), tar, count(num_rows, size)))
    ]


def outputs(cfg: Config, stage: Stage, task: int, num_tasks: int) -> Iterator[Output]:
    """The files of a task of a stage that works by parts. An error about tars without intermediates comes last."""
    for own, _ in _of_task(cfg, stage, task, num_tasks):
        yield from (Output(part.target, part.record) for part in own)


def missing(cfg: Config, stage: Stage, shard: int, num_shards: int, redo: Redo) -> tuple[list[TarPart], int]:
    """The parts that a task still has to make, and the number of all its parts.

    Raises StaleArtefact for files in `folder` that were made from something else, or with a different division
    into parts, unless `redo` allows to remake the former and to remove the latter.
    """
    todo, divided = [], list(_of_task(cfg, stage, shard, num_shards))
    for own, whole in divided:
        todo += [part for part in own if not parquet.is_done(part.target, part.record, redo)]
        refuse_surplus(stage.folder(cfg), tars.stem(whole[0].tar), len(whole), redo)
    return todo, sum(len(own) for own, _ in divided)


def _of_task(
    cfg: Config, stage: Stage, task: int, num_tasks: int
) -> Iterator[tuple[list[TarPart], list[TarPart]]]:
    """(the task's parts, all parts) of each tar that it works on. At the end raises PipelineError if some of them
    have no intermediates."""
    settings = stage.recorded_settings(cfg)
    shares = list(tars.shares_of(image_origins.of_paths(cfg.paths), task, num_tasks))
    sources = [image_origins.intermediates(cfg.paths, share.tar) for share in shares]
    for share, source in zip(shares, sources, strict=True):
        if source.exists():
            whole = of_tar(cfg, stage, share.tar, settings)
            yield [whole[number] for number in share.of(len(whole))], whole
    files.require_all(dict.fromkeys(sources, "preprocess/process_tar.py"))


def count(num_rows: int, rows_per_part: int) -> int:
    """The number of parts that `num_rows` rows are divided into."""
    return max(1, -(-num_rows // rows_per_part))


def targets(folder: Path, tar: Path, num_parts: int) -> list[Path]:
    """The files of a tar's parts."""
    return [folder / f"{tars.stem(tar)}-{number}.parquet" for number in range(num_parts)]


def refuse_surplus(folder: Path, name: str, num_parts: int, redo: Redo, script: str = "") -> None:
    """Raise StaleArtefact for files <name>-<part> beyond the last part: they hold images twice. Or remove them.
    `script`: what makes the parts, if not this one."""
    numbered = re.compile(rf"{re.escape(name)}-(\d+)\.parquet")
    surplus = [
        path
        for place in (folder, files.beside(folder, "rejects"))
        for path in place.glob("*.parquet")
        if (match := numbered.fullmatch(path.name)) and int(match[1]) >= num_parts
    ]
    if surplus and not redo:
        raise StaleArtefact(
            f"{surplus[0]} is left from another division of {name}, which now has {num_parts} parts\n"
            f"restore data.rows_per_part or the images, or remove such files: {errors.command(script, '--remake')}"
        )
    for path in surplus:
        path.unlink(missing_ok=True)  # another task of the same tar may have removed it
