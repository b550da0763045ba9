"""Images or embeddings from any source through the published model, in parts that resume, a file each."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from common import cli, devices, files, parquet, provenance, schemas
from common.archives.tar_parts import refuse_surplus
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Config
from generate import embedding_parts, loop
from publish.inference import published_model
from publish.inference.image_sources import ImageSource
from publish.inference.vector_tables import EMBEDDING, TableSource


@dataclass(frozen=True)
class VectorPart:
    """Rows start..stop of a source, and the file for their vectors."""

    source: ImageSource | TableSource
    start: int
    stop: int
    target: Path
    made: Provenance

    @property
    def count(self) -> int:
        return self.stop - self.start

    def schema(self, dim: int) -> pa.Schema:
        return self.source.schema.append(pa.field(EMBEDDING, schemas.vector(pa.float32(), dim)))


def run(stage: str, unit: str, sources: Iterable[ImageSource | TableSource], args: Namespace, cfg: Config) -> int:
    """Write the vectors of all sources that args.out lacks, by the model args.model; returns the exit code."""
    files.refuse_leftovers(args.out, "rejects", "rejects/*.parquet")
    folder = published_model.folder_of(cfg, args.model)
    device = devices.pick(cfg.infrastructure.device)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    settings = {**published_model.identity(folder, dtype), "data.rows_per_part": cfg.data.rows_per_part}

    todo, num_parts = [], 0
    for source in sources:
        parts = parts_of(source, args.out, stage, settings)
        todo += [part for part in parts if not parquet.is_done(part.target, part.made, args.overwrite)]
        refuse_surplus(args.out, source.name, len(parts), args.overwrite)
        num_parts += len(parts)
    if not todo:
        return cli.nothing_to_do(stage, f"{num_parts:,} files")

    published = published_model.load(folder, dtype, device)
    images = [part for part in todo if part.source.holds_images]
    with loop.run(stage, unit, sum(part.count for part in todo), published.model, cfg) as progress:
        if images:
            jobs = (loop.Job(part, part.count, part.source.reader(part.start, part.stop)) for part in images)
            forward, preprocessing = published.forward, published.preprocessing
            results = loop.embed(jobs, forward, preprocessing, device, cfg.infrastructure, progress)
            loop.write_each(results, lambda result: write(result, published.dim))
        for part in todo:
            if not part.source.holds_images:
                project(part, published, progress)
                cli.check_stop()
    return 0


def parts_of(source: ImageSource | TableSource, out: Path, stage: str, settings: dict) -> list[VectorPart]:
    """A source's parts, of data.rows_per_part rows. `settings`: of the model and the parts, for the provenance."""
    parts = []
    for number, (start, stop) in enumerate(source.parts(settings["data.rows_per_part"])):
        made = provenance.record(stage, {**settings, **source.settings}, source.identity(start, stop))
        parts.append(VectorPart(source, start, stop, out / f"{source.name}-{number}.parquet", made))
    return parts


def write(result: loop.Result, dim: int) -> None:
    """Write a part's vectors, after its rejects. Raises PipelineError if its tar now holds other images."""
    part: VectorPart = result.job.name
    if changed := embedding_parts.changed_tar(result.failed):
        raise PipelineError(changed)
    columns = part.source.columns(part.start, part.stop)
    names = part.source.names_of(part.start, part.stop)
    embedding_parts.write_file(part.target, part.made, part.schema(dim), columns, names, result, {"dim": dim})


def project(part: VectorPart, published: published_model.Published, progress: loop.Progress) -> None:
    """A part's embeddings through the head."""
    table: Any = part.source
    row, input_dim = part.start, published.model.config.input_dim
    with parquet.writer(part.target, part.schema(published.dim), part.made) as out:
        progress.lap("write")
        for batch in table.columns(part.start, part.stop, table.column):
            name = lambda number: f"row {row + number}"  # noqa: B023,E731
            embeddings = parquet.embedding_matrix(
                table.path, batch, table.column, name, input_dim, "the model's backbone and pooling give"
            )
            progress.lap("read")
            vectors = published.project(torch.from_numpy(embeddings.astype(np.float32))).numpy()
            progress.lap("compute")
            embedding_parts.append(out, batch, vectors)
            progress.add(len(vectors))
            progress.lap("write")
            row += len(vectors)
        out.rows, out.facts = {"in": part.count}, {"dim": published.dim}
