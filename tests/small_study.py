"""A small study: its merge and settings, and a stand-in for training, `value = -(log10(learning_rate) + 3)^2`."""

import math
import time
from pathlib import Path

import made_up_merge
import optuna
import pandas as pd
from conftest import paths_below

from common import cli, config
from difficulty import compute_visual_neighbors
from train.tuning import shared_study, study_trials

SMALL = (
    *("tuning.trial_epochs=2", "training.epochs=3", "training.steps_per_epoch=4", "training.batch_size=32"),
    *("training_model.output_dim=16", "training_model.hidden_dim=16", "data.neighbors=20"),
    *("training.warmup_steps=1", "tuning.num_trials=6"),
)


def write_merge(root: Path) -> Path:
    """A merge and its difficulty below `root`, which is returned."""
    made_up_merge.write_merge(paths_below(root).merged_dir, streets=(6, 6, 6))
    compute_visual_neighbors.main(flags(root))
    return root


def flags(root, *more) -> list[str]:
    return [part for setting in (f"paths.root={root}", *SMALL, *more) for part in ("--set", setting)]


def load(merged, tmp_path, *more):
    return config.load(None, [f"paths.root={merged}", f"paths.study_dir={tmp_path / 'study'}", *SMALL, *more])


def open_study(cfg, **options) -> optuna.Study:
    return shared_study.open_study(cfg, shared_study.record(cfg), create=True, **options)


def stand_in(seconds: float = 0.0):
    """A `fit` whose result depends on the learning rate alone, and its data."""

    def fit(cfg, data, *, on_epoch):
        value = -((math.log10(cfg.training.learning_rate) + 3) ** 2)
        rows = []
        for epoch in range(cfg.training.epochs + 1):
            time.sleep(seconds)
            cli.check_stop()
            rows.append({"epoch": epoch, "val_map_at_r": 0.5 if epoch == 0 else value - 1 / (epoch + 1)})
            on_epoch(epoch, rows[-1]["val_map_at_r"])
        return type("Result", (), {"history": pd.DataFrame(rows)})

    return fit


def work(cfg, tuning, max_trials: int | None = None, minutes: float | None = None) -> cli.Progress:
    with cli.Progress("optuna_worker", "trial", max_trials) as progress:
        study_trials.work(cfg, tuning, progress, minutes)
    return progress


def numbers(tuning, *states) -> list[int]:
    return [trial.number for trial in tuning.get_trials(states=states)]
