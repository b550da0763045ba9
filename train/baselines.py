"""The linear baselines of the training rows, as a checkpoint holds them."""

import numpy as np
import torch

from common.sections import TrainingModel
from train import whitening
from train.evaluation import heads
from train.evaluation.validation import Validation
from train.whitening import Moments


def fit(moments: Moments, settings: TrainingModel, validation: Validation) -> dict[str, dict]:
    """PCA and learned whitening of rows with these moments: "mean" (D,) and "projection" (output_dim, D), float64.

    Whitening uses the "shrinkage" of highest validation mAP@R (the first of equals). It also has its "validation"
    metrics, the mAP@R of each shrinkage tried, and the "spread" of its outputs on the training rows (root mean
    square of a component).
    """
    output_dim, tried = settings.output_dim, []
    for shrinkage in settings.whitening_shrinkage:
        mean, projection = whitening.whiten(moments, output_dim, shrinkage)
        vectors = heads.project(validation.embeddings, mean, projection, validation.device)
        validated = validation.of_vectors(vectors)
        tried.append({**_tensors(mean, projection), "shrinkage": shrinkage, "validation": validated})
    best = max(tried, key=lambda candidate: candidate["validation"]["map@r"])
    projection = best["projection"].numpy()
    best["spread"] = float(np.sqrt(np.trace(projection @ moments.total @ projection.T) / output_dim))
    best["map@r_by_shrinkage"] = {one["shrinkage"]: one["validation"]["map@r"] for one in tried}
    return {"pca": _tensors(*whitening.pca(moments, output_dim)), "whitening": best}


def _tensors(mean: np.ndarray, projection: np.ndarray) -> dict:
    return {"mean": torch.from_numpy(mean), "projection": torch.from_numpy(projection)}
