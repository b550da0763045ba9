"""What an evaluation covers, a run or a file, and what it compares: the ways to one vector per image, and which
are refused."""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from common import config, parquet, provenance
from common.errors import PipelineError, first_line
from common.provenance import Provenance
from common.sections import Config
from common.stages import Stage
from train import run_record
from train.evaluation import gallery as galleries
from train.evaluation import heads
from train.evaluation.gallery import Gallery


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    description: str
    id: str  # of the checkpoint or file that its vectors come from
    vectors: Callable[[Gallery, torch.device], torch.Tensor]  # (G, d) float32 unit, on the device if they fit


@dataclass(frozen=True)
class EvaluationTask:
    """What is evaluated, and where the results go."""

    folder: Path
    record: Provenance
    paths: list[Path]  # files of rows, the queries' first
    methods: list[Method]
    subject: dict


def task_of_run(cfg: Config, compare: list[Path], stage: Stage) -> EvaluationTask:
    """The config's run on the test split, beside what --compare names. `stage`: the evaluation's declaration."""
    path = run_record.run_dir(cfg) / run_record.BEST
    checkpoint = heads.load_checkpoint(path)
    records = run_record.merge_records(cfg, galleries.TEST_FIRST)
    own = of_checkpoint(checkpoint)
    galleries.refuse_foreign_head(cfg, path, checkpoint, records)
    others = compared(cfg, compare, records, [method.name for method in own])
    inputs = run_record.evaluated_ids(cfg, checkpoint["provenance"]["id"])
    inputs |= {method.name: method.id for method in others}
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
    return EvaluationTask(folder, stage.record(cfg, inputs), galleries.files_of(cfg), [*own, *others], subject)


def task_of_file(cfg: Config, path: Path) -> EvaluationTask:
    """A file of any model's vectors, by itself."""
    galleries.refuse_missing_columns(path)
    method = Method("raw", f"the vectors of {path.name} as they are", parquet.content_id(path), raw)
    settings = config.values(cfg, "global.seed", "data.ignore_radius_m", "evaluation.bootstrap_samples")
    record = provenance.record("evaluate", settings, {path.name: method.id})
    return EvaluationTask(cfg.paths.evaluation_dir / path.stem, record, [path], [method], {"file": str(path)})


def of_checkpoint(checkpoint: dict) -> list[Method]:
    """The trained head last, after the baselines that were fitted on train and saved with it."""
    run, baselines = checkpoint["provenance"]["id"], checkpoint["baselines"]
    return [
        Method("raw", "the backbone's embeddings as they are", run, raw),
        Method("pca", "principal components, fitted on train", run, _linear(baselines["pca"])),
        Method("whitening", "learned whitening, fitted on train", run, _linear(baselines["whitening"])),
        Method("trained", f"the trained head, epoch {checkpoint['epoch']}", run, _head(checkpoint)),
    ]


def compared(
    cfg: Config, paths: list[Path], records: dict[Path, Provenance], taken: Iterable[str]
) -> list[Method]:
    """What --compare names: checkpoints, folders written by publish/convert_to_hf.py, and Parquet files with other
    vectors of the same images. `records`: of the splits, test first; `taken`: names of other methods.

    Raises PipelineError if one cannot be read, StaleArtefact if a head was trained on another merge (it may have
    seen the test images) or on embeddings of another model.
    """
    methods, taken = [], set(taken)
    for path in paths:
        path = path / "checkpoint_best.pt" if (path / "checkpoint_best.pt").exists() else path
        name = _free_name(path, taken)
        taken.add(name)
        if path.suffix == ".parquet":
            galleries.refuse_missing_columns(path, ["streetview_image_id"])
            vectors = functools.partial(_aligned, path)
            methods.append(Method(name, f"the vectors of {path.name}", parquet.content_id(path), vectors))
            continue
        if path.is_dir():
            checkpoint, description = _published(path), f"the published model in {path}"
        else:
            checkpoint = heads.load_checkpoint(path)
            description = f"the head of {path}, epoch {checkpoint['epoch']}"
        galleries.refuse_foreign_head(cfg, path, checkpoint, records)
        methods.append(Method(name, description, checkpoint["provenance"]["id"], _head(checkpoint)))
    return methods


def raw(gallery: Gallery, device: torch.device) -> torch.Tensor:
    """The gallery's embeddings, normalised."""
    return heads.normalized(gallery.embeddings, device)


def _linear(baseline: dict):
    mean, projection = baseline["mean"], baseline["projection"]
    return lambda gallery, device: heads.project(gallery.embeddings, mean, projection, device)


def _head(checkpoint: dict):
    return lambda gallery, device: heads.embed(heads.head_of(checkpoint), gallery.embeddings, device)


def _free_name(path: Path, taken: set[str]) -> str:
    """The run of a checkpoint, else the name of the folder or file; if taken, preceded by its parent folders."""
    path = path.resolve()
    path = path.parent if path.name == "checkpoint_best.pt" else path
    parts = (path if path.is_dir() else path.with_suffix("")).parts
    for start in range(len(parts) - 1, 0, -1):
        name = "/".join(parts[start:])
        if name not in taken:
            return name
    raise PipelineError(f"--compare names {path} twice")


def _published(folder: Path) -> dict:
    """The head of a published folder, as a checkpoint; the folder's backbone is not needed."""
    try:
        model_config = json.loads((folder / "config.json").read_text())
        record = Provenance.from_json((folder / "provenance.json").read_text())
        trained_on = record.facts["trained_on"]
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                keys = [key for key in tensors.keys() if key.startswith("head.")]  # noqa: SIM118 - not a dict
                weights |= {key.removeprefix("head."): tensors.get_tensor(key) for key in keys}
        made = {"id": record.id, "inputs": trained_on["inputs"]}
        model = trained_on["embedding_model"]
        checkpoint = {**model_config, "head": weights, "embedding_model": model, "provenance": made}
        heads.head_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PipelineError(
            f"{folder} is neither a run's folder nor one written by publish/convert_to_hf.py ({first_line(error)})"
        ) from None
    return checkpoint


def _aligned(path: Path, gallery: Gallery, device: torch.device) -> torch.Tensor:
    """The vectors of the gallery's images, from a file that holds them in any order."""
    images = pd.Index(parquet.read(path, ["streetview_image_id"])["streetview_image_id"].to_pandas())
    if not images.is_unique:
        raise PipelineError(f"{path} holds image {images[images.duplicated()][0]} twice")
    rows = images.get_indexer(gallery.table["streetview_image_id"].to_pandas())
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        image = gallery.table["streetview_image_id"][int(missing[0])]
        raise PipelineError(
            f"{path} has no vector of image {image} and {len(missing) - 1:,} more that are evaluated\n"
            "compare vectors of the same images, or evaluate that file by itself with --embeddings"
        )
    embeddings = np.concatenate([block for _, block in galleries.batches([path], ["streetview_image_id"])])
    return heads.normalized(embeddings[rows], device)
