"""A worker's trials, one after the other, on data that is loaded once."""

import logging
import time

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from common import cli, config
from common.errors import PipelineError, Stopped, is_out_of_memory
from common.sections import Config
from train.datasets import TrainingData, load_data
from train.fitting.fit import fit
from train.tuning import shared_study, study_storage

log = logging.getLogger("pipeline")


def work(
    cfg: Config,
    tuning: optuna.Study,
    progress: cli.Progress,
    most: int | None = None,
    minutes: float | None = None,
) -> None:
    """Run trials until the study is full or `most` have been run; start none after so many `minutes`."""
    started = time.monotonic()
    data = load_data(cfg)
    while most is None or progress.rows_in < most:
        cli.check_stop()
        if minutes is not None and time.monotonic() - started >= 60 * minutes:
            return
        trial = shared_study.claim(tuning, cfg)
        if trial is None:
            return
        outcome = run(cfg, data, tuning, trial)
        progress.add(1, int(outcome == "finished"), {} if outcome == "finished" else {outcome: 1})


def run(cfg: Config, data: TrainingData, tuning: optuna.Study, trial: optuna.Trial) -> str:
    """Train with a trial's settings and return the outcome. A signal requeues the trial and raises Stopped."""
    drawn = (f"{key} {format(x, '.3g') if isinstance(x, float) else x}" for key, x in trial.params.items())
    log.info("trial %s: %s", trial.number, ", ".join(drawn))
    try:
        return _train(cfg, data, tuning, trial)
    except UpdateFinishedTrialError:  # the heartbeat came too late
        log.warning("trial %s was considered dead and given to another worker; result dropped", trial.number)
        return "taken_for_dead"
    except (Stopped, KeyboardInterrupt):
        with study_storage.locked(cfg):
            shared_study.requeue(tuning, trial, trial.user_attrs.get("attempts", 0))
        raise


def _train(cfg: Config, data: TrainingData, tuning: optuna.Study, trial: optuna.Trial) -> str:
    """The outcome of a trial that is neither stopped nor considered dead."""
    longest_s, last = 0.0, time.monotonic()

    def on_epoch(epoch: int, val_map_at_r: float) -> None:
        nonlocal longest_s, last
        now = time.monotonic()
        if epoch:
            longest_s = max(longest_s, now - last)
            trial.report(val_map_at_r, epoch)  # epoch 0, the whitening, is the same for all
        last = now
        shared_study.beat(trial, longest_s)
        if 0 < epoch < cfg.tuning.trial_epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        settings = config.with_training(cfg, **trial.params, epochs=cfg.tuning.trial_epochs)
        trained = fit(settings, data, on_epoch=on_epoch).history.iloc[1:]
    except optuna.TrialPruned:
        tuning.tell(trial, state=TrialState.PRUNED)
        return "pruned"
    except (PipelineError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, PipelineError) or is_out_of_memory(error)):
            raise  # a device whose state is lost, or a bug, would fail the next trials as well
        log.warning("trial %s failed: %s", trial.number, error)
        trial.set_user_attr("error", str(error))
        tuning.tell(trial, state=TrialState.FAIL)
        return "failed"
    best = trained.loc[trained["val_map_at_r"].idxmax()]
    trial.set_user_attr("best_epoch", int(best["epoch"]))
    tuning.tell(trial, float(best["val_map_at_r"]))
    return "finished"


def last_error(tuning: optuna.Study) -> str:
    """The error of the trial that failed last."""
    return next((t.user_attrs["error"] for t in reversed(tuning.trials) if "error" in t.user_attrs), "unknown")
