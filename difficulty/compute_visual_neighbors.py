"""The most similar images of other places for every training image, and how hard each is as a negative.

Reads    data/<backbone>/merged/train.parquet
Writes   data/<backbone>/difficulty_parts/<part>.parquet: the neighbours of 20,000 images (data.rows_per_part)
         each;
         data/<backbone>/difficulty/difficulty_metadata.parquet: those of all, with their bands of difficulty;
         data/<backbone>/difficulty_report/bands.{json,png}: what each band holds; band_pairs.png: sample pairs of
         each, if the tars are available
Command  python difficulty/compute_visual_neighbors.py
         or, as a job array: --shard 3 --num-shards 8 for each shard, then once --finish
Memory   N x (D x 2 + 8) bytes of embeddings (6 M x 768: 9.3 GB), on the GPU if they fit in two thirds of what is
         free; tiles of search_memory_mb; about 24 bytes for each pair of buildings within the ignore zone;
         gathering: 140 bytes an image
Stopped  it loses the part in progress
Time     2 N^2 D floating-point operations: 6 M x 768 are 5.5e16, minutes on a large GPU; 100,000 x 768 on
         two CPU cores take one to two minutes
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, files, stages

log = logging.getLogger("pipeline")
SEARCH = ("data.neighbors", "data.ignore_radius_m", "data.search")  # settings


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from difficulty.search import search_parts

    record = STAGE.record(cfg, stages.ids([search_parts.train_path(cfg)]))
    yield stages.Output(cfg.paths.difficulty_dir / "difficulty_metadata.parquet", record)


def outputs_of_parts(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    """The parts of a shard; once they are gathered, only what they were gathered into."""
    gathered = STAGE.outputs_of(cfg)
    if gathered and STAGE.is_current(gathered[0]):
        yield from gathered
        return
    yield from (stages.Output(part.target, part.record) for part in of_shard(list_parts(cfg), task, num_tasks))


def of_shard(parts: list, shard: int, num_shards: int) -> list:
    first, last = (len(parts) * number // num_shards for number in (shard, shard + 1))
    return parts[first:last]


def list_parts(cfg) -> list:
    """All parts of the search, in order: part p holds the rows p * rows_per_part to (p + 1) * rows_per_part."""
    from common import parquet
    from difficulty.search import search_parts

    train, size = search_parts.train_path(cfg), cfg.data.rows_per_part
    record, total = PARTS.record(cfg, stages.ids([train])), parquet.num_rows(train)
    return [
        search_parts.SearchPart(
            start, min(start + size, total), PARTS.folder(cfg) / f"{number:05d}.parquet", record
        )
        for number, start in enumerate(range(0, total, size))
    ]


def recorded(cfg, *settings: str) -> dict:
    """What a record holds of these settings and of those of the search."""
    from common import config

    balltree = ["data.balltree_dim"] if cfg.data.search == "balltree" else []
    return config.values(cfg, *SEARCH, *balltree, *settings)


_BANDS = ("data.band_percentiles", "data.band_reference_rank")
STAGE = stages.Stage(
    "compute_visual_neighbors",
    lambda cfg: cfg.paths.difficulty_dir,
    outputs,
    settings=(*SEARCH, "data.balltree_dim", *_BANDS),
    recorded=lambda cfg: recorded(cfg, *_BANDS),
)
PARTS = stages.Stage(
    "compute_visual_neighbors, a part",
    lambda cfg: files.beside(cfg.paths.difficulty_dir, "parts"),
    outputs_of_parts,
    settings=(*SEARCH, "data.balltree_dim", "data.rows_per_part"),
    recorded=lambda cfg: recorded(cfg, "data.rows_per_part"),
)


def main(argv=None) -> int:
    arguments = cli.parser(__doc__, shards=True)
    arguments.add_argument("--finish", action="store_true", help="only gather the parts written by the shards")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import parquet
    from difficulty.report import band_table
    from difficulty.search import search_parts

    files.refuse_leftovers(cfg.paths.difficulty_dir, "parts", "parts/*.parquet")
    files.refuse_leftovers(cfg.paths.difficulty_dir, "report", "bands.*", "band_pairs.png")
    (output,) = outputs(cfg, 0, 1)
    if parquet.is_done(output.path, output.record, args.redo):
        return cli.nothing_to_do("compute_visual_neighbors", output.path.name)

    every = list_parts(cfg)
    mine = [] if args.finish else of_shard(every, args.shard, args.num_shards)
    todo = [part for part in mine if not parquet.is_done(part.target, part.record, args.redo)]
    images = sum(part.stop - part.start for part in todo)
    with cli.Progress("compute_visual_neighbors", "image", images, cfg.logging.progress_interval_s) as progress:
        if todo:
            search_parts.write(cfg, todo, progress.add)
    if args.num_shards > 1 and not args.finish:
        if not todo:
            return cli.nothing_to_do("compute_visual_neighbors", f"{len(mine):,} parts")
        return progress.summary(f"{len(todo):,} parts; when all shards are done, run --finish")

    search_parts.refuse_missing(every)
    table = search_parts.gather(cfg, every, output)
    log.info("%s", band_table.as_text(table))
    joined = f" joins {len(every):,} parts" if len(every) > 1 else ""
    return progress.summary(f"{output.path}{joined}")


if __name__ == "__main__":
    cli.run(main, resumable=True)
