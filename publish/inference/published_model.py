"""The published model, as the scripts of this repository load it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import PipelineError
from generate import backbone, model_files
from generate.pixels import Preprocessing, read_preprocessing
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsHead, SpatialEmbeddingsModel


@dataclass(frozen=True)
class Published:
    """A published model in inference mode."""

    model: SpatialEmbeddingsModel | SpatialEmbeddingsHead
    preparation: Preprocessing | None  # of a model that takes images
    device: torch.device

    @property
    def preprocessing(self) -> Preprocessing:
        """Raises PipelineError if the model is a head alone, which takes no images."""
        if self.preparation is None:
            raise PipelineError(
                f"{self.model.name_or_path} takes vectors that another network has made, not images\n"
                "make them with that network, then run publish/generate_embeddings_from_parquet.py"
            )
        return self.preparation

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
    if model_files.read_json(folder / "config.json").get("backbone_config") is None:
        head = backbone.load_weights(SpatialEmbeddingsHead, folder, dtype)
        return Published(head.eval().to(device), None, device)
    preprocessing = read_preprocessing(folder)
    model = backbone.load_weights(SpatialEmbeddingsModel, folder, dtype)
    if views:
        model.config.views, model.config.view_size = views, model.config.view_size or preprocessing.image_size
    return Published(model.eval().to(device), preprocessing, device)
