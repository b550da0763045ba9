"""The projection head of a checkpoint, and embeddings through a head or a linear baseline."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import devices
from common.errors import PipelineError, first_line
from common.provenance import Provenance
from publish.model.projection_head import ProjectionHead

_SIZES = ("input_dim", "hidden_dim", "output_dim", "dropout")
_KEYS = {"head", *_SIZES, "epoch", "metrics", "config", "embedding_model", "baselines", "provenance"}
_BASELINES = {"pca", "whitening"}
_RERUN = "rerun train/train.py: it restores checkpoint_best.pt, or says how to train again"
EMBED_ROWS = 8_192  # rows at a time: 25 MB of float32 at 768 dimensions


def load_checkpoint(path: Path) -> dict:
    """The dict that train.py saved (see `checkpoints.RunFolder`), on the CPU. Raises PipelineError."""
    if not path.exists():
        raise PipelineError(f"{path} does not exist: run train/train.py first")
    if not zipfile.is_zipfile(path):  # truncated, or never a checkpoint
        raise PipelineError(f"{path} is damaged\n{_RERUN}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise PipelineError(f"{path} is damaged ({first_line(error)})\n{_RERUN}") from None
    except pickle.UnpicklingError:  # it holds more than tensors and plain values
        content = None
    try:
        if not content.keys() >= _KEYS or not content["baselines"].keys() >= _BASELINES:
            raise ValueError
        head_of(content)
        Provenance.from_dict(content["provenance"])
    except (ValueError, TypeError, AttributeError, RuntimeError):  # the last: of load_state_dict
        raise PipelineError(f"{path} is not a checkpoint of this version of train/train.py\n{_RERUN}") from None
    return content


def head_of(checkpoint: dict) -> ProjectionHead:
    """The head of a checkpoint, in evaluation mode, float32, on the CPU."""
    head = ProjectionHead(**{key: checkpoint[key] for key in _SIZES})
    head.load_state_dict(checkpoint["head"])
    return head.eval()


def embed(
    head: ProjectionHead,
    embeddings: np.ndarray | torch.Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(N, output_dim) unit vectors of raw (N, D) embeddings, computed in float32. Where they are: see
    `by_blocks`."""
    training = head.training
    head.to(device).eval()
    with torch.no_grad():
        vectors = by_blocks(head, embeddings, head.linear.out_features, device, dtype)
    head.train(training)
    return vectors


def project(
    embeddings: np.ndarray | torch.Tensor, mean: np.ndarray, projection: np.ndarray, device: torch.device
) -> torch.Tensor:
    """(N, d) float32 unit vectors: normalize(projection (normalize(x) - mean)) of raw (N, D) x. Where they
    are: see `by_blocks`."""
    centre, matrix = (torch.as_tensor(m, dtype=torch.float32, device=device) for m in (mean, projection))
    return by_blocks(
        lambda x: F.normalize((F.normalize(x, dim=1) - centre) @ matrix.T, dim=1), embeddings, len(matrix), device
    )


def normalized(embeddings: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(N, D) float32 unit vectors, never in the embeddings' own memory. Where they are: see `by_blocks`."""
    return by_blocks(lambda x: F.normalize(x, dim=1), embeddings, embeddings.shape[1], device)


def by_blocks(
    function: Callable[[torch.Tensor], torch.Tensor],
    embeddings: np.ndarray | torch.Tensor,
    dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(N, dim): what `function` makes of (n, D) float32 rows, EMBED_ROWS at a time, on the device.

    The result is on the device if it `fits` there, else on the host. Memory: its N x dim x (4 or 2) bytes, and a
    block's (EMBED_ROWS x D x 4, and what `function` takes).
    """
    rows = torch.as_tensor(embeddings)
    has_room = devices.fits(len(rows) * dim * dtype.itemsize, device)
    vectors = torch.empty((len(rows), dim), dtype=dtype, device=device if has_room else "cpu")
    for block, out in zip(rows.split(EMBED_ROWS), vectors.split(EMBED_ROWS), strict=True):
        out.copy_(function(block.to(device).float()))
    return vectors
