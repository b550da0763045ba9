"""The linear baselines of the training rows, as a checkpoint holds them."""

import logging

import numpy as np
import torch

from common.errors import PipelineError
from common.sections import TrainingModel
from train.evaluation import heads, metrics
from train.evaluation.validation import Validation, standard_error
from train.linear import whitening
from train.linear.whitening import Moments

FEW_BUILDINGS = 30  # mAP@R of a building varies by about 25 points, so its mean over 30 by 4.5: twice that, the
# half-width of a 95 % interval, is what whitening gains over raw embeddings (9 points on real photographs)
_SMALLEST_SPREAD = 1e-10  # variance of unit vectors, over all dimensions: below, it is rounding

log = logging.getLogger("pipeline")


def fit(moments: Moments, settings: TrainingModel, validation: Validation) -> dict[str, dict]:
    """PCA and learned whitening of rows with these moments: "mean" (D,) and "projection" (output_dim, D), float64.

    Whitening uses the "shrinkage" that `most_shrinkage` chooses. It also has its "validation" metrics, the mAP@R
    of each shrinkage tried, and the "spread" of its outputs on the training rows (root mean square of a
    component). Raises PipelineError if the rows do not differ.
    """
    if np.trace(moments.total) < _SMALLEST_SPREAD:
        raise PipelineError("all training embeddings point in one direction: there is nothing to learn from them")
    output_dim, tried, precisions = settings.output_dim, [], []
    for shrinkage in sorted(settings.whitening_shrinkage):
        mean, projection = whitening.whiten(moments, output_dim, shrinkage)
        per_query = validation.per_query(heads.project(validation.embeddings, mean, projection, validation.device))
        precisions.append(per_query.average_precision_at_r)
        validated = metrics.summarize(per_query)
        tried.append({**_tensors(mean, projection), "shrinkage": shrinkage, "validation": validated})
    buildings = validation.building_of_row[validation.query_rows]
    choice = most_shrinkage(np.stack(precisions), buildings)
    _warn_of_chance(settings, choice, len(np.unique(buildings)))
    best = tried[choice]
    projection = best["projection"].numpy()
    best["spread"] = float(np.sqrt(np.trace(projection @ moments.total @ projection.T) / output_dim))
    best["map@r_by_shrinkage"] = {one["shrinkage"]: one["validation"]["map@r"] for one in tried}
    return {"pca": _tensors(*whitening.pca(moments, output_dim)), "whitening": best}


def most_shrinkage(precisions: np.ndarray, building_of_query: np.ndarray) -> int:
    """Which of S candidates, by increasing shrinkage, to take, given their average precisions (S, Q): the last
    whose mean is within one standard error of the highest.

    The one-standard-error rule (Breiman et al. 1984; Hastie et al. 2009, section 7.10: the simplest model that is
    as good), with the error of the difference from the best instead of that of the best's own mean: all candidates
    are judged on the same buildings, and most of the error of a mean is how hard these happen to be.
    """
    losses = precisions[precisions.mean(axis=1).argmax()] - precisions
    return max(i for i, loss in enumerate(losses) if loss.mean() <= standard_error(loss, building_of_query))


def _warn_of_chance(settings: TrainingModel, choice: int, num_buildings: int) -> None:
    tried = sorted(settings.whitening_shrinkage)
    if len(tried) > 1 and choice in (0, len(tried) - 1):
        end, more = ("largest", "larger") if choice else ("smallest", "smaller")
        log.warning(
            "whitening: the chosen shrinkage, %g, is the %s of training_model.whitening_shrinkage: add %s ones",
            *(tried[choice], end, more),
        )
    if num_buildings < FEW_BUILDINGS:
        log.warning(
            "validation has only %d buildings: with fewer than %d, chance decides which shrinkage and which epoch "
            "are best; raise data.val_ratio, or add data",
            *(num_buildings, FEW_BUILDINGS),
        )


def _tensors(mean: np.ndarray, projection: np.ndarray) -> dict:
    return {"mean": torch.from_numpy(mean), "projection": torch.from_numpy(projection)}
