"""Find the valid images of each tar, with their labels; record for every other file why it is not used.

A tar, plain or a gzip stream as the published ones are, is read once, front to back, and nothing is extracted:
later stages read an image by its offset. Everything readable in a damaged tar is used, and the summary reports
what is lost. Its name is the number of its dataset; otherwise the majority of its labels decides, and the summary
reports it. The summary also counts the labels that disagree with their own positions.

A tar that cannot be used is named at the end (exit code 1), after all others have been processed. But a folder
with an unfinished download is refused: which tars a shard takes depends on all of them.

Reads    data/raw/<tar>.tar (or .tar.gz, .tgz)
Writes   data/intermediates/<tar>.parquet: a row per valid image, in the order of the tar
         data/intermediates_rejects/<tar>.parquet: a row per rejected file, and per damage, with the reason
         data/intermediates_index/<tar>.parquet: of a gzip stream, places at which inflating can begin
Command  python preprocess/process_tar.py [--shard 3 --num-shards 40]
Memory   20 MB, a file of up to 64 MB for each worker (1 MB, if it is smaller), about 2.5 kB for each image of one
         tar, and for a gzip tar 50 MB and 0.4 % of its size: for 14 GB and 450,000 images 1.3 GB
Time     the decoder's: about 2,000 images of 640 x 640 pixels a second and core; a gzip stream a quarter more
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, provenance, stages
from common.errors import PipelineError


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from common.archives import image_origins

    yield from (output_of(cfg, tar) for tar in image_origins.raw_tars(cfg.paths, task, num_tasks))


def output_of(cfg, tar: Path) -> stages.Output:
    """A tar's intermediates, which are written last: where they are, rejects and index are, too."""
    from common.archives import image_origins

    path = image_origins.intermediates(cfg.paths, tar)
    return stages.Output(path, STAGE.record(cfg, stages.ids([tar])))


STAGE = stages.Stage("process_tar", lambda cfg: cfg.paths.intermediates_dir, outputs)


def main(argv=None) -> int:
    args = cli.parser(__doc__, shards=True).parse_args(argv)
    cfg = cli.load_config(args)
    from common.archives import image_origins
    from common.files import refuse_leftovers
    from common.imagery import tar_images
    from preprocess.tars import label_geometry, tar_files

    refuse_leftovers(cfg.paths.intermediates_dir, "rejects", "rejects/*.parquet")
    listing = image_origins.raw_tars(cfg.paths, args.shard, args.num_shards)
    todo = missing(cfg, listing, args.redo)
    if not todo:
        return cli.nothing_to_do("process_tar", f"{len(listing):,} tars")

    failures, notes, num_renamed = [], [], 0
    disagreements: Counter[str] = Counter()
    sizes = [tar.stat().st_size for tar, *_ in todo]
    total = max(1, sum(sizes))
    with cli.Progress("process_tar", "image", interval_s=cfg.logging.progress_interval_s) as progress:
        for number, (tar, target, rejects, record) in enumerate(todo):

            def show(count: int, position: int, before: int = sum(sizes[:number])) -> None:
                cli.check_stop()
                progress.add(count, 0, share=min(1.0, (before + position) / total))

            cli.check_stop()
            record = record.timed()
            try:
                files = tar_files.read(tar, cfg.infrastructure.threads, on_images=show)
                dataset_id = tar_files.dataset_of(tar, files)
                pairs = tar_files.pair(files, dataset_id)
                progress.add(
                    len(pairs.valid) + pairs.causes.total() - files.num_checked, len(pairs.valid), pairs.causes
                )
                counts = tar_files.account(tar, files, pairs)
            except PipelineError as error:  # of this tar: the others go on
                failures.append(str(error))
                continue
            tar_files.write_rejects(rejects, pairs, record, counts)
            failure = tar_files.failure(tar, files, counts, cfg.data.max_reject_share)
            if failure:
                if STAGE.is_current(stages.Output(target, record)):  # it would count as done
                    target.unlink()
                failures.append(f"{failure}; see {rejects}")
            else:  # written last: where the intermediates are, the others are too
                index = tar_images.index_of(cfg.paths.intermediates_dir, tar)
                tar_images.write_restart_points(index, files.restart_points, record)
                disagreements += tar_files.write_intermediates(
                    target, pairs, tar.name, record, counts, files.damages
                )
            num_renamed += pairs.num_renamed
            notes += tar_files.notes(tar, files, dataset_id)
    if num_renamed:
        notes.append(f"file name and label ids disagree for {num_renamed:,} images; using the labels")
    notes.append(label_geometry.summary(disagreements))
    progress.summary("; ".join(filter(None, notes)))
    if failures:
        raise PipelineError("\n".join(failures))
    return 0


def missing(cfg, listing: list[Path], redo: provenance.Redo) -> list[tuple]:
    """(tar, its intermediates, its rejects, their record) of the tars that are not done."""
    from common import parquet
    from common.files import beside

    todo = []
    for tar in listing:
        output = output_of(cfg, tar)
        rejects = beside(output.path.parent, "rejects") / output.path.name
        if not all(parquet.is_done(path, output.record, redo) for path in (output.path, rejects)):
            todo.append((tar, output.path, rejects, output.record))
    return todo


if __name__ == "__main__":
    cli.run(main, resumable=True)
