"""The linear baselines of the training rows, as a checkpoint holds them."""

import numpy as np
import torch

from train.evaluation.validation import Validation
from train.fitting import whitening


def fit(
    embeddings: np.ndarray,
    building_of_row: np.ndarray,
    output_dim: int,
    shrinkages: list[float],
    validation: Validation,
) -> dict[str, dict]:
    """PCA and learned whitening of (N, D) embeddings: "mean" (D,) and "projection" (output_dim, D), float64.

    Whitening uses the shrinkage of highest validation mAP@R (the first of equals). It also has this "shrinkage",
    its "validation" metrics, the mAP@R of each shrinkage tried, and the "spread" of its outputs on the training rows
    (root mean square of a component).
    """
    moments = whitening.moments(embeddings, building_of_row)
    tried = {}
    for shrinkage in shrinkages:
        mean, projection = whitening.whiten(moments, output_dim, shrinkage)
        tried[shrinkage] = validation.of_linear(mean, projection)
    best = max(tried, key=lambda shrinkage: tried[shrinkage]["map@r"])
    mean, projection = whitening.whiten(moments, output_dim, best)
    pca_mean, pca_projection = whitening.pca(embeddings, output_dim)
    return {
        "pca": {"mean": torch.from_numpy(pca_mean), "projection": torch.from_numpy(pca_projection)},
        "whitening": {
            "mean": torch.from_numpy(mean),
            "projection": torch.from_numpy(projection),
            "shrinkage": best,
            "validation": tried[best],
            "map@r_by_shrinkage": {shrinkage: metrics["map@r"] for shrinkage, metrics in tried.items()},
            "spread": float(np.sqrt(np.trace(projection @ moments.total @ projection.T) / output_dim)),
        },
    }
