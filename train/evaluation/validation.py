"""The one value that training, tuning and the choice of the whitening go by: retrieval on the validation split."""

from dataclasses import dataclass

import numpy as np
import torch

from common.errors import PipelineError
from common.places.zones import Csr
from publish.projection_head import ProjectionHead
from train.evaluation import heads, metrics
from train.fitting import whitening


@dataclass(frozen=True)
class Validation:
    """V rows, all of them the gallery, and the seeded sample of them that are queries."""

    embeddings: torch.Tensor  # (V, D) float16, raw
    building_of_row: np.ndarray  # (V,)
    query_rows: np.ndarray  # (Q,)
    junk: Csr  # rows in the ignore zone of each query
    memory_mb: int
    device: torch.device

    def of_head(self, head: ProjectionHead) -> dict[str, float]:
        """ "recall@1", ..., "map@r" and "median_rank" of a head. Raises PipelineError if it gives NaN."""
        vectors = heads.embed(head, self.embeddings, self.device)
        if not torch.isfinite(vectors.sum()):  # the last step's loss may have been finite all the same
            raise PipelineError("the head gives vectors that are not finite\nlower training.learning_rate")
        return self._of_vectors(vectors)

    def of_linear(self, mean: np.ndarray, projection: np.ndarray) -> dict[str, float]:
        """The same of a linear baseline."""
        return self._of_vectors(heads.project(self.embeddings, mean, projection, self.device))

    def _of_vectors(self, vectors: torch.Tensor) -> dict[str, float]:
        queries = torch.from_numpy(self.query_rows).to(vectors.device)
        per_query = metrics.retrieval(
            vectors[queries],
            vectors,
            query_building=self.building_of_row[self.query_rows],
            gallery_building=self.building_of_row,
            self_rows=self.query_rows,
            junk=self.junk,
            memory_mb=self.memory_mb,
            device=self.device,
        )
        return metrics.summarize(per_query)


def baselines(
    embeddings: np.ndarray,
    building_of_row: np.ndarray,
    output_dim: int,
    shrinkages: list[float],
    validation: Validation,
) -> dict[str, dict]:
    """PCA and learned whitening of the training rows as a checkpoint holds them: "mean" (D,) and "projection"
    (output_dim, D), float64; for whitening also the "shrinkage" of highest validation mAP@R (the first of equals),
    its "validation" metrics, the mAP@R of each shrinkage tried, and the "spread" of its outputs on training rows
    (root mean square of a component)."""
    known = whitening.moments(embeddings, building_of_row)
    tried = {}
    for shrinkage in shrinkages:
        mean, projection = whitening.whiten(known, output_dim, shrinkage)
        tried[shrinkage] = validation.of_linear(mean, projection)
    best = max(tried, key=lambda shrinkage: tried[shrinkage]["map@r"])
    mean, projection = whitening.whiten(known, output_dim, best)
    pca_mean, pca_projection = whitening.pca(embeddings, output_dim)
    return {
        "pca": {"mean": torch.from_numpy(pca_mean), "projection": torch.from_numpy(pca_projection)},
        "whitening": {
            "mean": torch.from_numpy(mean),
            "projection": torch.from_numpy(projection),
            "shrinkage": best,
            "validation": tried[best],
            "map@r_by_shrinkage": {shrinkage: found["map@r"] for shrinkage, found in tried.items()},
            "spread": float(np.sqrt(np.trace(projection @ known.total @ projection.T) / output_dim)),
        },
    }
