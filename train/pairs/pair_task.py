"""What an evaluation of the verified pairs covers, whether it is done, and the cosines of its methods."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import config, devices, parquet, provenance
from common.errors import PipelineError, StaleArtefact
from common.imagery import verified_pairs
from common.imagery.verified_pairs import PairFiles
from common.provenance import Provenance, Redo
from common.sections import Config
from generate import model_files
from train import run_record
from train.evaluation import gallery, heads, methods
from train.evaluation.methods import Method
from train.pairs import pair_images
from train.pairs.pair_images import PairImages

_MODEL = ("name", "revision", "weights", "pooling", "views")  # what embeddings of one model have in common


@dataclass(frozen=True)
class PairTask:
    """What is judged, and where the results go."""

    kind: str  # of the images: "whole" or "patches"
    folder: Path
    record: Provenance
    source_id: dict[str, str]  # name -> identity of the test set
    methods: list[Method]
    vectors: dict[str, Path]  # name -> table of another model's vectors
    embedding_model: dict  # of the run
    subject: dict

    @property
    def descriptions(self) -> dict[str, str]:
        tables = {name: f"the vectors of {path.name}" for name, path in self.vectors.items()}
        return {**{method.name: method.description for method in self.methods}, **tables}


def of_run(cfg: Config, source: Path, kind: str, compare: list[Path], vectors: list[Path]) -> PairTask:
    """The config's run, beside other heads and tables of vectors. Raises PipelineError if something is missing,
    StaleArtefact if a head was trained on another merge or on embeddings of another model."""
    source_id = {source.name: verified_pairs.identity_of(source)}
    path = run_record.run_dir(cfg) / run_record.BEST
    checkpoint = heads.load_checkpoint(path)
    records = run_record.merge_records(cfg, gallery.TEST_FIRST)
    gallery.refuse_foreign_head(cfg, path, checkpoint, records)
    if tables := [other for other in compare if other.suffix == ".parquet"]:
        raise PipelineError(f"--compare {tables[0]}: name tables of vectors with --vectors")
    own = methods.of_checkpoint(checkpoint)
    judged = [*own, *methods.compared(cfg, compare, records, [method.name for method in own])]
    named = {table.stem: table for table in vectors}
    if len(named) < len(vectors) or named.keys() & {method.name for method in judged}:
        raise PipelineError("--vectors: give each table a name of its own, other than those of the other rows")
    inputs = {**source_id, **{split.name: record.id for split, record in records.items()}}
    inputs |= {run_record.BEST: checkpoint["provenance"]["id"]}
    inputs |= {method.name: method.id for method in judged[len(own) :]}
    inputs |= {name: parquet.content_id(table) for name, table in named.items()}
    settings = config.values(cfg, "global.seed", "evaluation.bootstrap_samples")
    record = provenance.record("evaluate_pairs", {**settings, "images": kind}, inputs)
    folder = cfg.paths.evaluation_dir / "pairs" / ("patches" if kind == "patches" else "")
    folder = folder / "compared" if compare or vectors else folder
    subject = {"run": cfg.training.run, "epoch": checkpoint["epoch"], "source": source.name}
    subject |= {"embedding_model": checkpoint["embedding_model"]}
    return PairTask(kind, folder, record, source_id, judged, named, checkpoint["embedding_model"], subject)


def kept(path: Path, record: Provenance, redo: Redo) -> dict | None:
    """An existing pairs.json that need not be made again; None if there is none. Raises StaleArtefact if it was
    made otherwise than `record` says, and PipelineError if it is damaged, unless `redo` allows to replace it."""
    if redo == "all" or not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        existing = Provenance.from_dict(results["provenance"])
    except (ValueError, KeyError, TypeError):
        if redo:
            return None
        raise PipelineError(f"{path} is damaged or from another version\nremake it with --remake") from None
    return (
        results if parquet.matches(path, existing, record, redo, f"{existing.rows.get('in', 0):,} pairs") else None
    )


def embed_missing(cfg: Config, source: PairFiles, task: PairTask, redo: Redo) -> None:
    """Make the embeddings of the images unless they are there. Raises StaleArtefact if they are of another model
    than the run's."""
    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    model = model_files.identity(cfg.embedding_model, devices.resolve_dtype(cfg.embedding_model.dtype, device))
    record = provenance.record("evaluate_pairs", {**model, "images": task.kind}, task.source_id)
    ours = {key.removeprefix("embedding_model."): value for key, value in record.config.items()}
    held, wanted = provenance.model_differences(ours, provenance.with_views(task.embedding_model), _MODEL)
    if held:
        raise StaleArtefact(
            f"the settings ask for embeddings with {held}; the run was trained on embeddings with {wanted}\n"
            "set [embedding_model] to what the run was trained on"
        )
    if not parquet.is_done(pair_images.embeddings_path(cfg, task.kind), record, redo):
        from train.pairs import pair_embedding  # imports transformers, in seconds

        pair_embedding.embed(cfg, source, task.kind, device, record)


def cosines(task: PairTask, images: PairImages, device: torch.device) -> dict[str, np.ndarray]:
    """The cosine of each pair, (P,) float32, by method."""
    first, second = (torch.from_numpy(rows) for rows in (images.judged.first, images.judged.second))
    vectors = {
        method.name: (lambda method=method: method.vectors(images.gallery, device)) for method in task.methods
    }
    vectors |= {
        name: (lambda path=path: pair_images.vectors_of(path, images.gallery))
        for name, path in task.vectors.items()
    }
    found = {}
    for name, of_images in vectors.items():
        of_method = of_images().cpu()
        found[name] = (of_method[first] * of_method[second]).sum(dim=1).numpy()
    return found
