"""The projection head of a checkpoint, and embeddings through a head or a linear baseline."""

import pickle
import zipfile
from collections.abc import Callable
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
    if not zipfile.is_zipfile(path):  # truncated, or never a checkpoint
        raise PipelineError(f"{path} is damaged: delete it and retrain")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise PipelineError(f"{path} is damaged ({first_line(error)}): delete it and retrain") from None
    except pickle.UnpicklingError:  # it holds more than tensors and plain values
        content = None
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise PipelineError(f"{path} is not a checkpoint of this version of train/train.py")
    return content


def head_of(checkpoint: dict) -> ProjectionHead:
    """The head of a checkpoint, in evaluation mode, float32, on the CPU."""
    head = ProjectionHead(**{key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")})
    head.load_state_dict(checkpoint["head"])
    return head.eval()


def embed(head: ProjectionHead, embeddings: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(N, output_dim) float32 unit vectors, on the device, of raw (N, D) embeddings; float32 throughout."""
    training = head.training
    head.to(device).eval()
    with torch.no_grad():
        vectors = _by_blocks(head, embeddings, device)
    head.train(training)
    return vectors


def project(
    embeddings: np.ndarray | torch.Tensor, mean: np.ndarray, projection: np.ndarray, device: torch.device
) -> torch.Tensor:
    """(N, d) float32 unit vectors, on the device: normalize(projection (normalize(x) - mean)) of raw (N, D) x."""
    centre, matrix = (torch.as_tensor(m, dtype=torch.float32, device=device) for m in (mean, projection))
    return _by_blocks(
        lambda x: F.normalize((F.normalize(x, dim=1) - centre) @ matrix.T, dim=1), embeddings, device
    )


def _by_blocks(function: Callable, embeddings: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    blocks = torch.as_tensor(embeddings).split(EMBED_ROWS)
    return torch.cat([function(block.to(device).float()) for block in blocks])
