"""The inputs of a training run, and the record that its files carry.

Imports neither torch nor Optuna: slurm/submit.py needs records, too.
"""

from pathlib import Path

from common import config, errors, parquet, provenance, stages
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance
from common.sections import Config
from difficulty import compute_visual_neighbors

BEST, LAST, HISTORY = "checkpoint_best.pt", "checkpoint_last.pt", "history.parquet"


def run_dir(cfg: Config) -> Path:
    return cfg.paths.checkpoints_dir / cfg.training.run


def input_ids(cfg: Config) -> dict[str, str]:
    """File name -> id of what a run reads. Raises StaleArtefact if the files do not belong together."""
    return {path.name: record.id for path, record in inputs(cfg).items()}


def inputs(cfg: Config) -> dict[Path, Provenance]:
    """The records of train, val and difficulty, by path; StaleArtefact unless of one merge and this config."""
    records = merge_records(cfg, ("train", "val"))
    (output,) = compute_visual_neighbors.outputs(cfg, 0, 1)
    path = parquet.require(output.path, "difficulty/compute_visual_neighbors.py")
    records[path] = parquet.read_provenance(path)
    script, amount = "difficulty/compute_visual_neighbors.py", f"{records[path].rows['out']:,} images"
    parquet.matches(path, records[path], output.record, "", amount, script=script)
    return records


def merge_records(cfg: Config, splits: tuple[str, ...]) -> dict[Path, Provenance]:
    """The records of these splits, by path, in order. Raises StaleArtefact unless one merge run wrote them all."""
    paths = [cfg.paths.merged_dir / f"{split}.parquet" for split in splits]
    for path in paths:
        parquet.require(path, "preprocess/merge_and_split.py")
    try:
        records = {path: parquet.read_provenance(path) for path in paths}
    except PipelineError as error:
        again = errors.command("preprocess/merge_and_split.py", "--remake")
        raise PipelineError(f"{str(error).splitlines()[0]}\nmerge again: {again}") from None
    for path, record in records.items():
        reasons = provenance.differences(record, records[paths[0]])
        if reasons:
            raise StaleArtefact(
                f"{path} and {paths[0].name} come from different merge runs: {path.stem} {reasons[0]}\n"
                f"merge again: {errors.command('preprocess/merge_and_split.py', '--remake')}"
            )
    return records


def record(cfg: Config, input_ids: dict[str, str]) -> Provenance:
    """The record of a run: every setting that its head depends on, and the ids of what it reads."""
    return provenance.record("train", recorded(cfg), input_ids)


def recorded(cfg: Config) -> dict:
    """The settings that a run's head depends on."""
    settings = config.values(cfg, "global.seed", "data.ignore_radius_m", "training_model", "training")
    if cfg.training.remine_epochs:
        settings |= config.values(cfg, "data.band_percentiles", "data.band_reference_rank")
    del settings["training.run"]  # only its name: a run may be renamed
    return settings


def evaluated_ids(cfg: Config, checkpoint_id: str | None = None) -> dict[str, str]:
    """File name -> id of what an evaluation of the config's run reads. `checkpoint_id`: of its best checkpoint, by
    default the one that the run's history names. Raises PipelineError if the run has not finished."""
    ids = stages.ids(cfg.paths.merged_dir / f"{split}.parquet" for split in ("test", "train", "val"))
    history = run_dir(cfg) / HISTORY  # the report draws it
    if checkpoint_id is None or history.exists():
        record = finished(history)
        checkpoint_id = checkpoint_id or record.facts.get("best_checkpoint")
        if checkpoint_id is None:
            raise PipelineError(f"{history} does not name a checkpoint: an older version wrote it; rerun train.py")
        ids[HISTORY] = record.id
    return {**ids, BEST: checkpoint_id}


def finished(history: Path) -> Provenance:
    """The record of a run's history. Raises PipelineError if the run has not finished."""
    record = parquet.read_provenance(history)
    if not record.facts.get("finished"):
        raise PipelineError(
            f"{history.parent} holds a training run that has not finished\n"
            f"let it finish: {errors.command('train/train.py')}"
        )
    return record
