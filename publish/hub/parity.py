"""Whether AutoModel, offline and without this repository, gives the pipeline's vectors from a published folder.

Its two parts are checked apart. The backbone, whose rounding depends on the device and its kernels, must give the
stored embeddings; the head, which runs in float32, must give of the same embeddings what the trained one gives.
Together they could not be held to a narrow bound: a whitening amplifies the backbone's rounding, in bfloat16 from
7e-5 in cosine distance to 1.6e-2.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import parquet
from common.errors import PipelineError
from common.imagery.decoding import Undecodable, decode
from common.imagery.tar_images import of_paths
from common.sections import Config
from generate.pixels import Preprocessing
from train.evaluation.heads import head_of

MAX_IMAGES = 64
MAX_BACKBONE_DISTANCE = 1e-3
MAX_HEAD_DISTANCE = 1e-6
_USE = """
import sys, numpy, torch
from transformers import AutoModel
folder, device = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device)
inputs, embeddings = torch.from_numpy(numpy.load("inputs.npy")), []
model.head.register_forward_pre_hook(lambda head, inputs: embeddings.append(inputs[0].float().cpu()))
with torch.inference_mode():
    vectors = [model(batch.to(device)).pooler_output.float().cpu() for batch in inputs.split(8)]
numpy.savez("found.npz", embeddings=torch.cat(embeddings).numpy(), vectors=torch.cat(vectors).numpy())
"""


class Parity(NamedTuple):
    """The largest cosine distances of the published model from the pipeline, over some images."""

    parity_images: int
    backbone_cosine_distance: float  # of its embeddings from the stored ones
    head_cosine_distance: float  # of its vectors from the trained head's, of the same embeddings


def check(
    folder: Path, cfg: Config, checkpoint: dict, preprocessing: Preprocessing | None, device: torch.device
) -> Parity:
    """For the first images of the test split, or, if a head alone is published (no `preprocessing`), for their
    stored embeddings. Raises PipelineError above MAX_BACKBONE_DISTANCE or MAX_HEAD_DISTANCE."""
    test = cfg.paths.merged_dir / "test.parquet"
    rows = next(parquet.batches(test, ["tar_file", "image_offset", "image_size", "embedding"], MAX_IMAGES), None)
    if rows is None:
        raise PipelineError(f"{test} has no rows to check the published model with")
    stored = parquet.to_matrix(rows["embedding"])
    if preprocessing is None:
        inputs = stored.astype(np.float32)
    else:
        pixels, numbers = _pixels(cfg, test, rows, preprocessing)
        inputs, stored = pixels, stored[numbers]
    embeddings, vectors = outputs_of(folder, inputs, device)
    with torch.inference_mode():
        expected = head_of(checkpoint)(torch.from_numpy(embeddings)).numpy()
    found = Parity(len(inputs), _largest_distance(embeddings, stored), _largest_distance(vectors, expected))
    over = f"over {len(inputs)} images"
    if not found.backbone_cosine_distance <= MAX_BACKBONE_DISTANCE:  # or not a number
        raise PipelineError(
            f"the published model's embeddings are up to {found.backbone_cosine_distance:.1e} in cosine distance "
            f"from the stored ones, {over} (at most {MAX_BACKBONE_DISTANCE}); nothing was published\n"
            "the stored ones were made with a different backbone or preprocessing: regenerate them"
        )
    if not found.head_cosine_distance <= MAX_HEAD_DISTANCE:
        raise PipelineError(
            f"the published head's vectors are up to {found.head_cosine_distance:.1e} in cosine distance from the "
            f"trained head's for the same embeddings, {over} (at most {MAX_HEAD_DISTANCE}); nothing was "
            "published\n"
            "the installed torch or transformers loads it differently: report it, with their versions"
        )
    return found


def _pixels(cfg: Config, test: Path, rows, preprocessing: Preprocessing) -> tuple[np.ndarray, list[int]]:
    """The model's input, (N, 3, H, W) float32, of the rows whose images can be decoded, and their numbers."""
    images, numbers = [], []
    for number, encoded in enumerate(of_paths(cfg.paths).read(rows)):
        with contextlib.suppress(Undecodable):  # damaged since its embedding was made
            images.append(decode(encoded))
            numbers.append(number)
    if not images:
        raise PipelineError(f"none of the first {rows.num_rows} images of {test} can be decoded any more")
    return preprocessing(images, torch.device("cpu")).numpy(), numbers


def _largest_distance(vectors: np.ndarray, others: np.ndarray) -> float:
    """The largest cosine distance between two vectors of an image, (N, D) each; NaN if there is one in them."""
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, (vectors, others)))
    return float(np.maximum(1 - np.sum(one * other, axis=1).min(), 0))


def outputs_of(folder: Path, inputs: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The published model's embeddings, (N, D), and vectors, (N, output_dim), float32, of float32 pixels
    (N, 3, H, W), or of a head alone of embeddings (N, D), computed in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "inputs.npy", inputs)
        # a module cache of its own: parallel jobs would overwrite each other's files in a shared one
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(place) / "modules")}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", _USE, str(folder), str(device)]
        result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if result.returncode:
            last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
            raise PipelineError(f"AutoModel cannot load the published model: {last[0]}")
        with np.load(Path(place) / "found.npz") as found:
            return found["embeddings"], found["vectors"]
