"""The parts of a tar: runs of rows of its intermediates whose embeddings share a file."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import files, parquet, provenance, schemas, tars
from common.config import Config, values
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from common.schemas import Reject
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

    def rows(self) -> pa.Table:
        """The part's rows of the intermediates."""
        return parquet.read(self.source, schemas.INTERMEDIATES.names).slice(self.start, self.count)


def of_tar(cfg: Config, tar: Path, model: dict) -> list[Part]:
    """A tar's parts; one part without rows if the tar has no valid image. `model`: see `model_files.identity`."""
    source = cfg.paths.intermediates_dir / f"{tar.stem}.parquet"
    if not source.exists():
        raise PipelineError(f"{source} does not exist: run preprocess/process_tar.py first")
    num_rows, size = parquet.num_rows(source), cfg.data.rows_per_part
    made = provenance.record("generate_embeddings", {**model, **values(cfg, "data.rows_per_part")}, [tar, source])
    return [
        Part(tar, source, start, min(size, num_rows - start), _path(cfg, tar, start // size), made)
        for start in range(0, max(num_rows, 1), size)
    ]


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


def write(result: Result, dim: int, facts: dict, max_reject_share: float) -> str:
    """Write a part's embeddings, after its rejects. Raises PipelineError if one is not finite in float16.

    Of a part with a larger share of rejects than `max_reject_share` only those are written, and why is returned;
    else nothing is.
    """
    part, rows = result.job.name
    vectors = result.vectors.reshape(-1, dim).astype(np.float16)
    refuse_not_finite(vectors, rows["image_path"].take(result.rows), part.tar)
    write_rejects(part.target, part.made, named(result.failed, rows["image_path"]))
    if len(result.failed) > max_reject_share * part.count:
        part.target.unlink(missing_ok=True)  # an earlier run's, with --overwrite: it would count as done
        return (
            f"{len(result.failed):,} of the {part.count:,} images from row {part.start:,} on of {part.tar} cannot "
            f"be decoded any more (more than data.max_reject_share); see {_rejects(part.target)}"
        )
    columns = rows.take(result.rows)
    with parquet.writer(part.target, schemas.embeddings(dim), part.made) as out:
        out.append({**{name: columns[name] for name in columns.column_names}, "embedding": vectors})
        out.rows = {"in": part.count, Reject.JPEG_CORRUPT.value: len(result.failed)}
        out.facts = facts
    return ""


def refuse_not_finite(vectors: np.ndarray, names: pa.ChunkedArray | pa.Array, where: Path) -> None:
    """Raises PipelineError, with the first image's name, if a row of `vectors` is not finite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise PipelineError(
            f"the embedding of {names[int(np.argmin(finite))]} in {where} is not finite "
            f"({np.sum(~finite):,} such images in this part)\n"
            "the backbone overflows: set embedding_model.dtype to float32, and check its weights"
        )


def write_rejects(target: Path, made: Provenance, failed: dict[str, str]) -> None:
    """Images that have no vector, and why, beside `target`'s folder; no file if there are none."""
    path = _rejects(target)
    if not failed:
        path.unlink(missing_ok=True)
        return
    with parquet.writer(path, schemas.REJECTS, made) as out:
        reasons = [Reject.JPEG_CORRUPT.value] * len(failed)
        out.append({"member": list(failed), "reason": reasons, "detail": list(failed.values())})


def _rejects(target: Path) -> Path:
    return files.beside(target.parent, "rejects") / target.name


def named(failed: dict[int, str], names: pa.ChunkedArray | pa.Array) -> dict[str, str]:
    """`failed` by the images' names instead of their numbers."""
    return {names[row].as_py(): detail for row, detail in failed.items()}


def _path(cfg: Config, tar: Path, number: int) -> Path:
    return cfg.paths.embeddings_dir / f"{tar.stem}-{number}.parquet"
