"""Parts of tars, from the images of their rows to the files of their embeddings."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import files, parquet, schemas
from common.archives.tar_parts import TarPart
from common.errors import PipelineError
from common.imagery import tar_images
from common.provenance import Provenance
from common.schemas import Reject, Rejected, count_reasons
from generate.loop import Job, Result


def jobs(parts: list[TarPart], store: tar_images.TarImages) -> Iterator[Job]:
    """What the loop reads; a job's name is the part and its rows."""
    for part in parts:
        rows = part.rows()
        yield Job((part, rows), part.count, store.tar(part.tar.name).reader(rows))


def write(result: Result, dim: int, facts: dict, max_reject_share: float) -> str:
    """Write a part's embeddings, after its rejects. Raises PipelineError if one is not finite in float16.

    Of a part with a larger share of rejects than `max_reject_share`, or from a tar that holds other images now,
    only the rejects are written, and why is returned; else nothing is.
    """
    part, rows = result.job.name
    vectors = result.vectors.reshape(-1, dim).astype(np.float16)
    refuse_not_finite(vectors, rows["image_path"].take(result.rows), part.tar)
    write_rejects(part.target, part.made, named(result.failed, rows["image_path"]))
    changed = change_of(result.failed)
    if changed or len(result.failed) > max_reject_share * part.count:
        part.target.unlink(missing_ok=True)  # an earlier run's, with --overwrite: it would count as done
        return changed or (
            f"{len(result.failed):,} of the {part.count:,} images from row {part.start:,} on of {part.tar} "
            f"cannot be decoded any more (more than data.max_reject_share); see {_rejects(part.target)}"
        )
    columns = rows.take(result.rows)
    with parquet.writer(part.target, schemas.embeddings(dim), part.made) as out:
        out.append({**{name: columns[name] for name in columns.column_names}, "embedding": vectors})
        out.rows = {"in": part.count, **count_reasons(result.failed.values())}
        out.facts = facts
    return ""


def change_of(failed: dict[int, Rejected]) -> str:
    """What is told of the first image in whose place the tar has another now; empty if there is none."""
    return next((why.detail for why in failed.values() if why.reason is Reject.CONTENT_CHANGED), "")


def refuse_not_finite(vectors: np.ndarray, names: pa.ChunkedArray | pa.Array, where: Path) -> None:
    """Raises PipelineError, with the first image's name, if a row of `vectors` is not finite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise PipelineError(
            f"the embedding of {names[int(np.argmin(finite))]} in {where} is not finite "
            f"({np.sum(~finite):,} such images in this part)\n"
            "the backbone overflows: set embedding_model.dtype to float32, and check its weights"
        )


def write_rejects(target: Path, made: Provenance, failed: dict[str, Rejected]) -> None:
    """Images that have no vector, and why, beside `target`'s folder; no file if there are none."""
    path = _rejects(target)
    if not failed:
        path.unlink(missing_ok=True)
        return
    with parquet.writer(path, schemas.REJECTS, made) as out:
        reasons = [why.reason.value for why in failed.values()]
        out.append({"member": list(failed), "reason": reasons, "detail": [why.detail for why in failed.values()]})


def _rejects(target: Path) -> Path:
    return files.beside(target.parent, "rejects") / target.name


def named(failed: dict[int, Rejected], names: pa.ChunkedArray | pa.Array) -> dict[str, Rejected]:
    """`failed` by the images' names instead of their numbers."""
    return {names[row].as_py(): why for row, why in failed.items()}
