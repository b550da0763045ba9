"""The published model, as the scripts of this repository load it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from generate import backbone
from generate.pixels import Preprocessing, read_preprocessing
from publish.modeling_spatial_embeddings import SpatialEmbeddingsModel


@dataclass(frozen=True)
class Published:
    """A published model in inference mode."""

    model: SpatialEmbeddingsModel
    preprocessing: Preprocessing
    device: torch.device

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> unit vectors, (N, dim) float32."""
        return self.model(pixel_values).pooler_output

    @torch.inference_mode()
    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Stored embeddings, (N, input_dim) -> unit vectors, (N, dim) float32, on the CPU."""
        return self.model.project(embeddings.to(self.device)).cpu()


def load(folder: Path, dtype: str, device: torch.device, views: list[float] | None = None) -> Published:
    """The model in `folder`, with other `views` than its own if given.

    Raises PipelineError if files are missing or damaged.
    """
    preprocessing = read_preprocessing(folder)
    model = backbone.load_weights(SpatialEmbeddingsModel, folder, dtype)
    if views:
        model.config.views, model.config.view_size = views, model.config.view_size or preprocessing.image_size
    return Published(model.eval().to(device), preprocessing, device)
