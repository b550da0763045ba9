"""What the full dataset costs, on paper: rates and fitted growth of this machine, carried on to 25 million images.

Nothing here has been run at that size. Rates are those of results.json, and grow as growth.json says; hours on a
GPU are estimates from its data sheet: for embeddings see publish/inference/model_sizes.py, for neighbours and
evaluation `search_seconds` and `evaluation_seconds`, which count what their kernels compute, read and write.

Reads    tests/benchmarks/results.json, growth.json and demo.json (make bench writes them)
Writes   tests/benchmarks/full_dataset.json, from which the table of docs/benchmarks.md is made
Command  python tests/benchmarks/full_dataset.py
"""

import json
import sys
import tempfile
from pathlib import Path

import timing  # noqa: F401 - puts the repository's root on sys.path
from local_backbone import write_preprocessor
from transformers import Dinov2Config, DINOv3ViTConfig

from common import config, files
from difficulty.search import exact_search
from publish.inference import model_sizes
from train.fitting import schedule

HERE = Path(__file__).resolve().parent
IMAGES = 25_000_000
GPU = "H100 SXM"
# From the data sheet of that GPU, and the shares of them that large products and copies reach.
FLOAT16_FLOPS, FLOAT32_FLOPS, BYTES_PER_S = 989e12, 67e12, 3.35e12
PRODUCT_SHARE, MEMORY_SHARE = 0.5, 0.8
TOPK_READS = 6  # of a float32 value: four to select, eight bits at a time, and two to gather
SEARCHED = (5_000_000, 20_000_000, 25_000_000)  # rows, 768-d
DECIDED = 4  # pairs of an anchor that float64 decides
MATCHES = 2  # of a query: other images of its building
VITS = {  # as on the hub
    "ViT-B/14": Dinov2Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14),
    "ViT-L/14": Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
    "ViT-7B/16": DINOv3ViTConfig(
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_register_tokens=4,
        use_gated_mlp=True,
        patch_size=16,
    ),
}


def ours(results: dict, words: str) -> float:
    """Ours, of the first ratio whose `what` has these words: items a second, or seconds."""
    return next(row["ours"] for row in results["ratios"] if words in row["what"])


def grown(growth: dict, step: str, images: int) -> float:
    """Hours of a step of growth.py for so many images, as it was fitted."""
    fitted = growth["steps"][step]
    return (fitted["linear"] * images + fitted["quadratic"] * images**2) / 3600


def search_seconds(rows: int, dim: int, k: int) -> float:
    """Of the search for the k neighbours of every row on one GPU, with all embeddings on it: of the operators of a
    tile in exact_search.py, one after the other, and of the pairs that float64 decides."""
    (anchors, width), group = exact_search.LARGEST_TILE["cuda"], exact_search.GROUP
    kept = k + exact_search.SPARE
    product = 2 * anchors * width * dim / (FLOAT16_FLOPS * PRODUCT_SHARE)
    scores, candidates = 4 * anchors * width, 4 * anchors * kept * group
    moved = 2 * dim * (anchors + width) + 4 * scores  # product; times the lengths; maxima of groups
    moved += TOPK_READS * (scores / group + candidates)
    moved += 32 * anchors * kept * group + 8 * candidates  # groups gathered in sectors of 32 bytes, and joined
    tiles = rows**2 / (anchors * width) * (product + moved / (BYTES_PER_S * MEMORY_SHARE))
    return tiles + rows * DECIDED * 32 * dim / (BYTES_PER_S * MEMORY_SHARE)


def evaluation_seconds(rows: int, dim: int) -> float:
    """Of the ranking of all rows for every row on one GPU: see metrics.py. Each match reads the scores again."""
    product = 2 * rows**2 * dim / (FLOAT32_FLOPS * PRODUCT_SHARE)
    return product + rows**2 * (4 + 6 * MATCHES) / (BYTES_PER_S * MEMORY_SHARE)


def of_backbone(vit, results: dict, growth: dict) -> dict:
    """Hours, bytes and images per second for one backbone."""
    with tempfile.TemporaryDirectory() as folder:
        vit.save_pretrained(folder)
        write_preprocessor(Path(folder), "dinov2", 224)
        cfg = config.load(None, [f"embedding_model.name={folder}", "embedding_model.pooling=cls"])
        found = model_sizes.estimate(cfg, IMAGES, 224)
    dim, gpu = found["embedding_dim"], found["gpus"][GPU]
    train_images = round(IMAGES * cfg.data.train_ratio)
    embedding_bytes = IMAGES * dim * 2
    stored = 100_000 * 768 * 2  # what bench_storage.py writes and reads
    copying_s = (
        embedding_bytes / stored * (ours(results, "float16 to Parquet") + ours(results, "float16 from Parquet"))
    )
    training = cfg.training
    triplets = training.epochs * schedule.steps_per_epoch(training, train_images) * training.batch_size
    return {
        "dim": dim,
        "gpu_images_per_s": gpu["images_per_second"],
        "gpu_hours_embeddings": gpu["gpu_hours"],
        "cores_per_gpu": gpu["cores"],
        "hours_merge": grown(growth, "duplicates and split", IMAGES) + copying_s / 3600,
        "gpu_hours_neighbors": search_seconds(train_images, dim, cfg.data.neighbors) / 3600,
        "days_neighbors_here": grown(growth, "neighbours, exact, 768-d", train_images) * dim / 768 / 24,
        "hours_training_here": triplets / ours(results, "training, InfoNCE") * dim / 768 / 3600,
        "gb_embeddings": embedding_bytes / 1e9,
        "gb_training_in_memory": train_images * (dim * 2 + cfg.data.neighbors * 4 + 90) / 1e9,
    }


def main() -> int:
    results, growth, demo = (
        json.loads((HERE / f"{name}.json").read_text()) for name in ("results", "growth", "demo")
    )
    cfg = config.load()
    per_image = demo["bytes_per_image"]
    train_images, test_images = round(IMAGES * cfg.data.train_ratio), round(IMAGES * cfg.data.test_ratio)
    neighbor_bytes = cfg.data.neighbors * (4 + 2) + cfg.data.num_bands + 1 + 20
    found = {
        "machine": results["machine"],
        "gpu": GPU,
        "images": IMAGES,
        "views": cfg.embedding_model.views,
        "core_hours_process_tar": IMAGES / ours(results, "process_tar on gzip") / 3600,
        "core_hours_fingerprints": IMAGES / ours(results, "pHash") / 3600,
        "days_evaluation_here": grown(growth, "evaluation, 256-d", test_images) / 24,
        "gpu_hours_evaluation": evaluation_seconds(test_images, 256) / 3600,
        "gpu_hours_search": {str(rows): search_seconds(rows, 768, cfg.data.neighbors) / 3600 for rows in SEARCHED},
        "gb_metadata": IMAGES * (per_image["intermediates"] + per_image["fingerprints"]) / 1e9,
        "gb_difficulty": train_images * neighbor_bytes / 1e9,
        "embedding_files": IMAGES // cfg.data.rows_per_part,
        "backbones": {name: of_backbone(vit, results, growth) for name, vit in VITS.items()},
    }
    files.write_text(HERE / "full_dataset.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
