"""Weights & Biases: the epochs of a run as they come, if `logging.wandb_mode` says so."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from common.config import Config
from common.provenance import Provenance, digest_of


@contextlib.contextmanager
def session(cfg: Config, run_dir: Path | None, made: Provenance) -> Iterator[Callable[[dict], None]]:
    """A function that takes a row of the history. A run that is continued has the same id there, too."""
    if cfg.logging.wandb_mode == "disabled" or run_dir is None:
        yield lambda row: None
        return
    import wandb

    cfg.paths.logs_dir.mkdir(parents=True, exist_ok=True)  # wandb writes to logs/wandb
    with wandb.init(
        project=cfg.logging.wandb_project,
        name=run_dir.name,
        id=digest_of(str(run_dir), made.to_json())[:16],
        resume="allow" if cfg.logging.wandb_mode == "online" else None,
        dir=cfg.paths.logs_dir,
        mode=cfg.logging.wandb_mode,
        config=made.config,
    ) as run:
        yield lambda row: run.log(row, step=row["epoch"])
