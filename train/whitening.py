"""Linear baselines in closed form: PCA, and whitening learned from pairs of images of one building.

Both are applied as normalize(projection (normalize(x) - mean)). Sums run in float64 over blocks of rows.

Memory: BLOCK_ROWS x D x 16 bytes, and four D x D float64 matrices (768-d: 200 MB and 19 MB), whatever N.
"""

from typing import NamedTuple

import numpy as np

from common.errors import PipelineError

BLOCK_ROWS = 16_384


class Moments(NamedTuple):
    """What whitening needs of the normalised embeddings, all float64; every building weighs the same."""

    mean: np.ndarray  # (D,)
    total: np.ndarray  # (D, D): covariance of the rows
    within: np.ndarray  # (D, D): mean of (x_i - x_j)(x_i - x_j)^T over the pairs of a building


def moments(embeddings: np.ndarray, building_of_row: np.ndarray) -> Moments:
    """Of (N, D) embeddings whose buildings are contiguous. Buildings of one row say nothing of pairs."""
    n, dim = embeddings.shape
    starts = np.append(np.flatnonzero(np.diff(building_of_row, prepend=-1)), n)
    sizes = np.diff(starts)
    if not (sizes > 1).any():
        raise PipelineError("whitening needs buildings with two or more images, and there are none")
    row_weight = np.repeat(1.0 / (sizes * len(sizes)), sizes)
    # the mean over a building's pairs is twice its covariance with the divisor size - 1
    pair_weight = np.repeat(2.0 / (np.maximum(sizes - 1, 1) * np.sum(sizes > 1)), sizes)
    mean, second, within = np.zeros(dim), np.zeros((dim, dim)), np.zeros((dim, dim))
    for first, last in _blocks_of_buildings(starts):
        rows = slice(starts[first], starts[last])
        x = _normalized(embeddings[rows])
        mean += row_weight[rows] @ x
        second += (x * row_weight[rows, None]).T @ x
        centers = np.add.reduceat(x, starts[first:last] - starts[first]) / sizes[first:last, None]
        deviations = x - np.repeat(centers, sizes[first:last], axis=0)
        within += (deviations * pair_weight[rows, None]).T @ deviations
    return Moments(mean, second - np.outer(mean, mean), within)


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


def pca(embeddings: np.ndarray, output_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), projection (output_dim, D)) float64: the principal axes of the normalised rows."""
    n, dim = embeddings.shape
    mean, second = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, n, BLOCK_ROWS):
        x = _normalized(embeddings[start : start + BLOCK_ROWS])
        mean += x.sum(axis=0) / n
        second += x.T @ x / n
    return mean, _principal(second - np.outer(mean, mean), output_dim)


def _principal(covariance: np.ndarray, output_dim: int) -> np.ndarray:
    """The `output_dim` eigenvectors of largest eigenvalue as rows, each with its largest component positive."""
    vectors = np.linalg.eigh((covariance + covariance.T) / 2)[1][:, ::-1][:, :output_dim].T
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return vectors * np.sign(largest)[:, None]


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    x = np.asarray(embeddings, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _blocks_of_buildings(starts: np.ndarray):
    """(first, last) numbers of buildings that make blocks of at most BLOCK_ROWS rows (or one larger building)."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + BLOCK_ROWS, side="right")) - 1)
        yield first, last
        first = last
