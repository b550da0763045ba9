"""Embeddings of every image by the frozen backbone, 20,000 images to a file.

Reads    data/intermediates/<tar>.parquet; the JPEGs, by offset, from data/raw/<tar>.tar; the backbone, from a
         folder, the hub or its cache. If embedding_model.name is a table of another network's vectors, only
         that and the intermediates: see vector_table.py
Writes   data/<backbone>/embeddings/<tar>-<part>.parquet: the rows of the intermediates, in their order, with the
         mean of the unit vectors of embedding_model.views (of a single view: the pooled output, not normalised) as
         float16;
         data/<backbone>/embeddings_rejects/<tar>-<part>.parquet: images that can no longer be decoded, if any
Command  python generate/generate_embeddings.py [--shard 3 --num-shards 40]; if there are more tasks than tars,
         several share the parts of one
Memory   the images in flight (see loop.py: 40 MB a thread), two parts (20,000 x dim x 10 bytes: 154 MB at 768),
         one tar's intermediates twice (300 bytes an image: 270 MB for 450,000), for gzip tars twice 64 MB and
         0.4 % of one (240 MB for 14 GB), and the backbone
Time     that of the backbone, for each view: see publish/estimate_model_size.py. A stop signal waits for the
         current part: if that takes longer than slurm.signal_before_s, reduce data.rows_per_part
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import PipelineError


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from common.archives import tar_parts

    return tar_parts.outputs(cfg, STAGE, task, num_tasks)


def recorded(cfg) -> dict:
    """A model's folder, or a table of vectors, is known by its content, so that it may be moved."""
    from common import config
    from generate import model_files

    identity = model_files.identity(cfg.embedding_model, cfg.embedding_model.dtype)
    return {**identity, **config.values(cfg, "data.rows_per_part")}


STAGE = stages.Stage(
    "generate_embeddings",
    lambda cfg: cfg.paths.embeddings_dir,
    outputs,
    settings=("embedding_model", "data.rows_per_part"),
    recorded=recorded,
    auto=("embedding_model.dtype",),
)


def main(argv=None) -> int:
    args = cli.parser(__doc__, shards=True).parse_args(argv)
    cfg = cli.load_config(args)
    from common import config, devices, files
    from common.imagery import tar_images
    from generate import embedding_parts, loop

    files.refuse_leftovers(cfg.paths.embeddings_dir, "rejects", "rejects/*.parquet")
    if paths := config.vector_files(cfg.embedding_model.name):
        from generate import vector_table

        todo = missing(cfg, args)
        if todo and (failures := vector_table.write(todo, paths, cfg)):
            raise PipelineError("\n".join(failures))
        return 0

    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    settings = cfg.embedding_model.model_copy(update={"dtype": dtype})
    cfg = cfg.model_copy(update={"embedding_model": settings})
    if not (todo := missing(cfg, args)):
        return 0

    from generate import backbone  # imports transformers, in seconds: only if there is work

    model = backbone.load(cfg.embedding_model, dtype, device)
    jobs = embedding_parts.jobs(todo, tar_images.of_paths(cfg.paths))
    write = lambda result: embedding_parts.write(result, model.facts, cfg.data.max_reject_share)  # noqa: E731
    total, num_views = sum(part.count for part in todo), len(settings.views)
    note = f"{num_views} views of each; " if num_views > 1 else ""
    with loop.run("generate_embeddings", "image", total, model.model, cfg, note) as progress:
        forward = lambda pixels: model(pixels).half()  # noqa: E731 - what is stored, and half as much to copy
        results = loop.embed(jobs, forward, model.preprocessing, device, cfg.infrastructure, progress)
        failures = loop.write_each(results, write)
    if failures:
        raise PipelineError("\n".join(dict.fromkeys(failures)))  # parts of one tar may tell the same
    return 0


def missing(cfg, args) -> list:
    """The parts that a run has to make; if there are none, it says so."""
    from common.archives import tar_parts

    todo, num_parts = tar_parts.missing(cfg, STAGE, args.shard, args.num_shards, args.redo)
    if not todo:
        cli.nothing_to_do("generate_embeddings", f"{num_parts:,} files")
    return todo


if __name__ == "__main__":
    cli.run(main, resumable=True)
