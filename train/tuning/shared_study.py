"""An Optuna study that any number of workers share: one storage, one lock, no trial lost or counted twice.

A worker claims a trial, fails those of dead workers and counts, all under a lock (see
train/tuning/study_storage.py). A trial
has a heartbeat with every epoch. A running one is taken for dead when its last heartbeat is older than
STALE_EPOCHS of the longest epochs seen in the study, and than STALE_MIN_S. Before the study's first epoch is over
nobody knows how long one takes, and STALE_UNKNOWN_S applies.
"""

import logging
import os
import socket
import time
import warnings
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from common import config, parquet, provenance
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Choices, Config
from train import run_record
from train.tuning import study_storage

STUDY_NAME = "tuning"
STALE_EPOCHS = 5
STALE_MIN_S = 60.0
STALE_UNKNOWN_S = 3600.0
MAX_ATTEMPTS = 3  # workers that a trial may take with it: it may be what kills them

log = logging.getLogger("pipeline")
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


# ------------------------------------------------------------------------------------------------ the study


def record(cfg: Config) -> Provenance:
    """What a study depends on: the inputs and a trial's settings; for those that vary, the search space."""
    inputs = run_record.input_ids(cfg)
    settings = run_record.record(cfg, inputs).config
    varied = {"training.epochs", *(f"training.{key}" for key in cfg.tuning.search_space)}
    settings = {key: value for key, value in settings.items() if key not in varied}
    settings |= config.values(cfg, "tuning.trial_epochs", "tuning.pruner", "tuning.search_space")
    return provenance.record("optuna_worker", settings, inputs)


def open_study(cfg: Config, made: Provenance, *, create: bool, overwrite: bool = False) -> optuna.Study:
    """The study that tuning.study_storage keeps. Raises StaleArtefact if it was made on other data or settings
    than `made` says (`overwrite` replaces it then), PipelineError if there is none and `create` is False."""
    name = study_storage.name_of(cfg)
    if not create and isinstance(name, Path) and not name.exists():
        raise PipelineError(f"{name} does not exist: run train/optuna_worker.py first")
    with study_storage.locked(cfg):
        opened = study_storage.open_storage(cfg)
        study = _existing_study(opened)
        there = study.user_attrs.get("provenance") if study else None
        if there and overwrite and provenance.differences(Provenance(**there), made):
            optuna.delete_study(study_name=STUDY_NAME, storage=opened)
            there = None
        if study and there:
            parquet.refuse_stale(name, Provenance(**there), made, f"{len(study.trials):,} trials")
        elif not create:
            raise PipelineError(f"{name} holds no study: run train/optuna_worker.py first")
        else:
            study = optuna.create_study(
                storage=opened, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
            )
            study.set_user_attr("provenance", made.to_dict())
    study.pruner = pruner_of(cfg)
    return study


def pruner_of(cfg: Config) -> optuna.pruners.BasePruner:
    """What ends trials that fall behind, by tuning.pruner; both see the validation mAP@R of each epoch."""
    if cfg.tuning.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=cfg.tuning.trial_epochs)


def _existing_study(opened: BaseStorage) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=STUDY_NAME, storage=opened)
    except KeyError:
        return None


# ------------------------------------------------------------------------------------------------ its trials


def claim(study: optuna.Study, cfg: Config) -> optuna.Trial | None:
    """The next trial, its parameters drawn, for this worker to run; None if there are tuning.num_trials.

    Trials of dead workers come back first, and again under a new number.
    """
    with study_storage.locked(cfg):
        requeue_dead(study, time.time())
        trials = study.get_trials(deepcopy=False)
        if not _has_work(trials, cfg.tuning.num_trials):
            return None
        # a seed for each trial: workers that share one would all draw the same
        study.sampler = optuna.samplers.TPESampler(seed=cfg.training.seed + len(trials), constant_liar=True)
        trial = study.ask()
        for key, dimension in cfg.tuning.search_space.items():
            suggest(trial, key, dimension, isinstance(getattr(cfg.training, key), int))
        trial.set_user_attr("worker", worker_name())
        trial.set_user_attr("heartbeat", time.time())
    return trial


def is_full(study: optuna.Study, cfg: Config) -> bool:
    """Whether there is no trial left for a worker that starts now."""
    with study_storage.locked(cfg):
        requeue_dead(study, time.time())
        return not _has_work(study.get_trials(deepcopy=False), cfg.tuning.num_trials)


def _has_work(trials: list[FrozenTrial], num_trials: int) -> bool:
    return num_counted(trials) < num_trials or any(trial.state == TrialState.WAITING for trial in trials)


def suggest(trial: optuna.Trial, key: str, dimension: tuple | Choices, whole: bool) -> None:
    """Draw one setting: `dimension` as in tuning.search_space, `whole` for one that is an integer."""
    if isinstance(dimension, Choices):
        trial.suggest_categorical(key, dimension.choices)
        return
    low, high, *scale = dimension
    if whole:
        trial.suggest_int(key, int(low), int(high), log=scale == ["log"])
    else:
        trial.suggest_float(key, low, high, log=scale == ["log"])


def beat(trial: optuna.Trial, longest_epoch_s: float) -> None:
    """Say that this trial's worker is alive."""
    trial.set_user_attr("longest_epoch_s", longest_epoch_s)
    trial.set_user_attr("heartbeat", time.time())


def requeue_dead(study: optuna.Study, now: float) -> None:
    """Fail the running trials whose heartbeat is stale and put them back in the queue. Call it with the lock."""
    trials = study.get_trials(deepcopy=False)
    limit = stale_after_s(trials)
    for trial in trials:
        if trial.state == TrialState.RUNNING and now - last_heartbeat(trial) > limit:
            attempts = trial.user_attrs.get("attempts", 0) + 1
            requeue(study, trial, attempts)
            log.warning("trial %s of %s is dead, failed", trial.number, trial.user_attrs.get("worker", "a worker"))


def requeue(study: optuna.Study, trial: FrozenTrial | Trial, attempts: int) -> None:
    """Fail a running trial and, unless its workers have died MAX_ATTEMPTS times, queue its parameters again.

    Queued first, failed last, and not queued twice: killed in between, the next worker finishes this.
    """
    if attempts < MAX_ATTEMPTS and trial.number not in retried(study.get_trials(deepcopy=False)):
        study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number, "attempts": attempts})
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # by its worker, this moment


def retried(trials: list[FrozenTrial]) -> set[int]:
    """The numbers of the trials that were queued again under another number."""
    return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}


def num_counted(trials: list[FrozenTrial]) -> int:
    """How many of tuning.num_trials are finished, failed for good, running or queued."""
    again = retried(trials)
    return sum(trial.number not in again for trial in trials)


def num_open(study: optuna.Study) -> int:
    """How many trials are running or queued."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)))


def stale_after_s(trials: list[FrozenTrial]) -> float:
    """The age of a heartbeat from which on a worker is taken for dead; see the top of this file."""
    longest = max((trial.user_attrs.get("longest_epoch_s", 0.0) for trial in trials), default=0.0)
    return max(STALE_MIN_S, STALE_EPOCHS * longest) if longest else STALE_UNKNOWN_S


def last_heartbeat(trial: FrozenTrial) -> float:
    """Seconds since 1970; of a worker that died before its first one, when its trial started. The trial runs."""
    assert trial.datetime_start is not None  # only of one that waits
    return trial.user_attrs.get("heartbeat", trial.datetime_start.timestamp())


def worker_name() -> str:
    """Host and process, and the Slurm job where there is one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    name = "_".join(filter(None, (job, os.environ.get("SLURM_ARRAY_TASK_ID"))))
    return f"{socket.gethostname()}, process {os.getpid()}" + (f", job {name}" if name else "")


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those with a value: neither pruned nor failed."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trial(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """The finished trial of highest value, or the one of this number. Raises PipelineError if there is none."""
    finished = finished_trials(study)
    if not finished:
        raise PipelineError(f"none of the study's {len(study.trials)} trials has finished")
    if number is None:
        return max(finished, key=lambda trial: (trial.value, -trial.number))
    chosen = [trial for trial in finished if trial.number == number]
    if not chosen:
        numbers = ", ".join(str(trial.number) for trial in finished)
        raise PipelineError(f"--trial {number} is not a finished trial; those are {numbers}")
    return chosen[0]


# ------------------------------------------------------------------------------------- settings of a trial


def check_search_space(cfg: Config) -> None:
    """Raise ConfigError if an end of a range, or a choice, is not a valid value of its setting."""
    for key, dimension in cfg.tuning.search_space.items():
        for value in dimension.choices if isinstance(dimension, Choices) else dimension[:2]:
            config.with_training(cfg, **{key: value})
