"""Whether a card computes what the CPU does, stage by stage, on little data.

Random numbers of CUDA differ from the CPU's, so training is compared on batches that the CPU has drawn, without
dropout. Limits allow for another order of summation in float32, and for convolutions in TF32.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_evaluation
import bench_neighbors
import bench_triplets
import gpu_feed
import numpy as np
import torch
from bench_generation import settings, write_vit
from gpu_rows import Gpu, Row, equality

from common import config
from common.places.zones import Zones
from difficulty.search.exact_search import Neighbors, exact_neighbors
from difficulty.search.search_vectors import SearchVectors
from generate import backbone
from publish.model.projection_head import ProjectionHead
from train import datasets
from train.evaluation import heads, metrics
from train.fitting import fit
from train.linear import whitening

CPU = torch.device("cpu")
STEPS = 5
SEARCH_MB = 16  # for tiles: so little that there are many


def nearest(
    embeddings: torch.Tensor, zones: Zones, k: int, rows: np.ndarray, memory_mb: float, device: torch.device
) -> Neighbors:
    """The search as its stage calls it."""
    return exact_neighbors(SearchVectors(embeddings, device), zones, k=k, rows=rows, memory_mb=memory_mb)


def search(gpu: Gpu) -> Iterator[Row]:
    """Neighbours, with the embeddings on the card and on the host."""
    vectors, zones = bench_neighbors.made_up(gpu.sizes.compared)
    on_host, rows = torch.from_numpy(vectors), np.arange(len(vectors))
    on_card = on_host.to(gpu.device)
    k = min(bench_neighbors.K, len(rows) // 40)
    expected, similarities = nearest(on_host, zones, k, rows, SEARCH_MB, CPU)
    for where, embeddings in (("the card", on_card), ("the host", on_host)):
        found, similar = nearest(embeddings, zones, k, rows, SEARCH_MB, gpu.device)
        what = f"search, {len(rows):,} x {vectors.shape[1]}, embeddings on {where}"
        yield equality(what, (found != expected).sum(), 0, f"of {found.size:,} differ")
        yield equality(f"{what}: similarities", np.abs(similar - similarities).max(), 1e-5, "apart")


def moments(gpu: Gpu) -> Iterator[Row]:
    """What PCA and whitening are made of, in float64."""
    data = bench_triplets.make_data(config.load(), gpu.sizes.compared)[0].train
    expected, found = (
        whitening.moments(data.embeddings, data.zones.building_of_row, device) for device in (CPU, gpu.device)
    )
    apart = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))
    yield equality(f"moments, {len(data.embeddings):,} rows", apart, 1e-9, "apart, relative")


class DrawnByCpu(datasets.Sampler):
    """Batches that the CPU draws, on any device."""

    def __init__(self, rows: datasets.TrainRows, cfg, device: torch.device):
        super().__init__(rows, cfg.training.batch_size, cfg.training.bandit_groups, cfg.training.seed)
        self.device = device

    def draw(self, step: int, arms: np.ndarray) -> datasets.Batch:
        return datasets.Batch(*(tensor.to(self.device) for tensor in vars(super().draw(step, arms)).values()))


def training(gpu: Gpu) -> Iterator[Row]:
    """What is drawn for given random numbers; then the losses of a few steps, and the head after them."""
    names = "training_model.dropout=0 training.dtype=float32 training.sampler=uniform training.warmup_steps=1"
    cfg = config.load(None, names.split())
    data = {device: bench_triplets.make_data(cfg, gpu.sizes.compared, device)[0] for device in (CPU, gpu.device)}
    u = torch.rand((4, gpu.sizes.compared), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn, losses, vectors = {}, {}, {}
    for device, here in data.items():
        drawn[device] = triplets(here.train, u.to(device)).cpu()
        run = fit.start(cfg, here)
        feed = fit.make_feed(cfg, here, run)
        feed.sampler = DrawnByCpu(data[CPU].train, cfg, device)
        losses[device] = np.array([loss_of_step(cfg, here, run, feed) for _ in range(STEPS)])
        vectors[device] = heads.embed(run.head, data[CPU].train.embeddings, device).cpu()
    torch.cuda.synchronize()  # the feed has drawn a batch ahead, from tables that are dropped now
    differ = (drawn[CPU] != drawn[gpu.device]).any(dim=0).sum()
    yield equality("training: triplets drawn", int(differ), 0, f"of {u.shape[1]:,} differ")
    apart = np.abs(losses[gpu.device] / losses[CPU] - 1).max()
    yield equality(f"training, float32: losses of {STEPS} steps", apart, 1e-5, "apart, relative")
    apart = distance(vectors, gpu)
    yield equality(f"training, float32: the head after {STEPS} steps", apart, 1e-6, "cosine distance")


def triplets(rows: datasets.TrainRows, u: torch.Tensor) -> torch.Tensor:
    """(4, N): a positive of every row, a negative with its arm, and one from anywhere, for given numbers."""
    anchors = torch.arange(u.shape[1], device=rows.device)
    arms = anchors % (rows.num_bands + 1)
    negatives = datasets.negatives_of(rows, anchors, arms, u[1], u[2])
    anywhere = datasets.random_rows(rows, anchors, u[3])
    return torch.stack([datasets.positives_of(rows, anchors, u[0]).long(), *negatives, anywhere])


def loss_of_step(cfg, data: datasets.TrainingData, run: fit.Run, feed) -> float:
    before = run.sums[0]
    fit.train_step(cfg, data, run, feed, None)
    return run.sums[0] - before


def evaluation(gpu: Gpu) -> Iterator[Row]:
    """The rank of each query's best match, and recall and mAP@R, with the vectors on the card and on the host."""
    data = bench_evaluation.Data(gpu.sizes.compared)
    expected, n = data.ours(), gpu.sizes.compared
    for where, vectors in (("the card", data.vectors.to(gpu.device)), ("the host", data.vectors)):
        found, what = data.ours(vectors, gpu.device), f"evaluation, {n:,} x {n:,}, vectors on {where}"
        differ = np.count_nonzero(expected.best_rank != found.best_rank) / n
        yield equality(f"{what}: ranks", differ, 1e-3, "of all differ")
        figures, of_cpu = (list(metrics.summarize(each).values())[:-1] for each in (found, expected))
        apart = max(abs(a - b) for a, b in zip(figures, of_cpu, strict=True))
        yield equality(f"{what}: recall, mAP@R", apart, 1e-3, "apart")


def head(gpu: Gpu) -> Iterator[Row]:
    """Vectors of a trained head."""
    torch.manual_seed(0)
    head = ProjectionHead(bench_triplets.DIM, 512, 256).eval()
    torch.nn.init.ones_(head.gain)
    embeddings = torch.randn(gpu.sizes.compared, bench_triplets.DIM).half()
    vectors = {device: heads.embed(head, embeddings, device).cpu() for device in (CPU, gpu.device)}
    yield equality("head embedding", float((vectors[CPU] - vectors[gpu.device]).abs().max()), 1e-5, "apart")


def generation(gpu: Gpu) -> Iterator[Row]:
    """Vectors of photographs, from JPEG to float16, by a random ViT-S; the CPU's in float32."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(Path(folder), write_vit(Path(folder) / "vit", gpu.sizes.vits["S"]))
        images = gpu_feed.photographs(gpu)[: gpu.sizes.compared // 200]
        infrastructure = cfg.infrastructure.model_copy(update={"embedding_batch_size": 8})

        def embedded(dtype: str, device: torch.device) -> torch.Tensor:
            model = backbone.load(cfg.embedding_model, dtype, device)
            args = images, len(images), model, model.preprocessing, device, infrastructure
            return torch.from_numpy(gpu_feed.embed(*args))

        vectors = {CPU: embedded("float32", CPU)}
        for dtype, allowed in (("float32", 1e-4), ("bfloat16", 1e-3)):
            vectors[gpu.device] = embedded(dtype, gpu.device)
            what = f"generation, {len(images)} JPEGs, ViT-S, {dtype}"
            yield equality(what, distance(vectors, gpu), allowed, "cosine distance")


def distance(vectors: dict[torch.device, torch.Tensor], gpu: Gpu) -> float:
    """The largest cosine distance between the rows of the CPU and those of the card."""
    ours, expected = (vectors[device].double() for device in (gpu.device, CPU))
    return float((1 - torch.cosine_similarity(ours, expected)).max())


CHECKS: dict[str, Callable[[Gpu], Iterator[Row]]] = {
    "search": search,
    "moments": moments,
    "training": training,
    "evaluation": evaluation,
    "head embedding": head,
    "generation": generation,
}
