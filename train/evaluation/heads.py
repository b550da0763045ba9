"""The projection head out of a checkpoint, and whole sets of embeddings through a head or a linear baseline."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common.errors import PipelineError
from common.parquet import first_line
from publish.projection_head import ProjectionHead

_KEYS = {"head", "epoch", "metrics", "config", "embedding_model", "baselines", "provenance"}
EMBED_ROWS = 8_192  # rows at a time: 25 MB of float32 at 768 dimensions


def load_checkpoint(path: Path) -> dict:
    """The dict that train.py saved (see `checkpoints.RunFolder`), on the CPU. Raises PipelineError."""
    if not path.exists():
        raise PipelineError(f"{path} does not exist: run train/train.py first")
    if not zipfile.is_zipfile(path):  # the end is missing, or it never was a checkpoint
        raise PipelineError(f"{path} is damaged: delete it and train again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise PipelineError(f"{path} is damaged ({first_line(error)}): delete it and train again") from None
    except pickle.UnpicklingError:  # it holds more than tensors and plain values
        content = None
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise PipelineError(f"{path} is no checkpoint of train/train.py, or one of another version")
    return content


def head_of(checkpoint: dict) -> ProjectionHead:
    """The head that a checkpoint holds, in evaluation mode, float32, on the CPU."""
    sizes = {key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    head = ProjectionHead(**sizes)
    head.load_state_dict(checkpoint["head"])
    return head.eval()


def embed(head: ProjectionHead, embeddings: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(N, output_dim) float32 unit vectors, on the device, of raw (N, D) embeddings; float32 throughout."""
    training = head.training
    head.to(device).eval()
    with torch.no_grad():
        parts = [head(block) for block in _blocks(embeddings, device)]
    head.train(training)
    return torch.cat(parts)


def project(
    embeddings: np.ndarray | torch.Tensor, mean: np.ndarray, projection: np.ndarray, device: torch.device
) -> torch.Tensor:
    """(N, d) float32 unit vectors, on the device: normalize(projection (normalize(x) - mean)) of raw (N, D) x."""
    centre, matrix = (torch.as_tensor(m, dtype=torch.float32, device=device) for m in (mean, projection))
    parts = []
    for block in _blocks(embeddings, device):
        parts.append(F.normalize((F.normalize(block, dim=1) - centre) @ matrix.T, dim=1))
    return torch.cat(parts)


def _blocks(embeddings: np.ndarray | torch.Tensor, device: torch.device):
    for start in range(0, len(embeddings), EMBED_ROWS):
        yield torch.as_tensor(embeddings[start : start + EMBED_ROWS]).to(device).float()
