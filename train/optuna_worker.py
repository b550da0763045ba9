"""Tune the settings in [tuning.search_space] until the study has tuning.num_trials trials, over all workers.

Start as many workers as there are GPUs: they share the study, a journal on a shared disk or a PostgreSQL database.
A trial's score is its best validation mAP@R over tuning.trial_epochs epochs (without the untrained head). With
tuning.pruner = "median", after five trials, a trial is pruned once its best value is below the median of the
others at the same epoch, from the second on; "hyperband" runs many trials briefly and few to the end. If a worker
is killed, another one repeats its trial.

Reads    data/<backbone>/merged/{train,val}.parquet, data/<backbone>/difficulty/difficulty_metadata.parquet:
         once, for all trials
Writes   data/<backbone>/study/journal.log (or tuning.study_storage);
         data/<backbone>/study/study.html: history, importances and slices of the study
         data/<backbone>/merged_moments/<sample>.safetensors, as train.py, if no run has written it
Command  python train/optuna_worker.py [--trials 10] [--minutes 600]
Memory   as train.py
A study of other data or settings is refused; --remake begins another, and keeps the trials of the former one as a
study of its own in the same storage. A matching one is joined in any case.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import ConfigError, PipelineError
from common.provenance import Provenance


def progress(cfg) -> tuple[int, int, str]:
    """(finished trials, all trials, unit) of the study."""
    if cfg.tuning.study_storage == "journal" and not (cfg.paths.study_dir / "journal.log").exists():
        return 0, cfg.tuning.num_trials, "trials"
    from train.tuning import shared_study

    try:
        study = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    except PipelineError:  # of other data or settings: the worker says so
        return 0, cfg.tuning.num_trials, "trials"
    done = shared_study.num_counted(study.trials) - shared_study.num_open(study)
    return done, cfg.tuning.num_trials, "trials"


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from train.tuning import shared_study, study_storage

    yield stages.Output(Path(study_storage.name_of(cfg)), shared_study.record(cfg))


def existing(cfg) -> dict[Path, Provenance]:
    """The record of the study, of whatever data and settings, by the name of its storage."""
    if cfg.tuning.study_storage == "journal" and not (cfg.paths.study_dir / "journal.log").exists():
        return {}
    from train.tuning import shared_study

    return shared_study.existing(cfg)


STAGE = stages.Stage(
    "optuna_worker",
    lambda cfg: cfg.paths.study_dir,
    outputs,
    settings=("tuning.trial_epochs", "tuning.pruner", "tuning.search_space"),
    progress=progress,
    existing=existing,
)


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--trials", type=int, metavar="N", help="run at most N trials in this process")
    arguments.add_argument("--minutes", type=float, metavar="M", help="start no new trial after M minutes")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    if args.trials is not None and args.trials < 1:
        raise ConfigError("--trials must be 1 or more")
    if args.minutes is not None and args.minutes < 0:
        raise ConfigError("--minutes must be 0 or more")
    from train.tuning import shared_study, study_page, study_storage, study_trials

    shared_study.check_search_space(cfg)
    tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=True, redo=args.redo)
    page_path = cfg.paths.study_dir / "study.html"
    with study_storage.locked(cfg):
        left = shared_study.num_left(tuning, cfg)
    if not left:
        study_page.write(page_path, tuning)  # the last worker may have been killed before it did
        return cli.nothing_to_do("optuna_worker", f"{cfg.tuning.num_trials} trials")

    total = min(left, args.trials or left)  # fewer, if other workers take some
    progress = cli.Progress("optuna_worker", "trial", total, cfg.logging.progress_interval_s)
    with study_storage.reported_connection_errors(cfg), progress:
        study_trials.work(cfg, tuning, progress, args.trials, args.minutes)
    study_page.write(page_path, tuning)
    if shared_study.finished_trials(tuning):
        best = shared_study.best_trial(tuning)
        note = f"best so far: trial {best.number}, validation mAP@R {best.value:.4f}; {page_path}"
        return progress.summary(note)
    if progress.rejected["failed"]:
        raise PipelineError(f"every trial so far has failed; the last one: {study_trials.last_error(tuning)}")
    return progress.summary("no trial has finished yet")


if __name__ == "__main__":
    cli.run(main, resumable=True)
