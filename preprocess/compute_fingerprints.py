"""Perceptual hashes (pHash and dHash, 64 bits each) of every image, to find duplicates.

Reads    data/intermediates/<tar>.parquet; the JPEGs, by offset, from data/raw/<tar>.tar
Writes   data/fingerprints/<tar>-<part>.parquet: a row per image, in the order of the intermediates
Command  python preprocess/compute_fingerprints.py [--shard 3 --num-shards 40]; more shards than tars are possible
Memory   64 JPEGs and the pixels of one image per thread, 300 bytes per image of one tar (135 MB for 450,000), and
         for gzip tars twice 64 MB and 0.4 % of one (240 MB for 14 GB)
Time     about 1,000 images of 640 x 640 pixels per second and core; 200 with data.fingerprint = "exact"
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


STAGE = stages.Stage(
    "compute_fingerprints",
    lambda cfg: cfg.paths.fingerprints_dir,
    outputs,
    settings=("data.fingerprint", "data.rows_per_part"),
)


def main(argv=None) -> int:
    args = cli.parser(__doc__, shards=True).parse_args(argv)
    cfg = cli.load_config(args)
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    from common.archives import tar_parts
    from common.imagery import tar_images
    from preprocess.duplicates import fingerprints

    todo, num_parts = tar_parts.missing(cfg, STAGE, args.shard, args.num_shards, args.redo)
    if not todo:
        return cli.nothing_to_do("compute_fingerprints", f"{num_parts:,} files")

    store, total = tar_images.of_paths(cfg.paths), sum(part.count for part in todo)
    failures = {}
    with (
        threadpool_limits(1),  # one thread per image: multi-threaded matrix products would stall the others
        ThreadPoolExecutor(cfg.infrastructure.threads) as pool,
        cli.Progress("compute_fingerprints", "image", total, cfg.logging.progress_interval_s) as progress,
    ):

        def show(count: int) -> None:
            cli.check_stop()
            progress.add(count)

        for part in todo:
            try:
                fingerprints.write(part, store, cfg.data.fingerprint, pool, on_images=show)
            except PipelineError as error:  # go on with the other tars
                failures[str(error)] = part  # parts of one tar fail alike
    progress.summary()
    if failures:
        raise PipelineError("\n".join(failures))
    return 0


if __name__ == "__main__":
    cli.run(main, resumable=True)
