"""Weights & Biases, if `logging.wandb_mode` says so: a run's epochs as they finish, and its results.

Writes   <the run's folder>/wandb: also what wandb would put below $HOME, which compute nodes often cannot write

Tracking never ends a run: its first error is a warning, and from then on nothing more is tracked.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import PipelineError, first_line
from common.provenance import Provenance, digest_of
from common.sections import Config

FINISH_TIMEOUT_S = 600
log = logging.getLogger("pipeline")


def require_wandb(cfg: Config) -> None:
    """Raise PipelineError if wandb is needed and not installed."""
    mode = cfg.logging.wandb_mode
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise PipelineError(
            f'logging.wandb_mode = "{mode}" needs the Python package wandb, which is not installed for '
            f"{sys.executable}\nrun `pip install -e '.[tracking]'` in the repository, or set it to \"disabled\""
        )


class Tracker:
    """Tells wandb of a run; without one, or after an error, does nothing."""

    def __init__(self) -> None:
        self.run: Any = None
        self.has_failed = False

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` returns; None if it fails, which is a warning and the end of the tracking."""
        try:
            with tqdm.external_write_mode():  # it prints: a progress bar makes way
                return action()
        except (Exception, SystemExit) as error:  # its teardown exits if wandb's own process has failed
            if not self.has_failed:
                log.warning("wandb: %s; the run goes on without tracking", first_line(error))
                log.debug("wandb", exc_info=error)
            self.run, self.has_failed = None, True
            return None

    def log(self, row: dict, epoch: int) -> None:
        """Log an epoch."""
        if self.run is not None:
            self.attempt(lambda: self.run.log(row, step=epoch))

    def log_results(self, run_dir: Path, best: dict) -> None:
        """Log the metrics of `best`, the content of checkpoint_best.pt, as the summary, and as an artefact with
        the history, the settings and the curves of the run's folder."""
        if self.run is not None:
            self.attempt(lambda: _log_results(self.run, run_dir, best))


@contextlib.contextmanager
def session(cfg: Config, run_dir: Path | None, record: Provenance) -> Iterator[Tracker]:
    """A tracker of the run; after the block everything it was told is on disk. A resumed run keeps its id."""
    tracker, mode = Tracker(), cfg.logging.wandb_mode
    if mode == "disabled" or run_dir is None:
        yield tracker
        return
    # what a user has set counts; in mode "online" the configuration, where `wandb login` puts a server's address
    kinds = ("data", "cache") if mode == "online" else ("data", "cache", "config")
    folders = {f"WANDB_{kind.upper()}_DIR": str(run_dir / "wandb" / kind) for kind in kinds}
    # without a network, wandb would retry for ever at the end; what it has not sent stays in the run's folder
    settings = {
        **folders,
        "WANDB_FINISH_TIMEOUT": str(FINISH_TIMEOUT_S),
    }  # wandb 0.27.2 or newer; others ignore it
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    exit_code = 1
    try:
        tracker.run = tracker.attempt(lambda: _start(cfg, run_dir, record))
        yield tracker
        exit_code = 0
    finally:
        tracker.attempt(lambda: _end(tracker.run, exit_code))
        for name in settings:
            del os.environ[name]


def _start(cfg: Config, run_dir: Path, record: Provenance) -> Any:
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)  # wandb takes a temporary folder instead of one that is not there
    return wandb.init(
        project=cfg.logging.wandb_project,
        name=run_dir.name,
        id=digest_of(str(run_dir), record.to_json())[:16],
        resume="allow" if cfg.logging.wandb_mode == "online" else None,
        dir=run_dir,
        mode=cfg.logging.wandb_mode,
        config=record.config,
    )


def _end(run: Any, exit_code: int) -> None:
    import wandb

    if run is not None:
        run.finish(exit_code)
    wandb.sdk.teardown(exit_code)  # waits for wandb's process, which goes on writing after `finish` has returned


def _log_results(run: Any, run_dir: Path, best: dict) -> None:
    import wandb

    figures = {"epoch": best["epoch"], **best["metrics"]}
    run.summary.update({f"best/{name}": value for name, value in figures.items()})
    run.summary["curves"] = wandb.Image(str(run_dir / "curves.png"))
    artifact = wandb.Artifact(f"run-{run.id}", type="run", metadata=figures)
    for name in ("curves.png", "history.parquet"):
        artifact.add_file(str(run_dir / name))
    for name, content in (("config.json", best["config"]), ("best.json", figures)):
        with artifact.new_file(name) as file:
            json.dump(content, file, indent=1)
    run.log_artifact(artifact)
