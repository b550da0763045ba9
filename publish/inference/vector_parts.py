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
from common.config import values
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Config
from generate import embedding_parts, loop
from generate.model_files import weights_digest
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
    record: Provenance

    @property
    def count(self) -> int:
        return self.stop - self.start

    def schema(self, dim: int) -> pa.Schema:
        return self.source.schema.append(pa.field(EMBEDDING, schemas.vector(pa.float32(), dim)))


def run(stage: str, unit: str, sources: Iterable[ImageSource | TableSource], args: Namespace, cfg: Config) -> int:
    """Write the vectors of all sources that args.out lacks, by the model args.model; returns the exit code."""
    files.refuse_leftovers(args.out, "rejects", "rejects/*.parquet")
    folder = published_model.folder_of(cfg, args.model)
    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    settings = {"model.weights": weights_digest(folder), "embedding_model.dtype": dtype}
    settings |= values(cfg, "data.rows_per_part")

    todo: list[VectorPart] = []
    num_parts = 0
    for source in sources:
        if isinstance(source, TableSource) and not source.holds_images:
            published_model.refuse_other_embeddings(folder, source.path)
        cuts = list(source.parts(cfg.data.rows_per_part))
        for number, (start, stop) in enumerate(cuts):
            target = args.out / f"{source.name}-{number}.parquet"
            record = provenance.record(stage, {**settings, **source.settings}, source.identity(start, stop))
            if not parquet.is_done(target, record, args.overwrite):
                todo.append(VectorPart(source, start, stop, target, record))
        refuse_surplus(args.out, source.name, len(cuts), args.overwrite)
        num_parts += len(cuts)
    if not todo:
        return cli.nothing_to_do(stage, f"{num_parts:,} files")

    published = published_model.load(folder, dtype, device)
    images = [part for part in todo if part.source.holds_images]
    with loop.run(stage, unit, sum(part.count for part in todo), published.model, cfg) as progress:
        if images:
            jobs = (loop.Job(part, part.count, part.source.reader(part.start, part.stop)) for part in images)
            forward, preprocessing = published.forward, published.preprocessing
            results = loop.embed(jobs, forward, preprocessing, device, cfg.infrastructure, progress)
            loop.write_each(results, lambda result: write(result, published.model.config.output_dim))
        for part in todo:
            if not part.source.holds_images:
                project(part, published, progress)
                cli.check_stop()
    return 0


def write(result: loop.Result, dim: int) -> None:
    """Write a part's vectors, after its rejects. Raises PipelineError if its tar now holds other images."""
    part: VectorPart = result.job.name
    if changed := embedding_parts.changed_tar(result.failed):
        raise PipelineError(changed)
    columns = part.source.columns(part.start, part.stop)
    names = part.source.names_of(part.start, part.stop)
    embedding_parts.write_file(part.target, part.record, part.schema(dim), columns, names, result, {"dim": dim})


def project(part: VectorPart, published: published_model.Published, progress: loop.GenerationProgress) -> None:
    """A part's embeddings through the head."""
    table: Any = part.source
    row, input_dim, dim = part.start, published.model.config.input_dim, published.model.config.output_dim
    with parquet.writer(part.target, part.schema(dim), part.record) as out:
        progress.lap("writing")
        for batch in table.columns(part.start, part.stop, table.column):
            name = lambda number: f"row {row + number}"  # noqa: B023,E731
            embeddings = parquet.embedding_matrix(
                table.path, batch, table.column, name, input_dim, "the model's backbone and pooling give"
            )
            progress.lap("reading")
            vectors = published.project(torch.from_numpy(embeddings.astype(np.float32))).numpy()
            progress.lap("computing")
            embedding_parts.append(out, batch, vectors)
            progress.add(len(vectors))
            progress.lap("writing")
            row += len(vectors)
        out.rows, out.facts = {"in": part.count}, {"dim": dim}
