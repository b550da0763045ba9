"""The frozen vision backbone: checked, loaded, and the pooled output of an image's views averaged.

Families: DINOv2 with and without registers, DINOv3 ViT and ConvNeXt, from the hub or from a folder.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from common import config
from common.config import is_folder
from common.errors import PipelineError, first_line
from common.sections import EmbeddingModel
from generate import model_files
from generate.pixels import Preprocessing, read_preprocessing
from publish.model.modeling_spatial_embeddings import (
    FAMILIES,
    POOLINGS,
    embedding_dim,
    make_views,
    mean_of_views,
    pool,
)

disable_progress_bar()  # one per file of weights: noise in the logs of a cluster


@dataclass(frozen=True)
class Backbone:
    """A loaded model in inference mode, with its preprocessing; its settings have its views and pooling."""

    model: PreTrainedModel
    preprocessing: Preprocessing  # gives the picture that all views are made from
    folder: Path  # of its files
    facts: dict  # what the embeddings' provenance records besides the settings
    settings: EmbeddingModel
    view_size: list[int]  # height, width
    dim: int  # of an embedding

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> (N, dim) float32: the mean over views of the unit vectors, or the pooled output
        of a single view as it is.
        """
        views = make_views(pixel_values, self.settings.views, self.view_size).to(self.model.dtype)
        hidden = self.model(views).last_hidden_state  # (N x views, tokens, width)
        return mean_of_views(pool(hidden, self.model.config, self.settings.pooling), len(self.settings.views))


def load(settings: EmbeddingModel, dtype: str, device: torch.device) -> Backbone:
    """The backbone of the settings, in the `dtype` of that name in torch. Raises PipelineError, with advice."""
    folder = model_files.locate(settings.name, settings.revision)
    check(settings, model_files.read_json(folder / "config.json").get("model_type"))
    preprocessing = read_preprocessing(folder, min(settings.views))
    view_size = read_preprocessing(folder).image_size
    model = load_weights(AutoModel, folder, dtype)
    is_local = is_folder(settings.name)
    facts = {
        "model": folder.name if is_local else settings.name,
        "revision": None if is_local else folder.name,  # the cache names a snapshot's folder by its commit
        "pooling": settings.pooling,
        "dtype": dtype,
        "image_size": view_size,
        "dim": (dim := embedding_dim(model.config, settings.pooling)),
    }
    return Backbone(model.eval().to(device), preprocessing, folder, facts, settings, view_size, dim)


def check(settings: EmbeddingModel, model_type: str | None) -> None:
    """Raise PipelineError unless models of this type, and the settings' pooling, are supported."""
    if model_type not in FAMILIES:
        raise PipelineError(
            f"{settings.name} is a model of type {model_type}, which is not supported\n"
            f"set embedding_model.name to a model of one of these types: {', '.join(FAMILIES)}"
        )
    config.entry(
        POOLINGS, "embedding_model.pooling", settings.pooling, "publish/model/modeling_spatial_embeddings.py"
    )


def load_weights(model_class, folder: Path, dtype: str) -> PreTrainedModel:
    """`model_class.from_pretrained`, but missing, damaged or another model's weights raise PipelineError.

    Transformers itself initialises missing tensors at random, with no more than a warning.
    """
    if not any(path for pattern in model_files.WEIGHTS for path in folder.glob(pattern)):
        advice = "download the complete model, or save it with save_pretrained"
        raise PipelineError(f"{folder} has no weights (model.safetensors)\n{advice}")
    try:
        options = {"dtype": getattr(torch, dtype), "local_files_only": True, "output_loading_info": True}
        model, report = model_class.from_pretrained(folder, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise PipelineError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from None
    if report["missing_keys"]:
        missing = f"{len(report['missing_keys'])} tensors are missing, such as {min(report['missing_keys'])}"
        raise PipelineError(f"the weights in {folder} do not match its config.json: {missing}")
    return model
