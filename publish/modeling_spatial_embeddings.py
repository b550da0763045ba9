"""The published model: a frozen vision backbone, pooling, and the projection head.

Hugging Face copies this file beside the weights, so it imports nothing of this repository but the configuration.
The pooling and the head have their one definition here; generation and training import them from here.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_spatial_embeddings import SpatialEmbeddingsConfig


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


class ProjectionHead(nn.Module):
    """y = normalize(W0 (x - mu) + g * MLP(x)) with x normalised first: (N, input_dim) -> (N, output_dim) float32.

    `linear.weight` (W0) and `mean` (mu) start as a learned whitening and the gain g at 0, so that training starts
    from the best linear baseline (`whitenlearn` of cnnimageretrieval-pytorch; Radenovic et al.
    2018, section 3.3). Both normalisations run in float32, also under autocast and with half-precision weights.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, dropout: float = 0.0):
        super().__init__()
        if output_dim > input_dim:
            raise ValueError(f"output_dim = {output_dim} exceeds the backbone's dimension {input_dim}")
        self.linear = nn.Linear(input_dim, output_dim, bias=False)
        self.mean = nn.Parameter(torch.zeros(input_dim), requires_grad=False)
        self.gain = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(
            # the next layer can learn a scale and a shift; without them no gradient goes back to the input, which
            # saves a fifth of a training step's products
            nn.LayerNorm(input_dim, elementwise_affine=False),
            nn.Linear(input_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, output_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x.float(), dim=-1)
        dtype = self.linear.weight.dtype
        y = self.linear((x - self.mean.float()).to(dtype)) + self.gain * self.mlp(x.to(dtype))
        return F.normalize(y.float(), dim=-1)


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
