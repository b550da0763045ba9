"""The published model: a frozen vision backbone, pooling, and the projection head.

Hugging Face copies this file beside the weights with the two that it imports, and nothing else of this repository.
The pooling has its one definition here, which generation imports; the head is in projection_head.py.
"""

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_spatial_embeddings import SpatialEmbeddingsConfig
from .projection_head import ProjectionHead


def n_prefix_tokens(backbone_config: PretrainedConfig) -> int:
    """Tokens before the patch tokens: CLS (DINOv3 ConvNeXt puts its pooled map there) and any registers."""
    return 1 + getattr(backbone_config, "num_register_tokens", 0)


def width(backbone_config: PretrainedConfig) -> int:
    """Numbers in one token of a backbone's output."""
    sizes = getattr(backbone_config, "hidden_sizes", None)  # ConvNeXt: one per stage
    return sizes[-1] if sizes else backbone_config.hidden_size


def pool(last_hidden_state: torch.Tensor, n_prefix_tokens: int, pooling: str) -> torch.Tensor:
    """One vector per image from its tokens: (N, tokens, width) -> (N, width, or twice that) float32.

    "cls": the first token, which DINOv2 and DINOv3 train to stand for the image. "mean": of the patch tokens,
    without CLS and registers; closer to the local layout. "cls_mean": both, concatenated, as DINOv2's linear
    probes have it (Oquab et al. 2024, appendix B.3).
    """
    cls = last_hidden_state[:, 0].float()
    if pooling == "cls":
        return cls
    mean = last_hidden_state[:, n_prefix_tokens:].float().mean(dim=1)
    return mean if pooling == "mean" else torch.cat([cls, mean], dim=-1)


class SpatialEmbeddingsModel(PreTrainedModel):
    """Images -> unit vectors that are close for images of the same building.

    `forward(pixel_values).pooler_output`: (N, output_dim) float32 of length 1, whose dot product is the
    similarity. `project(embeddings)`: the same from the backbone's pooled output, made earlier.
    """

    config_class = SpatialEmbeddingsConfig
    base_model_prefix = "spatial_embeddings"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True  # where the backbone does
    # a thousandth of the weights, and whitening amplifies rounding
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 - transformers has it so

    def __init__(self, config: SpatialEmbeddingsConfig):
        super().__init__(config)
        # the dtype that is being loaded, not the one that the backbone's configuration was saved with
        self.backbone = AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        self.head = ProjectionHead(config.input_dim, config.hidden_dim, config.output_dim, config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        output = self.backbone(pixel_values.to(self.backbone.dtype), **kwargs)
        hidden = output.last_hidden_state  # (N, tokens, width)
        pooled = pool(hidden, n_prefix_tokens(self.config.backbone_config), self.config.pooling)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=self.head(pooled),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Pooled output of the backbone, (N, input_dim) -> unit vectors, (N, output_dim) float32."""
        return self.head(embeddings)


SpatialEmbeddingsConfig.register_for_auto_class()
SpatialEmbeddingsModel.register_for_auto_class("AutoModel")
