"""Train for the full training.epochs with the settings of the study's best trial.

Writes what train.py writes, plus config.toml, with which train.py repeats the run.

Reads    the study (data/<backbone>/study/journal.log, or tuning.study_storage), and what train.py reads
Writes   checkpoints/<backbone>/<run>/config.toml, and what train.py writes
Command  python train/fetch_best_and_train.py [--trial 17] [--set training.run=tuned]
Memory   as train.py
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import PipelineError
from train import train


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    return train.outputs(with_best(cfg), task, num_tasks)


def with_best(cfg):
    """The settings with those of the study's best trial. Raises PipelineError if there is no such study."""
    if cfg.tuning.study_storage == "journal" and not (cfg.paths.study_dir / "journal.log").exists():
        raise PipelineError("there is no study yet")
    from common import config
    from train.tuning import shared_study

    study = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    return config.with_training(cfg, **shared_study.best_trial(study).params)


STAGE = dataclasses.replace(train.STAGE, outputs=outputs, recorded=lambda cfg: train.recorded(with_best(cfg)))


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--trial", type=int, metavar="N", help="use this trial instead of the best")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import config, files
    from train import run_record
    from train.evaluation import heads
    from train.fitting import checkpoints
    from train.tuning import shared_study

    tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    trial = shared_study.best_trial(tuning, args.trial)
    unfinished = cfg.tuning.num_trials - shared_study.num_counted(tuning.trials) + shared_study.num_open(tuning)
    if unfinished > 0:
        print(f"fetch_best_and_train: the study is incomplete: {unfinished:,} trials remain")
    chosen = config.with_training(cfg, **trial.params)

    run_dir = run_record.run_dir(cfg)
    # before config.toml is written beside a checkpoint of other settings
    checkpoints.existing(run_dir, run_record.record(chosen, run_record.input_ids(chosen)), args.redo)
    settings_path, settings = run_dir / "config.toml", config.to_toml(chosen).encode()
    if not settings_path.exists() or settings_path.read_bytes() != settings:
        files.write_bytes(settings_path, settings)
    redo = {"": [], "stale": ["--remake"], "all": ["--overwrite"]}[args.redo]
    train.main(["--config", str(settings_path), *redo])

    reached = heads.load_checkpoint(run_dir / "checkpoint_best.pt")["metrics"]["map@r"]
    print(
        f"fetch_best_and_train: validation mAP@R {reached:.4f}, {reached - trial.value:+.4f} from the "
        f"{trial.value:.4f} of trial {trial.number} ({cfg.tuning.trial_epochs} epochs); {settings_path}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main, resumable=True)
