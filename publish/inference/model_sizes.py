"""Estimates of a model's parameters, memory, arithmetic and time, from its configuration alone."""

import math
import re

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from common.sections import Config
from generate import backbone, model_files
from generate.pixels import picture_side, read_preprocessing
from publish.model.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsModel, embedding_dim

BYTES = {"float32": 4, "bfloat16": 2}  # float16: as bfloat16
BATCHES = (1, 64, 256)
# Dense bfloat16 peak in TFLOP/s and memory in GB, from NVIDIA's data sheets of these cards.
GPUS = {
    "A100 SXM 80 GB": (312, 80),
    "L40S": (362, 48),
    "RTX 4090": (165, 24),
    "RTX PRO 6000": (504, 96),
    "H100 SXM": (989, 80),
    "H200": (989, 141),
}
# Share of that peak. timm's published rates on an RTX PRO 6000 (compiled, bfloat16) come to 0.33 for DINOv3 L/16
# at 256 px (1,027 images/s) and 0.45 for 7B (66 images/s); smaller models, and eager ones, get less.
EFFICIENCY = 0.35
# JPEGs of 640 x 640 pixels that a core reads, decodes and stacks for the copy to a GPU, which resizes them.
# On an AMD EPYC at 2.6 GHz: 520 to 865, the least with other work on all cores.
IMAGES_PER_CORE = 760
# What is in memory when a layer reads and writes most. In a ViT's MLP the activation function reads and writes
# four times the width of a token each, and the residual stream lies beside that four times (states and copies).
_BESIDE = 12 / 8


def estimate(cfg: Config, num_images: int, image_size: int | None) -> dict:
    """All that `as_text` shows. `image_size`: pixels, or None for the model's own."""
    settings = cfg.embedding_model
    folder = model_files.locate(settings.name, settings.revision, weights=False)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    backbone.check(settings, config.model_type)
    size = [image_size, image_size] if image_size else read_preprocessing(folder).image_size
    picture = [picture_side(side, min(settings.views)) for side in size]
    dim = embedding_dim(config, settings.pooling)
    head = {"hidden_dim": cfg.training_model.hidden_dim, "output_dim": min(cfg.training_model.output_dim, dim)}
    with torch.device("meta"):
        shape = SpatialEmbeddingsConfig(config, settings.pooling, settings.views, size, dim, **head)
        model = SpatialEmbeddingsModel(shape)
        pixels = torch.empty(1, 3, *picture)
    flops, largest = measure(model.eval(), pixels)

    parameters = {
        f"backbone.{name}": _count(part) for name, part in model.backbone.named_children() if _count(part)
    }
    parameters["head"] = _count(model.head)
    weights = {dtype: sum(parameters.values()) * size for dtype, size in BYTES.items()}
    views = len(settings.views) * 3 * size[0] * size[1]
    per_image = {
        dtype: int(largest * _BESIDE * width) + pixels.numel() * 4 + views * width
        for dtype, width in BYTES.items()
    }
    gpus = {}
    for name, (tflops, memory_gb) in GPUS.items():
        rate = tflops * 1e12 * EFFICIENCY / flops
        fits = weights["bfloat16"] + per_image["bfloat16"] < memory_gb * 1e9
        hours, cores = round(num_images / rate / 3600, 2), cores_to_feed(rate)
        gpus[name] = {"images_per_second": round(rate, 1), "gpu_hours": hours, "cores": cores, "fits": fits}
    return {
        "backbone": settings.name,
        "image_size": size,
        "views": settings.views,
        "embedding_dim": dim,
        "parameters": parameters,
        "total_parameters": sum(parameters.values()),
        "weight_bytes": weights,
        "flops_per_image": flops,
        "memory_bytes": {d: {batch: weights[d] + batch * per_image[d] for batch in BATCHES} for d in BYTES},
        "images": num_images,
        "embedding_bytes": num_images * dim * 2,
        "gpus": gpus,
        "slurm_cores": slurm_cores(cfg),
        "assumed_share_of_peak": EFFICIENCY,
    }


def as_text(sizes: dict) -> str:
    """The estimate as tables."""
    height, width = sizes["image_size"]
    views = "one view" if len(sizes["views"]) == 1 else f"{len(sizes['views'])} views"
    parameters = pd.Series({**sizes["parameters"], "total": sizes["total_parameters"]}).to_frame("parameters")
    memory = pd.DataFrame(sizes["memory_bytes"]).T.add_prefix("batch ").map(_gigabytes)
    gpus = pd.DataFrame(sizes["gpus"]).T.set_axis(["images/s", "GPU hours", "cores", "fits"], axis=1)
    cores = sizes["slurm_cores"]
    starved = [name for name, gpu in sizes["gpus"].items() if gpu["fits"] and gpu["cores"] > (cores or math.inf)]
    parts = [
        f"{sizes['backbone']}, {views} of {height} x {width} px -> {sizes['embedding_dim']:,} dimensions",
        parameters.to_string(formatters=["{:,}".format]),
        "weights and activations",
        memory.to_string(),
        f"{sizes['flops_per_image'] / 1e9:,.1f} GFLOP per image (a multiply-add counts as 2)",
        f"{sizes['images']:,} images: {_gigabytes(sizes['embedding_bytes'])} of embeddings (float16)",
        f"GPUs, bfloat16, estimated at {sizes['assumed_share_of_peak']:.0%} of peak, and the CPU cores that keep\n"
        f"one busy, at {IMAGES_PER_CORE} images/s each;\n"
        "peak: NVIDIA's data sheets, dense bfloat16; share: timm's published rates of DINOv3, see this module",
        gpus.to_string(formatters=["{:,.0f}".format, "{:,.1f}".format, None, None]),
    ]
    if starved:
        parts.append(
            f"slurm.generate_embeddings.sbatch asks for {cores} cores, and would let these GPUs wait for images: "
            f"{', '.join(starved)}\nset --cpus-per-task as above"
        )
    return "\n\n".join(parts)


def cores_to_feed(images_per_second: float) -> int:
    """Cores that prepare images as fast as a GPU embeds them, and one for the thread that drives it."""
    return math.ceil(images_per_second / IMAGES_PER_CORE) + 1


def slurm_cores(cfg: Config) -> int | None:
    """Cores that a task of generate_embeddings asks Slurm for; None if its flags do not say."""
    flags = " ".join([*cfg.slurm.sbatch, *cfg.slurm.generate_embeddings.sbatch])
    named = re.findall(r"(?:--cpus-per-task[= ]|(?<!\S)-c ?)(\d+)", flags)
    return int(named[-1]) if named else None


def measure(model: nn.Module, pixels: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass, and the largest number of values that one layer reads and writes."""
    largest = 0

    def watch(_, inputs, output):
        nonlocal largest
        tensors = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        largest = max(largest, sum(t.numel() for t in tensors))

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(watch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops(), largest


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
