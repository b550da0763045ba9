"""Weights & Biases, if `logging.wandb_mode` says so: a run's epochs as they finish, and its results."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import PipelineError
from common.parquet import first_line
from common.provenance import Provenance, digest_of
from common.sections import Config


@contextlib.contextmanager
def session(cfg: Config, run_dir: Path | None, record: Provenance) -> Iterator[Any]:
    """The wandb run, or None without one. A resumed run keeps its id."""
    if cfg.logging.wandb_mode == "disabled" or run_dir is None:
        yield None
        return
    import wandb

    cfg.paths.logs_dir.mkdir(parents=True, exist_ok=True)  # wandb writes to logs/wandb
    try:
        run = wandb.init(
            project=cfg.logging.wandb_project,
            name=run_dir.name,
            id=digest_of(str(run_dir), record.to_json())[:16],
            resume="allow" if cfg.logging.wandb_mode == "online" else None,
            dir=cfg.paths.logs_dir,
            mode=cfg.logging.wandb_mode,
            config=record.config,
        )
    except wandb.errors.Error as error:
        raise PipelineError(
            f'wandb cannot start: {first_line(error)}\nfix this, or set logging.wandb_mode to "offline"'
        ) from None
    with run:
        yield run


def finish(run: Any, run_dir: Path, best: dict) -> None:
    """Log the best epoch's metrics (of checkpoint_best.pt) as the summary, and as an artefact with the history,
    the settings and the curves of the run's folder."""
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
