"""An Optuna study that any number of workers share: one storage, one lock, no trial lost or counted twice.

A worker claims a trial, fails those of dead workers and counts them, all under a lock (see study_storage.py).
A running trial has a heartbeat with every epoch. Its worker is considered dead when the last heartbeat is older
than STALE_MIN_S and than STALE_EPOCHS of the longest epochs in the study; until the study's first epoch has
finished, nobody knows how long one takes, and STALE_UNKNOWN_S applies.
"""

import dataclasses
import functools
import logging
import os
import socket
import time
import warnings
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from common import config, parquet, provenance
from common.errors import PipelineError
from common.provenance import Provenance, Redo
from common.sections import Choices, Config
from train import run_record
from train.tuning import study_storage

STUDY_NAME = "tuning"
STALE_EPOCHS = 5
STALE_MIN_S = 60.0
STALE_UNKNOWN_S = 3600.0
MAX_ATTEMPTS = 3  # workers that may die with one trial: it may be what kills them

log = logging.getLogger("pipeline")
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def record(cfg: Config) -> Provenance:
    """What a study depends on: its inputs, the settings that all trials share, and the search space."""
    inputs = run_record.input_ids(cfg)
    settings = run_record.record(cfg, inputs).config
    varied = {"training.epochs", *(f"training.{key}" for key in cfg.tuning.search_space)}
    settings = {key: value for key, value in settings.items() if key not in varied}
    settings |= config.values(cfg, "tuning.trial_epochs", "tuning.pruner", "tuning.search_space")
    return provenance.record("optuna_worker", settings, inputs)


def check_search_space(cfg: Config) -> None:
    """Raise ConfigError if a bound of a range, or a choice, is not a valid value of its setting."""
    for key, dimension in cfg.tuning.search_space.items():
        for value in dimension.choices if isinstance(dimension, Choices) else dimension[:2]:
            config.with_training(cfg, **{key: value})


def open_study(cfg: Config, record: Provenance, *, create: bool, redo: Redo = "") -> optuna.Study:
    """The study in tuning.study_storage. Raises PipelineError if there is none and `create` is False, and
    StaleArtefact if it has other data or settings than `record`, unless `redo` replaces it."""
    name = study_storage.name_of(cfg)
    if not create and isinstance(name, Path) and not name.exists():
        raise PipelineError(f"{name} does not exist: run train/optuna_worker.py first")
    with study_storage.locked(cfg):
        storage = study_storage.open_storage(cfg)
        if not create and STUDY_NAME not in optuna.get_all_study_names(storage):
            raise PipelineError(f"{name} holds no study: run train/optuna_worker.py first")
        create_or_load = functools.partial(
            optuna.create_study, storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
        study = create_or_load()
        existing = study.user_attrs.get("provenance")
        amount, script = f"{len(study.trials):,} trials", "train/optuna_worker.py"
        if existing and not parquet.matches(name, Provenance.from_dict(existing), record, redo, amount, script):
            _set_aside(study, storage)
            study, existing = create_or_load(), None
        if create and not existing:
            study.set_user_attr("provenance", record.to_dict())
    if cfg.tuning.pruner == "median":  # either pruner sees the validation mAP@R of each epoch
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    else:
        study.pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=cfg.tuning.trial_epochs)
    return study


def existing(cfg: Config) -> dict[Path, Provenance]:
    """Where the study is kept -> its record, with the number of its trials and the seconds that they took."""
    with study_storage.locked(cfg):
        storage = study_storage.open_storage(cfg)
        if STUDY_NAME not in optuna.get_all_study_names(storage):
            return {}
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        if "provenance" not in study.user_attrs:  # its first worker has been killed
            return {}
        record = Provenance.from_dict(study.user_attrs["provenance"])
        seconds = sum(trial.duration.total_seconds() for trial in study.trials if trial.duration)
        made = dataclasses.replace(record, rows={"out": len(study.trials)}, seconds=seconds)
        return {Path(study_storage.name_of(cfg)): made}


def _set_aside(study: optuna.Study, storage) -> None:
    """Keep a study under another name. Workers that are left find that theirs is gone. Requires the lock."""
    name, num_trials = time.strftime(f"{STUDY_NAME}, until %Y-%m-%d %H:%M:%S"), len(study.trials)
    optuna.copy_study(from_study_name=STUDY_NAME, from_storage=storage, to_storage=storage, to_study_name=name)
    optuna.delete_study(study_name=STUDY_NAME, storage=storage)
    log.warning("the former study, of %s trials, is kept beside the new one, as %r", num_trials, name)


def claim(study: optuna.Study, cfg: Config) -> optuna.Trial | None:
    """The next trial for this worker, its parameters drawn; None once there are tuning.num_trials.

    Trials of dead workers come first, under a new number.
    """
    with study_storage.locked(cfg):
        if not num_left(study, cfg):
            return None
        # a seed for each trial: workers that share one would all draw the same
        seed = cfg.training.seed + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = study.ask({key: _distribution(cfg, key) for key in cfg.tuning.search_space})
        trial.set_user_attr("worker", worker_name())
        trial.set_user_attr("heartbeat", time.time())
    return trial


def num_left(study: optuna.Study, cfg: Config) -> int:
    """How many trials can be claimed, those of dead workers included. Requires the lock."""
    requeue_dead(study, time.time())
    trials = study.get_trials(deepcopy=False)
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    return max(0, cfg.tuning.num_trials - num_counted(trials)) + waiting


def _distribution(cfg: Config, key: str) -> BaseDistribution:
    """What a setting is drawn from, by tuning.search_space."""
    dimension = cfg.tuning.search_space[key]
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    low, high, *scale = dimension
    if isinstance(getattr(cfg.training, key), float):
        return FloatDistribution(low, high, log=scale == ["log"])
    return IntDistribution(int(low), int(high), log=scale == ["log"])  # an int, or "auto" for one


def beat(trial: optuna.Trial, longest_epoch_s: float) -> None:
    """Record that this trial's worker is alive."""
    trial.set_user_attr("longest_epoch_s", longest_epoch_s)
    trial.set_user_attr("heartbeat", time.time())


def requeue_dead(study: optuna.Study, now: float) -> None:
    """Fail and requeue running trials whose heartbeat is stale. `now`: seconds since 1970. Requires the lock."""
    trials = study.get_trials(deepcopy=False)
    limit = stale_after_s(trials)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        assert trial.datetime_start is not None  # only while a trial waits
        # a worker may have died before its first heartbeat
        if now - trial.user_attrs.get("heartbeat", trial.datetime_start.timestamp()) > limit:
            requeue(study, trial, trial.user_attrs.get("attempts", 0) + 1)
            worker = trial.user_attrs.get("worker", "a worker")
            log.warning("trial %s marked as failed: %s is dead", trial.number, worker)


def requeue(study: optuna.Study, trial: FrozenTrial | Trial, attempts: int) -> None:
    """Fail a running trial and, unless MAX_ATTEMPTS of its workers have died, queue its parameters again.

    It is queued before it is failed, and only once: if this is interrupted, the next worker completes it.
    """
    if attempts < MAX_ATTEMPTS and trial.number not in retried(study.get_trials(deepcopy=False)):
        study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number, "attempts": attempts})
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # its worker may just have done so


def retried(trials: list[FrozenTrial]) -> set[int]:
    """The numbers of the trials that were queued again under another number."""
    return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}


def num_counted(trials: list[FrozenTrial]) -> int:
    """How many of tuning.num_trials are finished, failed for good, running or queued."""
    return len(trials) - len(retried(trials))


def num_open(study: optuna.Study) -> int:
    """How many trials are running or queued."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)))


def stale_after_s(trials: list[FrozenTrial]) -> float:
    """The age of a heartbeat beyond which its worker is considered dead; see the top of this file."""
    longest = max((trial.user_attrs.get("longest_epoch_s", 0.0) for trial in trials), default=0.0)
    return max(STALE_MIN_S, STALE_EPOCHS * longest) if longest else STALE_UNKNOWN_S


def worker_name() -> str:
    """Host and process, and the Slurm job if there is one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    name = "_".join(filter(None, (job, os.environ.get("SLURM_ARRAY_TASK_ID"))))
    return f"{socket.gethostname()}, process {os.getpid()}" + (f", job {name}" if name else "")


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a value: neither pruned nor failed."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trial(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """The finished trial with the highest value, or with this number. Raises PipelineError if there is none."""
    finished = {trial.number: trial for trial in finished_trials(study)}
    if not finished:
        raise PipelineError(f"none of the study's {len(study.trials)} trials has finished")
    if number is None:
        return max(finished.values(), key=lambda trial: (trial.value, -trial.number))
    if number not in finished:
        raise PipelineError(f"--trial {number} is not a finished trial; finished: {', '.join(map(str, finished))}")
    return finished[number]
