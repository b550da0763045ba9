"""Backbones that need no download: one that can tell facades apart, and tiny random ones of each family.

Writes   <out>/{config.json, model.safetensors, preprocessor_config.json}, as AutoModel and AutoImageProcessor load
Command  python tests/local_backbone.py --out data/local_backbone

The local backbone is not a trained network: it is a linear colour layout in DINOv2's format. Its patch is the
whole image of 56 px; the patch weights are the 8 x 8 lowest cosines of three opponent colours, 192 numbers; its
one block is the identity (LayerScale 0), and positions and biases are 0. Use pooling "mean", of the patch tokens:
there is one. The CLS token is the same for every image.

The LayerNorm at DINOv2's end has weight 1 and bias 0 here: the output is (c - mean(c)) / std(c) with c the 192
coefficients. So the cosine of two outputs is the correlation of their coefficients; a factor on all of c is lost.
"""

import argparse
import json
import sys
from pathlib import Path

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LOCAL_PX = 56
FREQUENCIES = 8  # per axis
CHROMA_GAIN = 2.5  # facades differ in colour more than in brightness, which the light changes
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))  # brightness, red-green, yellow-blue
FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


def write_preprocessor(out: Path, family: str, px: int) -> None:
    """preprocessor_config.json as Hugging Face publishes it for the family, for images of `px`."""
    settings = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    settings |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    if family.startswith("dinov3"):
        settings |= {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": None}
        settings |= {"crop_size": None, "resample": 2, "size": {"height": px, "width": px}}  # 2 = bilinear
        settings |= {"default_to_square": True, "data_format": "channels_first"}
    else:
        settings |= {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_convert_rgb": True}
        settings |= {"crop_size": {"height": px, "width": px}, "resample": 3}  # 3 = bicubic
        settings |= {"size": {"shortest_edge": px}}
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def colour_layout_weights():
    """(192, 3, 56, 56) float32 patch weights, row = (colour, vertical, horizontal frequency).

    Each has unit norm over the pixels of one colour, times 1 + |f|: facades have less energy in high frequencies.
    """
    import numpy as np

    positions, frequencies = np.arange(LOCAL_PX) + 0.5, np.arange(FREQUENCIES)
    cosines = np.cos(np.pi * frequencies[:, None] * positions / LOCAL_PX)  # (8, 56)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    scale = 1 + np.hypot(frequencies[:, None], frequencies)  # (8, 8)
    colours = np.array(OPPONENT) * np.array([1, CHROMA_GAIN, CHROMA_GAIN])[:, None]
    weights = np.einsum("kc,vy,hx,vh->kvhcyx", colours, cosines, cosines, scale)
    return weights.reshape(3 * FREQUENCIES**2, 3, LOCAL_PX, LOCAL_PX).astype(np.float32)


def write_local_backbone(out: Path) -> Path:
    """Writes the local backbone into the folder `out` and returns it."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=3 * FREQUENCIES**2,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=LOCAL_PX,
        patch_size=LOCAL_PX,
        layerscale_value=0.0,
    )
    torch.manual_seed(0)  # the block's own weights do not matter, but the file should be the same each time
    model = Dinov2Model(config)
    with torch.no_grad():
        embeddings = model.embeddings
        projection = embeddings.patch_embeddings.projection
        projection.weight.copy_(torch.from_numpy(colour_layout_weights()))
        for zero in (projection.bias, embeddings.position_embeddings):
            zero.zero_()
    model.save_pretrained(out)
    write_preprocessor(out, "dinov2", LOCAL_PX)
    return out


def write_tiny_backbone(out: Path, family: str) -> Path:
    """Writes a seeded random model of a family (hidden size 32, 2 layers) into `out` and returns it."""
    import torch
    import transformers

    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "dinov2":
        px, config = 56, transformers.Dinov2Config(**vit, image_size=56, patch_size=14)
    elif family == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**vit, image_size=56, patch_size=14, num_register_tokens=4)
        px = 56
    elif family == "dinov3_vit":
        sizes = {"intermediate_size": 64, "image_size": 64, "patch_size": 16, "num_register_tokens": 4}
        px, config = 64, transformers.DINOv3ViTConfig(**vit, **sizes)
    elif family == "dinov3_convnext":
        px, config = 64, transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    else:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(out)
    write_preprocessor(out, family, px)
    return out


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    args = parser.parse_args(argv)
    print(f"wrote {write_local_backbone(args.out)}; use it with pooling = mean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
