"""The inputs of a training run, and the record that its files carry.

Imports neither torch nor Optuna: slurm/submit.py needs records, too.
"""

from pathlib import Path

from common import config, parquet, provenance
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from common.sections import Config
from difficulty import compute_visual_neighbors

BEST, LAST, HISTORY = "checkpoint_best.pt", "checkpoint_last.pt", "history.parquet"


def run_dir(cfg: Config) -> Path:
    return cfg.paths.checkpoints_dir / cfg.training.run


def input_ids(cfg: Config) -> dict[str, str]:
    """File name -> id of what a run reads. Raises StaleArtefact if the files do not belong together."""
    paths, records = inputs(cfg)
    return {path.name: records[name].id for name, path in paths.items()}


def inputs(cfg: Config) -> tuple[dict[str, Path], dict[str, Provenance]]:
    """Paths and records of "train", "val" and "difficulty"; StaleArtefact unless of one merge and this config."""
    makers = dict.fromkeys(("train", "val"), "preprocess/merge_and_split.py")
    makers["difficulty"] = "difficulty/compute_visual_neighbors.py"
    paths = {split: cfg.paths.merged_dir / f"{split}.parquet" for split in ("train", "val")}
    paths["difficulty"] = cfg.paths.difficulty_dir / "difficulty_metadata.parquet"
    for name, path in paths.items():
        parquet.require(path, makers[name])
    records = {name: parquet.read_provenance(path) for name, path in paths.items()}
    reasons = provenance.differences(records["val"], records["train"])
    if reasons:
        raise StaleArtefact(
            f"{paths['val']} and {paths['train'].name} come from different merge runs: val {reasons[0]}\n"
            "rerun preprocess/merge_and_split.py with --overwrite"
        )
    (output,) = compute_visual_neighbors.outputs(cfg, 0, 1)
    parquet.refuse_stale(paths["difficulty"], records["difficulty"], output.record, "compute_visual_neighbors")
    return paths, records


def record(cfg: Config, input_ids: dict[str, str]) -> Provenance:
    """The record of a run: every setting that its head depends on, and the ids of what it reads."""
    settings = config.values(cfg, "global.seed", "data.ignore_radius_m", "training_model", "training")
    if cfg.training.remine_epochs:
        settings |= config.values(cfg, "data.band_percentiles", "data.band_reference_rank")
    del settings["training.run"]  # only its name: a run may be renamed
    return provenance.record("train", settings, input_ids)


def evaluated_ids(cfg: Config, checkpoint_id: str | None = None) -> dict[str, str]:
    """File name -> id of what an evaluation of the config's run reads. `checkpoint_id`: of its best checkpoint;
    by default the one that the run's history names. Raises PipelineError if the run has not finished.
    """
    names = [f"{split}.parquet" for split in ("test", "train", "val")]
    ids = {name: _id(cfg.paths.merged_dir / name) for name in names}
    history = run_dir(cfg) / HISTORY  # the report draws it
    if checkpoint_id is None:
        checkpoint_id = parquet.read_provenance(history).facts.get("best_checkpoint")
        if checkpoint_id is None:
            raise PipelineError(f"{history} does not name a checkpoint: an older version wrote it; rerun train.py")
    return {**ids, BEST: checkpoint_id, **({HISTORY: _id(history)} if history.exists() else {})}


def _id(path: Path) -> str:
    return parquet.read_provenance(path).id
