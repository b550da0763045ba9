"""Configuration of the published model. Hugging Face copies this file beside the weights."""

from collections.abc import Sequence
from typing import ClassVar

from transformers import AutoConfig, PretrainedConfig


class SpatialEmbeddingsConfig(PretrainedConfig):
    """A backbone's own configuration, its views of an image, the pooling, and the size of the projection head.
    Without a backbone, the head takes vectors that another network has made."""

    model_type = "spatial_embeddings"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}  # attn_implementation is passed on to it
    attribute_map: ClassVar = {"projection_dim": "output_dim"}  # where sentence-transformers looks for it

    def __init__(
        self,
        backbone_config: dict | PretrainedConfig | None = None,
        pooling: str = "cls",
        views: Sequence[float] = (1.0,),  # shares of the image's sides
        view_size: Sequence[int] | None = None,  # height and width of each view in pixels; None: the image's
        input_dim: int = 768,
        hidden_dim: int = 512,
        output_dim: int = 256,
        dropout: float = 0.0,
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            fields = dict(backbone_config)  # read from config.json
            backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.backbone_config = backbone_config
        self.pooling = pooling
        self.views = list(views)
        self.view_size = view_size
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.output_dim = output_dim
        self.dropout = dropout
        super().__init__(**kwargs)
