"""What an evaluation compares: each way to a vector per image, its name, and whether it belongs here."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from common import parquet
from common.errors import PipelineError
from common.provenance import Provenance
from train.evaluation import gallery as galleries
from train.evaluation import heads
from train.evaluation.gallery import Gallery


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    told: str  # what it is, in a few words
    id: str  # what its vectors are made with
    vectors: Callable[[Gallery, torch.device], torch.Tensor]  # (G, d) float32 unit vectors, on the device


def of_checkpoint(checkpoint: dict) -> list[Method]:
    """The trained head, and what was there before it: fitted on train only, and stored beside the head."""

    def linear(name: str):
        baseline = checkpoint["baselines"][name]
        return lambda gallery, device: heads.project(
            gallery.embeddings, baseline["mean"], baseline["projection"], device
        )

    known = checkpoint["provenance"]["id"]
    return [
        Method("raw", "the backbone's embeddings as they are", known, _raw),
        Method("pca", "principal components, fitted on train", known, linear("pca")),
        Method("whitening", "learned whitening, fitted on train", known, linear("whitening")),
        Method("trained", f"the trained head, epoch {checkpoint['epoch']}", known, _head(checkpoint)),
    ]


def of_file(path: Path) -> Method:
    """The vectors of a file as they are."""
    return Method("raw", f"the vectors of {path.name} as they are", identity(path), _raw)


def compared(
    paths: list[Path], merged_dir: Path, known: dict[str, Provenance], taken: Iterable[str]
) -> list[Method]:
    """What --compare names: checkpoints, folders that publish/convert_to_hf.py wrote, and Parquet files with other
    vectors of the same images. `known`: the records of the splits in `merged_dir`; `taken`: names given already.

    Raises PipelineError where one cannot be read, StaleArtefact where a head was trained on other images (test's
    could be among them) or on embeddings of another model.
    """
    methods, taken = [], set(taken)
    for path in paths:
        path = path / "checkpoint_best.pt" if (path / "checkpoint_best.pt").exists() else path
        name = _free_name(path, taken)
        taken.add(name)
        if path.is_dir():
            methods.append(_published(path, name, merged_dir, known))
        elif path.suffix == ".parquet":
            galleries.refuse_missing_columns(path, ["streetview_image_id"])
            told = f"the vectors of {path.name}"
            methods.append(Method(name, told, identity(path), functools.partial(_aligned, path)))
        else:
            checkpoint = heads.load_checkpoint(path)
            galleries.refuse_foreign_head(
                path, checkpoint["provenance"]["inputs"], checkpoint["embedding_model"], merged_dir, known
            )
            told = f"the head of {path}, epoch {checkpoint['epoch']}"
            methods.append(Method(name, told, checkpoint["provenance"]["id"], _head(checkpoint)))
    return methods


def identity(path: Path) -> str:
    """What a file of vectors is known by: the id in its footer, or, where another program wrote it, a digest of
    its bytes (two models' files of the same images may be of one size)."""
    if parquet.has_provenance(path):
        return parquet.read_provenance(path).id
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _raw(gallery: Gallery, device: torch.device) -> torch.Tensor:
    # a copy, for `_unit`: float32 on the host would be the gallery's own
    return _unit(torch.from_numpy(gallery.embeddings).to(device, torch.float32, copy=True))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.div_(vectors.norm(dim=1, keepdim=True).clamp_min_(1e-12))  # in place: no second copy


def _head(sizes_and_weights: dict):
    return lambda gallery, device: heads.embed(heads.head_of(sizes_and_weights), gallery.embeddings, device)


def _free_name(path: Path, taken: set[str]) -> str:
    """The run of a checkpoint, the name of a folder or file; with the folders above it where that is taken."""
    path = path.resolve()
    if path.name == "checkpoint_best.pt":
        path = path.parent
    parts = (path if path.is_dir() else path.with_suffix("")).parts
    names = ("/".join(parts[-length:]) for length in range(1, len(parts)))
    name = next((name for name in names if name not in taken), None)
    if name is None:
        raise PipelineError(f"--compare names {path} twice")
    return name


def _published(folder: Path, name: str, merged_dir: Path, known: dict[str, Provenance]) -> Method:
    """The head of a published folder; its backbone is not run: the embeddings are there."""
    try:
        config = json.loads((folder / "config.json").read_text())
        record = Provenance.from_json((folder / "provenance.json").read_text())
        trained_on = record.facts["trained_on"]
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                own = [key for key in tensors.keys() if key.startswith("head.")]  # noqa: SIM118 - not a dict
                weights |= {key.removeprefix("head."): tensors.get_tensor(key) for key in own}
        sizes = {key: config[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
        head = {**sizes, "head": weights}
        heads.head_of(head)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PipelineError(
            f"{folder} is neither a run's folder nor one that publish/convert_to_hf.py wrote "
            f"({parquet.first_line(error)})"
        ) from None
    galleries.refuse_foreign_head(folder, trained_on["inputs"], trained_on["embedding_model"], merged_dir, known)
    return Method(name, f"the published model in {folder}", record.id, _head(head))


def _aligned(path: Path, gallery: Gallery, device: torch.device) -> torch.Tensor:
    """The vectors of the gallery's images out of a file that holds them in any order."""
    images = pd.Index(parquet.read(path, ["streetview_image_id"])["streetview_image_id"].to_pandas())
    rows = images.get_indexer(gallery.table["streetview_image_id"].to_pandas()) if images.is_unique else None
    if rows is None:
        raise PipelineError(f"{path} holds image {images[images.duplicated()][0]} twice")
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        image = gallery.table["streetview_image_id"][int(missing[0])].as_py()
        raise PipelineError(
            f"{path} has no vector of image {image}, and of {len(missing) - 1:,} more that are evaluated\n"
            "compare vectors of the same images, or evaluate that file by itself with --embeddings"
        )
    vectors = galleries.read_vectors(path)
    return _unit(torch.from_numpy(vectors[rows]).to(device).float())
