"""A short training: its merge with the difficulty, its settings, and a run."""

from pathlib import Path

import made_up_merge
from conftest import paths_below

from common import config
from difficulty import compute_visual_neighbors
from train import run_record
from train.fitting import checkpoints, fit

SETTINGS = [
    "data.neighbors=30",
    "data.band_percentiles=[20, 40, 60, 80]",
    "training_model.output_dim=16",
    "training_model.hidden_dim=48",
    "training.loss=triplet",
    "training.epochs=4",
    "training.steps_per_epoch=6",
    "training.batch_size=64",
    "training.bandit_groups=8",
    "training.warmup_steps=4",
    "training.val_max_queries=300",
]


def write_merge(root: Path) -> Path:
    """A merge with its difficulty below `root`, which is returned: 60 streets to train on."""
    made_up_merge.write_merge(paths_below(root).merged_dir, streets=(60, 20, 1))
    compute_visual_neighbors.main(flags(root))
    return root


def settings(root, *more):
    return [f"paths.root={root}", *SETTINGS, *more]


def flags(root, *more):
    return [flag for setting in settings(root, *more) for flag in ("--set", setting)]


def train(root, data, run_dir=None, *more, redo="", **options):
    cfg = config.load(None, settings(root, *more))
    record = run_record.record(cfg, data.inputs)
    saved = checkpoints.existing(run_dir, record, redo) if run_dir else None
    return fit.fit(cfg, data, run_dir=run_dir, saved=saved, **options)
