"""Whether AutoModel, offline and without this repository, gives the pipeline's vectors from a published folder."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
MAX_COSINE_DISTANCE = 1e-3
_USE = """
import sys, numpy, torch
from transformers import AutoModel
folder, device = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device)
pixels = torch.from_numpy(numpy.load("pixels.npy"))
with torch.inference_mode():
    vectors = [model(batch.to(device)).pooler_output.float().cpu() for batch in pixels.split(8)]
numpy.save("vectors.npy", torch.cat(vectors).numpy())
"""


def check(
    folder: Path, cfg: Config, checkpoint: dict, preprocessing: Preprocessing, device: torch.device
) -> tuple[float, int]:
    """(largest cosine distance, number of images) for the first of the test split. Raises PipelineError above
    MAX_COSINE_DISTANCE.
    """
    test = cfg.paths.merged_dir / "test.parquet"
    rows = next(parquet.batches(test, ["tar_file", "image_offset", "image_size", "embedding"], MAX_IMAGES), None)
    if rows is None:
        raise PipelineError(f"{test} has no rows to check the published model with")
    images, numbers = [], []
    for number, encoded in enumerate(of_paths(cfg.paths).read(rows)):
        with contextlib.suppress(Undecodable):  # damaged since its embedding was made
            images.append(decode(encoded))
            numbers.append(number)
    if not images:
        raise PipelineError(f"none of the first {rows.num_rows} images of {test} can be decoded any more")
    embeddings = torch.from_numpy(parquet.to_matrix(rows["embedding"])[numbers].astype(np.float32))
    with torch.inference_mode():
        expected = head_of(checkpoint)(embeddings).numpy()
    vectors = vectors_of(folder, preprocessing(images, torch.device("cpu")).numpy(), device)
    worst = float(1 - (vectors * expected).sum(axis=1).min())
    if not worst <= MAX_COSINE_DISTANCE:  # or not a number
        raise PipelineError(
            f"the published model's vectors are up to {worst:.1e} in cosine distance from the pipeline's, over "
            f"{len(images)} images (at most {MAX_COSINE_DISTANCE}); nothing was published\n"
            "the embeddings were made with a different backbone or preprocessing: regenerate them"
        )
    return worst, len(images)


def vectors_of(folder: Path, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """The published model's vectors of (N, 3, H, W) float32 pixels, computed in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "pixels.npy", pixels)
        # a module cache of its own: parallel jobs would overwrite each other's files in a shared one
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(place) / "modules")}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", _USE, str(folder), str(device)]
        result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if result.returncode:
            last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
            raise PipelineError(f"AutoModel cannot load the published model: {last[0]}")
        return np.load(Path(place) / "vectors.npy")
