"""Trains with the settings of the study's best trial, for all of training.epochs.

Leaves the same files as train.py, and the settings used beside them: train.py --config that file repeats the run.

Reads    the study (data/study/journal.log, or tuning.study_storage), and what train.py reads
Writes   checkpoints/<run>/config.toml, and what train.py writes
Command  python train/fetch_best_and_train.py [--trial 17] [--set training.run=tuned]
Memory   as train.py
"""

import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import StaleArtefact


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--trial", type=int, metavar="N", help="this one instead of the best")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import config, files
    from train import datasets, train
    from train.evaluation import heads
    from train.fitting import checkpoints
    from train.tuning import shared_study

    tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    trial = shared_study.best_trial(tuning, args.trial)
    unfinished = cfg.tuning.num_trials - shared_study.num_counted(tuning.trials) + shared_study.num_open(tuning)
    if unfinished > 0:
        print(f"fetch_best_and_train: {unfinished:,} trials of the study are still to come")
    chosen = config.with_training(cfg, **trial.params)
    without_password = chosen.tuning.model_copy(update={"study_storage": "journal"})
    chosen = chosen.model_copy(update={"tuning": without_password})

    run_dir = cfg.paths.checkpoints_dir / cfg.training.run
    if not args.overwrite:  # before config.toml is written beside a checkpoint of other settings
        made = checkpoints.record(chosen, datasets.input_ids(chosen))
        try:
            checkpoints.existing(run_dir, made)
        except StaleArtefact as error:
            raise StaleArtefact(f"{error}\nor name this run another way: --set training.run=tuned") from None
    settings_path, settings = run_dir / "config.toml", config.to_toml(chosen).encode()
    if not settings_path.exists() or settings_path.read_bytes() != settings:
        files.write_bytes(settings_path, settings)
    train.main(["--config", str(settings_path), *["--overwrite"][: args.overwrite]])

    reached = heads.load_checkpoint(run_dir / "checkpoint_best.pt")["metrics"]["map@r"]
    print(
        f"fetch_best_and_train: validation mAP@R {reached:.4f}, {reached - trial.value:+.4f} from the "
        f"{trial.value:.4f} of trial {trial.number} ({cfg.tuning.trial_epochs} epochs); {settings_path}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main, resumable=True)
