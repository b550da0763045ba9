"""Images or embeddings from any source through the published model, in parts that resume, a file each."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from common import cli, devices, files, parquet
from common.archives.tar_parts import refuse_surplus
from common.errors import PipelineError
from common.schemas import Reject, count_reasons
from common.sections import Config
from generate import embedding_parts, loop
from publish.inference import model_record, published_model, vector_stage
from publish.inference.image_sources import ImageSource
from publish.inference.vector_stage import VectorPart
from publish.inference.vector_tables import TableSource


def run(stage: str, unit: str, sources: Iterable[ImageSource | TableSource], args: Namespace, cfg: Config) -> int:
    """Write what args.out lacks of the shard's vectors, by the model args.model; returns the exit code."""
    files.refuse_leftovers(args.out, "rejects", "rejects/*.parquet")
    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    cfg = cfg.model_copy(update={"embedding_model": cfg.embedding_model.model_copy(update={"dtype": dtype})})
    folder = model_record.folder_of(cfg, args.model)

    whole: list[VectorPart] = []
    for source, parts in vector_stage.divided(stage, sources, args, cfg):
        if isinstance(source, TableSource) and not source.holds_images:
            model_record.refuse_other_embeddings(folder, source.path)
        refuse_surplus(args.out, source.name, len(parts), args.redo)
        whole += parts
    own = whole[args.shard :: args.num_shards]
    todo = [part for part in own if not parquet.is_done(part.target, part.record, args.redo)]
    if not todo:
        return cli.nothing_to_do(stage, f"{len(own):,} files")

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
    row, input_dim, dim = 0, published.model.config.input_dim, published.model.config.output_dim
    failed, names = table.failed(part.start, part.stop), table.names_of(part.start, part.stop)
    embedding_parts.write_rejects(part.target, part.record, failed, names)
    with parquet.writer(part.target, part.schema(dim), part.record) as out:
        progress.lap("writing")
        for batch in table.columns(part.start, part.stop, table.column):
            rows = np.array([n for n in range(row, row + len(batch)) if n not in failed], np.int64)
            kept = batch.take(pa.array(rows - row))
            name = lambda number: names[int(rows[number])].as_py()  # noqa: B023,E731
            embeddings = parquet.embedding_matrix(
                table.path, kept, table.column, name, input_dim, "the model takes"
            )
            parquet.refuse_zeros(table.path, table.column, embeddings, name)
            progress.lap("reading")
            vectors = published.project(torch.from_numpy(embeddings.astype(np.float32))).numpy()
            progress.lap("computing")
            embedding_parts.append(out, kept, vectors)
            rejected = {Reject.MARKED_INVALID.value: len(batch) - len(kept)} if len(kept) < len(batch) else {}
            progress.add(len(batch), len(kept), rejected)
            progress.lap("writing")
            row += len(batch)
        out.rows, out.facts = {"in": part.count, **count_reasons(failed.values())}, {"dim": dim}
