"""Linear baselines in closed form: PCA, and whitening learned from pairs of images of one building.

Both are applied as normalize(projection (normalize(x) - mean)), and need no more of the rows than their `Moments`.
Those are computed in float64, in one pass over the rows, once for each merge and sample of its buildings.

Reads    data/<backbone>/merged_moments/<sample>.safetensors, if it is of this merged/train.parquet and sample
Writes   that file otherwise. Processes that do so at the same time write the same, to rounding
Memory   eight D x D float64 matrices and BLOCK_ROWS x D x 24 bytes, whatever N (768-d: 38 and 151 MB); more
         only if a building has more rows
Time     2 (N + buildings) D^2 floating-point operations in float64: 3e13 at 20 M rows of 768-d in buildings of
         three. On CUDA, divided by the card's rate for float64
"""

import functools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.nn import functional as F

from common import config, files, provenance
from common.errors import PipelineError
from common.provenance import Provenance
from common.sections import Config

BLOCK_ROWS = 8_192
log = logging.getLogger("pipeline")


class Moments(NamedTuple):
    """What PCA needs of the normalised embeddings, every row weighing the same, and what whitening needs, every
    building weighing the same; all float64."""

    row_mean: np.ndarray  # (D,)
    row_covariance: np.ndarray  # (D, D)
    mean: np.ndarray  # (D,)
    total: np.ndarray  # (D, D): covariance
    within: np.ndarray  # (D, D): mean of (x_i - x_j)(x_i - x_j)^T over the pairs of a building


def stored_moments(
    cfg: Config, train_id: str, embeddings: torch.Tensor, building_of_row: np.ndarray, device: torch.device
) -> Moments:
    """The `moments` of the rows that training.sample_buildings leaves of the merged/train with this id. They are
    read from the file beside the merge, or else computed and stored there."""
    sample = cfg.training.sample_buildings
    settings = config.values(cfg, "training.sample_buildings", *["global.seed"][: sample != "all"])
    record = provenance.record("moments", settings, {"train.parquet": train_id})
    path = files.beside(cfg.paths.merged_dir, "moments") / f"{sample}.safetensors"
    found = _read(path, record)
    if found is None:
        found = moments(embeddings, building_of_row, device)
        made = record.finished(provenance.digest_of(*(part.tobytes() for part in found)), {"in": len(embeddings)})
        try:
            files.write_bytes(path, save(found._asdict(), {"provenance": made.to_json()}))
        except OSError as error:  # a merge that others own, or a full disk: only time is lost
            log.warning("%s cannot be written (%s): every run computes the moments again", path, error.strerror)
    return found


def _read(path: Path, record: Provenance) -> Moments | None:
    """The moments in a file with this record; None if there is none, or it is damaged."""
    try:
        with safe_open(path, framework="np") as tensors:
            existing = Provenance.from_json(tensors.metadata()["provenance"])
            if not provenance.differences(existing, record):
                return Moments(*map(tensors.get_tensor, Moments._fields))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        pass
    return None


def moments(embeddings: torch.Tensor | np.ndarray, building_of_row: np.ndarray, device: torch.device) -> Moments:
    """Of (N, D) embeddings, wherever they are, whose buildings are contiguous. Buildings of one row say nothing of
    pairs. Raises PipelineError if all are.

    Weights depend on the size of a building alone. So buildings of one size share two products, of their rows'
    deviations from the buildings' centres and of the centres; all sums are made of these.
    """
    rows, dim = torch.as_tensor(embeddings), embeddings.shape[1]
    starts = np.append(np.flatnonzero(np.diff(building_of_row, prepend=-1)), len(rows))
    sizes = np.diff(starts)
    num_pairs = np.sum(sizes > 1)  # buildings with pairs
    if not num_pairs:
        raise PipelineError("whitening needs buildings with two or more images, and there are none")
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
    row_mean, mean, row_second, second, within = (zeros(s) for s in (dim, dim, *[(dim, dim)] * 3))
    for size in np.unique(sizes).tolist():
        first = torch.from_numpy(starts[:-1][sizes == size])
        center_sum, around, between = zeros(dim), zeros((dim, dim)), zeros((dim, dim))
        for block in first.split(max(1, BLOCK_ROWS // size)):
            which = (block[:, None] + torch.arange(size)).flatten().to(rows.device)
            x = rows[which].to(device).double()
            x = F.normalize(x, dim=1, out=x).unflatten(0, (-1, size))
            centers = x.mean(dim=1)  # (buildings, D)
            deviations = x.sub_(centers[:, None]).flatten(0, 1)
            center_sum += centers.sum(dim=0)
            around.addmm_(deviations.T, deviations)
            between.addmm_(centers.T, centers)
        of_rows = between.mul_(size).add_(around)  # the sum of x x^T
        row_mean += center_sum * (size / len(rows))
        row_second += of_rows / len(rows)
        mean += center_sum / len(sizes)
        second += of_rows / (size * len(sizes))
        if size > 1:  # the mean over a building's pairs is twice its covariance with the divisor size - 1
            within += around * (2 / ((size - 1) * num_pairs))
    covariance, total = row_second - row_mean.outer(row_mean), second - mean.outer(mean)
    return Moments(*(part.cpu().numpy() for part in (row_mean, covariance, mean, total, within)))


def whiten(known: Moments, output_dim: int, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), projection (output_dim, D)) float64: within-building differences become white, then PCA.

    Learned whitening of Radenovic et al. 2018 (section 3.3; `whitenlearn` of cnnimageretrieval-pytorch), with
    `within + shrinkage * trace(within) / D * I` in place of the bare covariance, which may lack full rank.
    """
    dim = len(known.mean)
    scale = np.trace(known.within) / dim
    ridge = shrinkage * scale if scale > 0 else 1.0  # images of a building that are all equal: plain PCA
    inverse = np.linalg.inv(np.linalg.cholesky(known.within + ridge * np.eye(dim)))
    return known.mean, _principal(inverse @ known.total @ inverse.T, output_dim) @ inverse


def pca(known: Moments, output_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), projection (output_dim, D)) float64: the principal axes of the normalised rows."""
    return known.row_mean, _principal(known.row_covariance, output_dim)


def _principal(covariance: np.ndarray, output_dim: int) -> np.ndarray:
    """The `output_dim` eigenvectors of largest eigenvalue as rows, each with its largest component positive."""
    vectors = np.linalg.eigh((covariance + covariance.T) / 2)[1][:, ::-1][:, :output_dim].T
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return vectors * np.sign(largest)[:, None]
