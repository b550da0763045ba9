"""Parts of tars, from the images of their rows to the files of their embeddings."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
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
        rows, part = part.rows(), replace(part, record=part.record.timed())
        yield Job((part, rows), part.count, store.reader(rows))


def write(result: Result, facts: dict, max_reject_share: float, missing: str = "can no longer be decoded") -> str:
    """Write a part's embeddings, after its rejects; or only these, and return the reason, if their share exceeds
    `max_reject_share` or the tar now holds other images. `facts`: see `backbone.Backbone`; `missing`: why images
    have no vector.
    """
    part, rows = result.job.name
    names = rows["image_path"]
    failure = changed_tar(result.failed)
    if not failure and len(result.failed) > max_reject_share * part.count:
        failure = (
            f"{len(result.failed):,} of the {part.count:,} images from row {part.start:,} on of {part.tar} "
            f"{missing} (more than data.max_reject_share); see {rejects_path(part.target)}"
        )
    if failure:
        write_rejects(part.target, part.record, result.failed, names)
        part.target.unlink(missing_ok=True)  # an earlier run's, which would count as done
    else:
        write_file(part.target, part.record, schemas.embeddings(facts["dim"]), [rows], names, result, facts)
    return failure


def changed_tar(failed: dict[int, Rejected]) -> str:
    """The message about an image that is no longer the one in its tar; "" if there is none."""
    return next((why.detail for why in failed.values() if why.reason is Reject.CONTENT_CHANGED), "")


def write_file(
    target: Path,
    record: Provenance,
    schema: pa.Schema,
    columns: Iterable[pa.Table],
    names: pa.ChunkedArray,
    result: Result,
    facts: dict,
) -> None:
    """Write the rows that have a vector, with it, after the rejects. `columns`: the others, some rows at a time.
    Raises PipelineError, naming an image, if its vector is not finite in the type of the schema.
    """
    kind = schema.field("embedding").type
    vectors = result.vectors.reshape(-1, kind.list_size).astype(kind.value_type.to_pandas_dtype(), copy=False)
    infinite = ~np.isfinite(vectors).all(axis=1)
    if infinite.any():
        raise PipelineError(
            f"the embedding of {names[int(result.rows[infinite.argmax()])]} is not finite (as are "
            f"{infinite.sum():,} of those for {target})\n"
            "the backbone overflows: set embedding_model.dtype to float32, and check its weights"
        )
    write_rejects(target, record, result.failed, names)
    with parquet.writer(target, schema, record) as out:
        start = 0
        for table in columns:
            first, last = np.searchsorted(result.rows, [start, start + table.num_rows])
            append(out, table.take(pa.array(result.rows[first:last] - start)), vectors[first:last])
            start += table.num_rows
        out.rows = {"in": result.job.count, **count_reasons(result.failed.values())}
        out.facts = facts


def append(out: parquet.Writer, columns: pa.Table, vectors: np.ndarray) -> None:
    """Append rows with their vectors and flush: the other columns may be arbitrarily large."""
    out.append({**{name: columns[name] for name in columns.column_names}, "embedding": vectors})
    out.flush()


def write_rejects(target: Path, record: Provenance, failed: dict[int, Rejected], names: pa.ChunkedArray) -> None:
    """Images without a vector, and why, beside `target`'s folder; no file if there are none."""
    path = rejects_path(target)
    if not failed:
        path.unlink(missing_ok=True)
        return
    with parquet.writer(path, schemas.REJECTS, record) as out:
        members = [names[row].as_py() for row in failed]
        reasons = [why.reason.value for why in failed.values()]
        out.append({"member": members, "reason": reasons, "detail": [why.detail for why in failed.values()]})


def rejects_path(target: Path) -> Path:
    """The file of the images without a vector, for the file of those that have one."""
    return files.beside(target.parent, "rejects") / target.name
