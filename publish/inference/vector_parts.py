"""Files of vectors by the published model, and the parts into which a group of images is cut."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, provenance, schemas
from common.archives import tar_parts
from common.errors import PipelineError
from common.provenance import Provenance
from common.schemas import count_reasons
from generate import embedding_parts
from generate.loop import Job, Result
from publish.inference.image_sources import ImageSource


@dataclass(frozen=True)
class VectorPart:
    """Images start..start + count of a group, and the file for their vectors."""

    group: ImageSource
    start: int
    count: int
    target: Path
    made: Provenance

    def job(self) -> Job:
        return Job(self, self.count, lambda start, stop: self.group.read(self.start + start, self.start + stop))


def schema(dim: int) -> pa.Schema:
    return pa.schema([("image", pa.string()), ("embedding", schemas.vector(pa.float32(), dim))])


def parts_of(group: ImageSource, out: Path, size: int, model: dict) -> list[VectorPart]:
    """A group's parts of `size` images. `model`: see `inference.identity`."""
    found = []
    for number, start in enumerate(range(0, len(group.names), size)):
        stop = min(start + size, len(group.names))
        made = provenance.record(
            "generate_embeddings_from_hf", {**model, "data.rows_per_part": size}, group.identity(start, stop)
        )
        found.append(VectorPart(group, start, stop - start, out / f"{group.name}-{number}.parquet", made))
    return found


def missing(found: list[VectorPart], out: Path, name: str, overwrite: bool) -> list[VectorPart]:
    """The parts that are not there yet. Raises StaleArtefact for files that are of something else."""
    todo = [part for part in found if not parquet.is_done(part.target, part.made, overwrite)]
    tar_parts.refuse_surplus(out, name, len(found), overwrite)
    return todo


def write(result: Result, dim: int) -> None:
    """Write a part's vectors, after its rejects. Raises PipelineError if its tar has other images now."""
    part: VectorPart = result.job.name
    if changed := embedding_parts.change_of(result.failed):
        raise PipelineError(changed)
    names = part.group.names.slice(part.start, part.count)
    vectors = result.vectors.reshape(-1, dim).astype(np.float32)
    embedding_parts.refuse_not_finite(vectors, names.take(pa.array(result.rows)), part.target)
    embedding_parts.write_rejects(part.target, part.made, embedding_parts.named(result.failed, names))
    with parquet.writer(part.target, schema(dim), part.made) as out:
        out.append({"image": names.take(pa.array(result.rows)), "embedding": vectors})
        out.rows = {"in": part.count, **count_reasons(result.failed.values())}
        out.facts = {"dim": dim}
