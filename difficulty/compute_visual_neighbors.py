"""The most similar images of other places for every training image, and how hard each is as a negative.

Reads    data/merged/train.parquet
Writes   data/difficulty_parts/<part>.parquet: the neighbours of 20,000 images (data.rows_per_part) each;
         data/difficulty/difficulty_metadata.parquet: those of all, with their bands of difficulty;
         data/difficulty_report/bands.{json,png}: what each band holds; band_pairs.png: sample pairs of each, if
         the tars are available
Command  python difficulty/compute_visual_neighbors.py
         or, as a job array: --shard 3 --num-shards 8 for each shard, then once --finish
Memory   N x D x 2 bytes of embeddings, and as much again where products are in bfloat16 (6 M x 768: 18.4 GB), on
         the GPU if they fit; tiles of search_memory_mb; about 24 bytes for each pair of buildings within the
         ignore zone; gathering: 140 bytes an image
Stopped  it loses the part in progress, or a group of parts where that saves products (see search_parts.groups)
Time     2 N^2 D floating-point operations: 6 M x 768 are 5.5e16, minutes on a large GPU; 100,000 x 768 on
         two CPU cores take one to two minutes
"""

import logging
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli

log = logging.getLogger("pipeline")


def main(argv=None) -> int:
    arguments = cli.parser(__doc__, shards=True)
    arguments.add_argument("--finish", action="store_true", help="only gather the parts written by the shards")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import files, parquet
    from difficulty.report import band_table
    from difficulty.search import search_parts

    files.refuse_leftovers(cfg.paths.difficulty_dir, "parts", "parts/*.parquet")
    files.refuse_leftovers(cfg.paths.difficulty_dir, "report", "bands.*", "band_pairs.png")
    target, made = search_parts.result(cfg)
    if parquet.is_done(target, made, args.overwrite):
        return cli.nothing_to_do("compute_visual_neighbors", target.name)

    every = search_parts.list_parts(cfg)
    first, last = (len(every) * shard // args.num_shards for shard in (args.shard, args.shard + 1))
    mine = [] if args.finish else every[first:last]
    todo = [part for part in mine if not parquet.is_done(part.target, part.made, args.overwrite)]
    images = sum(part.stop - part.start for part in todo)
    with cli.Progress("compute_visual_neighbors", "image", images, cfg.logging.progress_interval_s) as progress:
        if todo:
            search_parts.write(cfg, todo, progress.add)
    if args.num_shards > 1 and not args.finish:
        if not todo:
            return cli.nothing_to_do("compute_visual_neighbors", f"{len(mine):,} parts")
        return progress.summary(f"{len(todo):,} parts; when all shards are done, run --finish")

    search_parts.refuse_missing(every)
    table = search_parts.gather(cfg, every)
    log.info("%s", band_table.as_text(table))
    joined = f" joins {len(every):,} parts" if len(every) > 1 else ""
    return progress.summary(f"{target}{joined}")


if __name__ == "__main__":
    cli.run(main, resumable=True)
