"""The published model: a vision backbone, pooling, and the projection head that was trained on top of it.

Hugging Face copies this file and the two that it imports beside the weights; they import nothing else from here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_spatial_embeddings import SpatialEmbeddingsConfig
from .projection_head import ProjectionHead


class Family(NamedTuple):
    """How to read the output of a type of backbone, given its configuration."""

    num_prefix_tokens: Callable[[PretrainedConfig], int]  # before the patch tokens; the first of them is CLS
    hidden_size: Callable[[PretrainedConfig], int]  # of a token


# by model_type; DINOv3 ConvNeXt has its pooled map where a ViT has CLS, and a size per stage
FAMILIES = {
    "dinov2": Family(lambda config: 1, lambda config: config.hidden_size),
    "dinov2_with_registers": Family(lambda c: 1 + c.num_register_tokens, lambda config: config.hidden_size),
    "dinov3_vit": Family(lambda config: 1 + config.num_register_tokens, lambda config: config.hidden_size),
    "dinov3_convnext": Family(lambda config: 1, lambda config: config.hidden_sizes[-1]),
}


class Pooling(NamedTuple):
    """How tokens become one vector."""

    pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # CLS (N, width), patches (N, P, width) -> (N, dim)
    num_tokens: int  # dim / width


# "cls": the token that DINOv2 and DINOv3 train to represent the image. "mean": of the patch tokens, closer to the
# local layout. "cls_mean": both, as in DINOv2's linear probes (Oquab et al. 2024, appendix B.3)
POOLINGS = {
    "cls": Pooling(lambda cls, patches: cls, 1),
    "mean": Pooling(lambda cls, patches: patches.mean(dim=1), 1),
    "cls_mean": Pooling(lambda cls, patches: torch.cat([cls, patches.mean(dim=1)], dim=-1), 2),
}


def embedding_dim(backbone_config: PretrainedConfig, pooling: str) -> int:
    """Dimensions of a pooled embedding."""
    return POOLINGS[pooling].num_tokens * FAMILIES[backbone_config.model_type].hidden_size(backbone_config)


def pool(last_hidden_state: torch.Tensor, backbone_config: PretrainedConfig, pooling: str) -> torch.Tensor:
    """Vectors (N, dim) float32 from tokens (N, tokens, width)."""
    num_prefix_tokens = FAMILIES[backbone_config.model_type].num_prefix_tokens(backbone_config)
    patches = last_hidden_state[:, num_prefix_tokens:].float()
    return POOLINGS[pooling].pool(last_hidden_state[:, 0].float(), patches)


def make_views(pixel_values: torch.Tensor, views: Sequence[float], size: Sequence[int] | None) -> torch.Tensor:
    """Views about the centre of images (N, 3, H, W): (N x views, 3, *size) float32, an image's views in a row.

    A view is a share of the image's sides, resized to `size` (bicubic, antialiased) unless it has that already: of
    images of 448 pixels and a size of 224, the central half is cut out as it is. None: the whole image as it is.
    """
    images = pixel_values.float()
    if size is None:
        return images
    height, width = images.shape[-2:]
    made = []
    for share in views:
        y, x = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
        view = images[:, :, y : height - y, x : width - x]
        if view.shape[-2:] != tuple(size):
            view = F.interpolate(view, tuple(size), mode="bicubic", antialias=True)
        made.append(view)
    return torch.stack(made, dim=1).flatten(0, 1)


def mean_of_views(vectors: torch.Tensor, num_views: int) -> torch.Tensor:
    """(N x views, dim) -> (N, dim): the mean of an image's unit vectors; vectors of a single view as they are."""
    if num_views == 1:
        return vectors
    return F.normalize(vectors, dim=-1).unflatten(0, (-1, num_views)).mean(dim=1)


class SpatialEmbeddingsModel(PreTrainedModel):
    """Images -> unit vectors that are close for images of the same building.

    `forward(pixel_values).pooler_output`: (N, output_dim) float32 of length 1, whose dot product is the
    similarity. `project(embeddings)`: the same from stored embeddings, the pipeline's `mean_of_views`.
    The backbone was frozen in training; loaded, its parameters require gradients, as those of any model in
    transformers do. `model.backbone.requires_grad_(False)` freezes it again.
    """

    config_class = SpatialEmbeddingsConfig
    base_model_prefix = "spatial_embeddings"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True  # where the backbone does
    # a thousandth of the weights, and whitening amplifies rounding
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 - as in transformers

    def __init__(self, config: SpatialEmbeddingsConfig):
        super().__init__(config)
        if config.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {config.pooling}; choose one of {', '.join(POOLINGS)}")
        # the dtype that is being loaded, not the one that the backbone's configuration was saved with
        self.backbone = AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.head = ProjectionHead(config.input_dim, config.hidden_dim, config.output_dim, config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's patch embedding. Raises NotImplementedError for a ConvNeXt, as transformers does."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's patch embedding."""
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        views = make_views(pixel_values, self.config.views, self.config.view_size)
        output = self.backbone(views.to(self.backbone.dtype), **kwargs)
        hidden, num_views = output.last_hidden_state, len(self.config.views)  # (N x views, tokens, width)
        pooled = pool(hidden, self.config.backbone_config, self.config.pooling)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden.unflatten(0, (-1, num_views)).flatten(1, 2),  # (N, views x tokens, width)
            pooler_output=self.head(mean_of_views(pooled, num_views)),
            hidden_states=output.get("hidden_states"),  # a row for each view, as in attentions
            attentions=output.get("attentions"),
        )

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Stored embeddings, (N, input_dim) -> unit vectors, (N, output_dim) float32."""
        return self.head(embeddings)


class SpatialEmbeddingsHead(PreTrainedModel):
    """Vectors of another network -> unit vectors that are close for images of the same building: the head alone.

    `forward(embeddings).pooler_output`: (N, output_dim) float32 of length 1, from (N, input_dim).
    """

    config_class = SpatialEmbeddingsConfig
    base_model_prefix = "spatial_embeddings"
    main_input_name = "embeddings"
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 - as in transformers

    def __init__(self, config: SpatialEmbeddingsConfig):
        super().__init__(config)
        self.head = ProjectionHead(config.input_dim, config.hidden_dim, config.output_dim, config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(self, embeddings: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.project(embeddings))

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """As `SpatialEmbeddingsModel.project`."""
        if embeddings.shape[-1] != self.config.input_dim:
            raise ValueError(f"the head takes {self.config.input_dim} dimensions, not {embeddings.shape[-1]}")
        return self.head(embeddings)


SpatialEmbeddingsConfig.register_for_auto_class()
SpatialEmbeddingsHead.register_for_auto_class("AutoModel")
SpatialEmbeddingsModel.register_for_auto_class("AutoModel")
