"""The parts of a tar: runs of rows of its intermediates whose embeddings share a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, provenance, schemas, tars
from common.config import Config, values
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from generate.loop import Job, Result


@dataclass(frozen=True)
class Part:
    """Rows start..start + count of a tar's intermediates, and the file for their embeddings."""

    tar: Path
    source: Path  # the tar's intermediates
    start: int
    count: int
    target: Path
    made: Provenance

    @property
    def rejects(self) -> Path:
        return self.target.parent / "rejects" / self.target.name

    def rows(self) -> pa.Table:
        """The part's rows of the intermediates."""
        return parquet.read(self.source).slice(self.start, self.count)


def of_tar(cfg: Config, tar: Path, model: dict) -> list[Part]:
    """A tar's parts; one part without rows if the tar has no valid image. `model`: see `backbone.identity`."""
    source = cfg.paths.intermediates_dir / f"{tar.stem}.parquet"
    if not source.exists():
        raise PipelineError(f"{source} does not exist: run preprocess/process_tar.py first")
    num_rows, size = parquet.num_rows(source), cfg.data.rows_per_part
    made = provenance.record("generate_embeddings", {**model, **values(cfg, "data.rows_per_part")}, [tar, source])
    return [
        Part(tar, source, start, min(size, num_rows - start), _path(cfg, tar, start // size), made)
        for start in range(0, max(num_rows, 1), size)
    ]


def refuse_surplus(cfg: Config, tar: Path, num_parts: int, overwrite: bool) -> None:
    """Files of a tar beyond its parts hold images twice: an error, or removed if `overwrite`."""
    surplus = [
        path
        for folder in (cfg.paths.embeddings_dir, cfg.paths.embeddings_dir / "rejects")
        for path in folder.glob(f"{tar.stem}-*.parquet")
        if path.stem.removeprefix(f"{tar.stem}-").isdecimal() and int(path.stem.rpartition("-")[2]) >= num_parts
    ]
    if surplus and not overwrite:
        raise StaleArtefact(
            f"{surplus[0]} is part of another division of {tar.name}, which has {num_parts} parts now\n"
            "put data.rows_per_part or the intermediates back, or redo the tar with --overwrite"
        )
    for path in surplus:
        path.unlink()


def jobs(parts: list[Part]) -> Iterator[Job]:
    """What the loop reads; a job's name is the part and its rows."""
    for part in parts:
        rows = part.rows()
        yield Job((part, rows), part.count, jpegs_of(part.tar, rows))


def jpegs_of(tar: Path, rows: pa.Table):
    """A function that reads the encoded images of rows start..stop from the tar."""
    offsets, sizes = (rows[name].to_numpy() for name in ("image_offset", "image_size"))
    return lambda start, stop: tars.read_members(tar, offsets[start:stop], sizes[start:stop])


def write(result: Result, dim: int, facts: dict) -> None:
    """Write a part's embeddings, after its rejects, if there are any. Raises PipelineError for a number that is
    not finite in float16.
    """
    part, rows = result.job.name
    vectors = result.vectors.reshape(-1, dim).astype(np.float16)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        name = rows["image_path"][int(result.rows[np.argmin(finite)])]
        raise PipelineError(
            f"the embedding of {name} in {part.tar} is not finite ({np.sum(~finite):,} such images in the part)\n"
            "the backbone overflows: set embedding_model.dtype to float32, and check its weights"
        )
    if result.failed:
        failed = rows["image_path"].take(list(result.failed))
        reason = [schemas.Reject.JPEG_CORRUPT.value] * len(failed)
        with parquet.writer(part.rejects, schemas.REJECTS, part.made) as out:
            out.append({"member": failed, "reason": reason, "detail": list(result.failed.values())})
    else:
        part.rejects.unlink(missing_ok=True)
    schema = schemas.embeddings(dim)
    with parquet.writer(part.target, schema, part.made) as out:
        columns = rows.take(result.rows)
        out.append({**{name: columns[name] for name in columns.column_names}, "embedding": vectors})
        out.rows = {"in": part.count, schemas.Reject.JPEG_CORRUPT.value: len(result.failed)}
        out.facts = facts


def _path(cfg: Config, tar: Path, number: int) -> Path:
    return cfg.paths.embeddings_dir / f"{tar.stem}-{number}.parquet"
