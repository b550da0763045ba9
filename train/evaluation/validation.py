"""Retrieval on the validation split: what training, tuning and the choice of the whitening are steered by."""

from dataclasses import dataclass

import numpy as np
import torch

from common.errors import PipelineError
from common.places.zones import Csr
from publish.model.projection_head import ProjectionHead
from train.evaluation import heads, metrics


@dataclass(frozen=True)
class Validation:
    """V rows, which are the gallery, and a seeded sample of them as queries."""

    embeddings: torch.Tensor  # (V, D) float16, raw
    building_of_row: np.ndarray  # (V,)
    query_rows: np.ndarray  # (Q,)
    junk: Csr  # rows in the ignore zone of each query
    memory_mb: int
    device: torch.device

    def of_head(self, head: ProjectionHead) -> dict[str, float]:
        """METRICS of a head. Raises PipelineError if it yields NaN."""
        vectors = heads.embed(head, self.embeddings, self.device)
        if not torch.isfinite(vectors.sum()):  # possible even if the last step's loss was finite
            raise PipelineError("the head yields vectors that are not finite\nlower training.learning_rate")
        return self.of_vectors(vectors)

    def of_vectors(self, vectors: torch.Tensor) -> dict[str, float]:
        """METRICS of (V, d) unit vectors."""
        return metrics.summarize(self.per_query(vectors))

    def per_query(self, vectors: torch.Tensor) -> metrics.PerQuery:
        """The figures of each query for (V, d) unit vectors."""
        return metrics.retrieval(
            vectors[torch.from_numpy(self.query_rows).to(vectors.device)],
            vectors,
            query_building=self.building_of_row[self.query_rows],
            gallery_building=self.building_of_row,
            self_rows=self.query_rows,
            junk=self.junk,
            memory_mb=self.memory_mb,
            device=self.device,
        )


def standard_error(values: np.ndarray, building_of_query: np.ndarray) -> float:
    """Of the mean of `values` (Q,) over queries, whose buildings are a random sample; infinite for one building.

    Images of a building resemble one another, so buildings are what varies: the mean is a ratio of two sums over
    them, linearised (Cochran 1977, chapter 6).
    """
    _, number, sizes = np.unique(building_of_query, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return float("inf")
    deviations = np.bincount(number, values - values.mean())
    return float(np.sqrt(len(sizes) / (len(sizes) - 1) * np.sum(deviations**2)) / len(values))
