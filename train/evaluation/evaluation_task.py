"""What an evaluation covers: a run on the test split, or a file of vectors."""

from dataclasses import dataclass
from pathlib import Path

from common import config, parquet, provenance
from common.provenance import Provenance
from common.sections import Config
from common.stages import Stage
from train import run_record
from train.evaluation import gallery, heads, methods
from train.evaluation.methods import Method


@dataclass(frozen=True)
class EvaluationTask:
    """What is evaluated, and where the results go."""

    folder: Path
    record: Provenance
    paths: list[Path]  # files of rows, the queries' first
    methods: list[Method]
    subject: dict


def of_run(cfg: Config, compare: list[Path], stage: Stage) -> EvaluationTask:
    """The config's run on the test split, beside what --compare names. `stage`: the evaluation's declaration."""
    path = run_record.run_dir(cfg) / run_record.BEST
    checkpoint = heads.load_checkpoint(path)
    records = run_record.merge_records(cfg, gallery.TEST_FIRST)
    own = methods.of_checkpoint(checkpoint)
    gallery.refuse_foreign_head(cfg, path, checkpoint, records)
    compared = methods.compared(cfg, compare, records, [method.name for method in own])
    inputs = run_record.evaluated_ids(cfg, checkpoint["provenance"]["id"])
    inputs |= {method.name: method.id for method in compared}
    test = records[cfg.paths.merged_dir / "test.parquet"]
    subject = {
        "run": cfg.training.run,
        "epoch": checkpoint["epoch"],
        "split_by": test.facts.get("split_by", test.config.get("data.split_by")),
        "embedding_model": checkpoint["embedding_model"],
        "config_hash": checkpoint["provenance"]["config_hash"],
        "config": checkpoint["config"],
    }
    folder = cfg.paths.evaluation_dir / "compared" if compare else cfg.paths.evaluation_dir
    return EvaluationTask(folder, stage.record(cfg, inputs), gallery.files_of(cfg), [*own, *compared], subject)


def of_file(cfg: Config, path: Path) -> EvaluationTask:
    """A file of any model's vectors, by itself."""
    gallery.refuse_missing_columns(path)
    method = Method("raw", f"the vectors of {path.name} as they are", parquet.content_id(path), methods.raw)
    settings = config.values(cfg, "global.seed", "data.ignore_radius_m", "evaluation.bootstrap_samples")
    record = provenance.record("evaluate", settings, {path.name: method.id})
    return EvaluationTask(cfg.paths.evaluation_dir / path.stem, record, [path], [method], {"file": str(path)})
