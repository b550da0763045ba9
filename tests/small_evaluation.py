"""Evaluations of a small merge: one to spoil, and the command with its settings."""

import small_merge

from common import config
from train import evaluate
from train.evaluation import gallery


def write(tmp_path):
    """(Configuration, columns by split, checkpoint) of a merge below `tmp_path`, for a test to spoil."""
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    return cfg, small_merge.write_merge(cfg, buildings=20, cells=5), small_merge.write_checkpoint(cfg)


def run(cfg, *extra) -> int:
    """The command, on the merge of `cfg`."""
    flags = [f"paths.root={cfg.paths.root}", f"evaluation.bootstrap_samples={cfg.evaluation.bootstrap_samples}"]
    return evaluate.main([part for flag in flags for part in ("--set", flag)] + list(extra))


def load(cfg, *splits) -> gallery.Gallery:
    """Queries from the first split, further rows from the others."""
    paths = [cfg.paths.merged_dir / f"{split}.parquet" for split in splits]
    return gallery.load(paths, cfg.data.ignore_radius_m)
