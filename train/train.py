"""Train the projection head, which turns a backbone's embeddings into building embeddings.

Reads    data/<backbone>/merged/{train,val}.parquet, data/<backbone>/difficulty/difficulty_metadata.parquet
Writes   checkpoints/<backbone>/<run>/checkpoint_best.pt: the head with the highest validation mAP@R; the linear
         baseline that training starts from is epoch 0
         checkpoints/<backbone>/<run>/checkpoint_last.pt: where a stopped run resumes
         checkpoints/<backbone>/<run>/{history.parquet,curves.png}: a row per epoch, and the training curves
         data/<backbone>/merged_moments/<sample>.safetensors: what PCA and whitening need of the images, for all
         later runs
Command  python train/train.py [--set training.run=NAME] [--set training.loss=infonce]
Memory   D x 2 + k x 4 + 90 bytes per training image (6 M, 768-d, k = 150: 13 GB), on the GPU if it fits; less with
         training.sample_buildings; validation: see search_memory_mb
Time     per image of a batch 2 D (h + output_dim) floating-point operations forward and as many backward; plus
         validation after each epoch, and, once for each merge, the sums of train/linear/whitening.py
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages

log = logging.getLogger("pipeline")


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from train import run_record

    folder, record = run_record.run_dir(cfg), run_record.record(cfg, run_record.input_ids(cfg))
    companions = tuple(folder / name for name in (run_record.BEST, run_record.LAST, "curves.png"))
    yield stages.Output(folder / run_record.HISTORY, record, {"finished": True}, companions)


def progress(cfg) -> tuple[int, int, str]:
    """Finished epochs, and the most that there can be."""
    from common import parquet
    from common.errors import PipelineError
    from train import run_record

    try:
        rows = parquet.num_rows(run_record.run_dir(cfg) / run_record.HISTORY)
    except PipelineError:
        rows = 1
    return rows - 1, cfg.training.epochs, "epochs"  # the first row is from before training


def recorded(cfg) -> dict:
    from train import run_record

    return run_record.recorded(cfg)


STAGE = stages.Stage(
    "train",
    lambda cfg: cfg.paths.checkpoints_dir / cfg.training.run,
    outputs,
    settings=("training", "training_model", "global.seed", "data.ignore_radius_m"),
    recorded=recorded,
    progress=progress,
)


def main(argv=None) -> int:
    args = cli.parser(__doc__).parse_args(argv)
    cfg = cli.load_config(args)
    from train import datasets, run_record
    from train.fitting import checkpoints, schedule, tracking
    from train.fitting.fit import fit

    run_dir = run_record.run_dir(cfg)
    saved = checkpoints.existing(run_dir, run_record.record(cfg, run_record.input_ids(cfg)), args.redo)
    if saved is not None and STAGE.is_done(cfg):
        reached = saved["resume"]["best"]["metrics"]["map@r"]
        return cli.nothing_to_do("train", f"{run_dir / run_record.BEST} (validation mAP@R {reached:.4f})")

    tracking.require_wandb(cfg)
    data = datasets.load_data(cfg)
    whitening = data.baselines["whitening"]
    tried = [f"{map_at_r:.4f} ({by})" for by, map_at_r in whitening["map@r_by_shrinkage"].items()]
    log.info(
        "whitening: validation mAP@R (by shrinkage) %s; %g is chosen", ", ".join(tried), whitening["shrinkage"]
    )
    epoch_steps = schedule.steps_per_epoch(cfg.training, data.train.num_images)
    steps = cfg.training.epochs * epoch_steps - (saved["resume"]["step"] if saved else 0)
    total = steps * cfg.training.batch_size
    with cli.Progress("train", "triplet", total, cfg.logging.progress_interval_s) as progress:
        result = fit(cfg, data, run_dir=run_dir, saved=saved, progress=progress)
    draws = result.best["epoch"] * epoch_steps * cfg.training.batch_size / data.train.num_images
    return progress.summary(outcome(cfg, whitening, result.best, draws))


def outcome(cfg, whitening: dict, best: dict, draws: float) -> str:
    """What a run came to, in words. `draws`: how often each image was an anchor until the best epoch (mean)."""
    reached, epoch = best["metrics"]["map@r"], best["epoch"]
    if epoch:
        before = whitening["validation"]["map@r"]
        return (
            f"validation mAP@R {reached:.4f} at epoch {epoch}, by which each image was an anchor {draws:,.2f} "
            f"times on average; learned whitening {before:.4f}"
        )
    head = "the learned whitening" if cfg.training_model.init == "whitening" else "random"
    return (
        f"validation mAP@R {reached:.4f} at epoch 0: the head is {head}, since no epoch of training was better; "
        "try a smaller training.learning_rate, fewer steps (training.steps_per_epoch), or more data"
    )


if __name__ == "__main__":
    cli.run(main, resumable=True)
