"""How fast a card is at each stage, against the least work that the stage consists of, and the memory it takes.

Everything is warmed up first, timed to the end of what is queued on the card, and made up on the spot.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import bench_evaluation
import bench_neighbors
import bench_triplets
import gpu_equality
import gpu_feed
import numpy as np
import timing
import torch
from bench_generation import PX, settings, write_vit
from gpu_rows import Gpu, Row, memory, peak_since, reset_peak, speed

from common import config, devices
from common.sections import Config, Infrastructure
from difficulty.search.balltree import recall
from generate import backbone, batches, loop
from publish.inference import model_sizes
from publish.model.projection_head import ProjectionHead
from train.evaluation import heads
from train.fitting import fit
from train.linear import whitening

CHECKED = 2_048  # anchors of the large search whose neighbours are compared


def until_done(work: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """`work`, so many times, and then the wait for the card."""

    def run() -> None:
        with torch.inference_mode():
            for _ in range(times):
                work()
        torch.cuda.synchronize()

    return run


def product(gpu: Gpu) -> Iterator[Row]:
    """The card's largest share of its peak: a large product in bfloat16."""
    n = gpu.sizes.product
    a, b = (torch.randn((n, n), device=gpu.device).bfloat16() for _ in range(2))
    seconds = min(timing.seconds({"product": until_done(lambda: a @ b, 10)}, gpu.sizes.rounds)["product"]) / 10
    what = f"product of two matrices of {n:,} x {n:,}, bfloat16"
    yield at_peak(gpu, Row(what, 2 * n**3 / seconds / 1e12, "TFLOP/s"), 2 * n**3 / seconds)


def at_peak(gpu: Gpu, row: Row, flops_per_s: float) -> Row:
    """The row with its share of the card's peak as the ratio."""
    if gpu.peak is None:
        return replace(row, against="peak, which model_sizes.py does not know", ratio=None)
    name, tflops = gpu.peak
    return replace(row, against=f"peak of {name}: {tflops} TFLOP/s", ratio=flops_per_s / tflops / 1e12)


# ------------------------------------------------------------------------------------------------- generation


@functools.lru_cache
def feeding(gpu: Gpu) -> tuple[float, int]:
    """(images/s that are decoded and prepared for a model of no cost, threads that do so)."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(Path(folder), write_vit(Path(folder) / "vit", (28, 1, 1)))
        preprocessing = backbone.read_preprocessing(Path(folder) / "vit", min(cfg.embedding_model.views))
    images, threads = gpu_feed.photographs(gpu), cfg.infrastructure.threads
    infrastructure = with_batch(cfg, 64)
    count = max(int(gpu.sizes.seconds * model_sizes.IMAGES_PER_CORE * threads), 8)
    few_pixels = lambda pixels: pixels[:, :, ::32, ::32].flatten(1)  # noqa: E731
    run = lambda: gpu_feed.embed(images, count, few_pixels, preprocessing, gpu.device, infrastructure)  # noqa: E731
    return count / min(timing.seconds({"fed": run}, gpu.sizes.rounds)["fed"]), threads


def feed(gpu: Gpu) -> Iterator[Row]:
    """What the cores can feed."""
    rate, threads = feeding(gpu)
    yield Row(
        f"JPEGs of {gpu_feed.IMAGE_PX} px decoded by {threads} threads, resized by the card", rate, "images/s"
    )


def vit(gpu: Gpu, size: str, is_compiled: bool) -> Iterator[Row]:
    """A ViT/14 with its views and pooling, on pixels that are there and fed with JPEGs, against its bare pass."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(Path(folder), write_vit(Path(folder) / "vit", gpu.sizes.vits[size]))
        dtype, before = devices.resolve_dtype(cfg.embedding_model.dtype, gpu.device), reset_peak()
        model = backbone.load(cfg.embedding_model, dtype, gpu.device)
        estimate = model_sizes.estimate(cfg, 1, PX)
    picture = model.preprocessing.image_size
    batch = batches.size_of(with_batch(cfg, gpu.sizes.batch), model, picture, gpu.device).images
    if is_compiled:
        model.model.compile()
    count, taken = on_pixels(gpu, model, batch)
    views = f"{len(cfg.embedding_model.views)} views of {PX} px"
    name = f"ViT-{size}/14, {views}{', compiled' if is_compiled else ''}, {dtype}, batches of {batch}"
    row = speed(f"{name}, pixels prepared", taken, "prepared", "bare forward", count, "images/s")
    yield row
    rate = row.value or 0.0
    yield at_peak(gpu, row, rate * estimate["flops_per_image"])

    feed_rate, threads = feeding(gpu)
    fed_count = batch * max(2, round(gpu.sizes.seconds * min(rate, feed_rate) / batch))
    settled = with_batch(cfg, batch)  # found once; and torch.compile sees one shape only
    args = gpu_feed.photographs(gpu), fed_count, model, model.preprocessing, gpu.device, settled
    torch.cuda.reset_peak_memory_stats()
    fed = timing.seconds({"fed": lambda: gpu_feed.embed(*args)}, gpu.sizes.rounds)["fed"]
    bare = [seconds * fed_count / count for seconds in taken["bare forward"]]
    row = speed(f"{name}, from JPEGs", {"fed": fed, "bare": bare}, "fed", "bare", fed_count, "images/s")
    limit = "the card limits" if rate < feed_rate else f"{threads} threads limit: {feed_rate:,.0f} images/s"
    yield replace(row, against="bare forward", note=limit)
    yield memory(name, peak_since(before), generation_bytes(estimate, dtype, batch, threads, picture))
    if is_compiled:
        torch.compiler.reset()


def on_pixels(gpu: Gpu, model: backbone.Backbone, batch: int) -> tuple[int, dict[str, list[float]]]:
    """(images of a round, seconds of each round) of the whole model, and of its bare forward pass."""
    size = batch * len(model.settings.views), 3, *model.view_size
    with torch.inference_mode():
        pixels = torch.rand((batch, 3, *model.preprocessing.image_size), device=gpu.device)
        views = torch.rand(size, device=gpu.device).to(model.model.dtype)
    prepared, bare = lambda: model(pixels).half(), lambda: model.model(views)
    once = min(timing.seconds({"once": until_done(prepared)}, rounds=1)["once"])
    times = max(1, round(gpu.sizes.seconds / once))
    ways = {"prepared": until_done(prepared, times), "bare forward": until_done(bare, times)}
    return batch * times, timing.seconds(ways, gpu.sizes.rounds)


def with_batch(cfg: Config, batch: int | str) -> Infrastructure:
    return cfg.infrastructure.model_copy(update={"embedding_batch_size": batch})


def generation_bytes(estimate: dict, dtype: str, batch: int, threads: int, picture: list[int]) -> float:
    """The estimate of a pass (publish/estimate_model_size.py), and the images in flight (generate/loop.py)."""
    by_batch = estimate["memory_bytes"]["float32" if dtype == "float32" else "bfloat16"]
    per_image = (by_batch[256] - by_batch[64]) / 192
    chunks = threads * loop.CHUNK
    pictures = max(3 * batch, 2 * chunks) * 3 * picture[0] * picture[1] * 4
    return by_batch[1] + (batch - 1) * per_image + pictures + 2 * chunks * 3 * gpu_feed.IMAGE_PX**2


# ----------------------------------------------------------------------------------------------------- search


def search(gpu: Gpu) -> Iterator[Row]:
    """Some anchors among all rows: ours, plain tiles, and nothing but the products of ours."""
    sizes, k, before = gpu.sizes, bench_neighbors.K, reset_peak()
    embeddings, zones = vectors_on(gpu.device, sizes.rows), bench_neighbors.street_zones(sizes.rows)
    rows, (n, dim) = np.arange(sizes.anchors), embeddings.shape
    memory_mb = devices.search_memory_mb(config.load().infrastructure, gpu.device)
    args = embeddings, zones, k, rows, memory_mb, gpu.device
    torch.cuda.reset_peak_memory_stats()
    found = gpu_equality.nearest(*args)[0]
    yield memory(f"search, {n:,} x {dim}", peak_since(before), n * (dim * 2 + 8) + memory_mb * 2**20)
    plain = bench_neighbors.plain_tiles(embeddings, zones, k, gpu.device, rows[:CHECKED]).cpu().numpy()
    what = f"search, {len(rows):,} of {n:,} x {dim}, k = {k}"
    shared = recall(found[:CHECKED], plain)
    yield Row(f"{what}: shared with plain tiles", 100 * shared, "%", "99.99 % at least", is_right=shared >= 0.9999)

    ways = {
        "ours": lambda: gpu_equality.nearest(*args),
        "plain tiles": until_done(lambda: bench_neighbors.plain_tiles(embeddings, zones, k, gpu.device, rows)),
        "the product alone": until_done(lambda: products(embeddings, len(rows))),
    }
    taken = timing.seconds(ways, gpu.sizes.rounds, warm_up=False)  # each has run, but for the product
    for against in ("plain tiles", "the product alone"):
        yield speed(what, taken, "ours", against, len(rows), "anchors/s")


def vectors_on(device: torch.device, n: int) -> torch.Tensor:
    """(n, DIM) float16 vectors on the device, made up as bench_neighbors.py makes them on the host."""
    generator = torch.Generator(device).manual_seed(0)
    dim, building = bench_neighbors.DIM, torch.arange(n, device=device) // 4
    draw = lambda count: torch.randn((count, dim), generator=generator, device=device)  # noqa: E731
    styles, looks, common = draw(n // 80), 0.5 * draw(n // 4 + 1), draw(1)
    looks += styles[torch.randint(len(styles), (len(looks),), generator=generator, device=device)]
    vectors = torch.empty((n, dim), dtype=torch.float16, device=device)
    for block in torch.arange(n, device=device).split(65_536):
        vectors[block] = (0.7 * common + looks[building[block]] + 0.5 * draw(len(block))).half()
    return vectors


def products(embeddings: torch.Tensor, anchors: int) -> None:
    """The products of the search in float16, in large tiles."""
    size, width = bench_neighbors.PLAIN_TILE["cuda"]
    for some in embeddings[:anchors].split(size):
        for block in embeddings.split(width):
            some @ block.T


# ------------------------------------------------------------------------------- training, head, evaluation


def training(gpu: Gpu) -> Iterator[Row]:
    """Steps with the defaults, against the same steps on one batch that is there."""
    cfg, sizes, before = config.load(), gpu.sizes, reset_peak()
    data, _ = bench_triplets.make_data(cfg, sizes.rows, gpu.device)
    torch.cuda.reset_peak_memory_stats()
    ours, other = bench_triplets.Ours(cfg, data), fit.start(cfg, data)
    ours.train(2)
    batch, embeddings = ours.feed.take()
    related = fit.relations(data.train, batch.anchors, batch.rows)
    dtype = devices.resolve_dtype(cfg.training.dtype, gpu.device)

    def on_one_batch() -> None:
        for _ in range(sizes.steps):
            with torch.autocast(gpu.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                vectors = other.head.train()(embeddings)
            other.optimizer.zero_grad(set_to_none=True)
            other.loss(vectors, *related)[0].backward()
            other.optimizer.step()
        torch.cuda.synchronize()

    def steps() -> None:
        ours.train(sizes.steps)
        torch.cuda.synchronize()

    taken = timing.seconds({"ours": steps, "one batch, again and again": on_one_batch}, gpu.sizes.rounds)
    size = f"{bench_triplets.DIM} to {cfg.training_model.output_dim}, batches of {cfg.training.batch_size}"
    what = f"training, {cfg.training.loss}, {size}, {dtype}"
    yield speed(what, taken, "ours", "one batch, again and again", sizes.steps, "steps/s")
    row_bytes = bench_triplets.DIM * 2 + cfg.data.neighbors * 4 + 90
    yield memory(f"training, {sizes.rows:,} rows", peak_since(before), sizes.rows * row_bytes)


def moments(gpu: Gpu) -> Iterator[Row]:
    """What PCA and whitening are made of, against the products alone in float64."""
    n, before = gpu.sizes.rows, reset_peak()
    embeddings, building = vectors_on(gpu.device, n), np.arange(n) // 4
    ours = lambda: whitening.moments(embeddings, building, gpu.device)  # noqa: E731
    torch.cuda.reset_peak_memory_stats()
    ours()
    dim, rows = embeddings.shape[1], whitening.BLOCK_ROWS
    formula = n * dim * 2 + 8 * dim * dim * 8 + rows * dim * 24
    yield memory(f"moments, {n:,} x {dim}", peak_since(before), formula)
    block = embeddings[:rows].double()
    times = max(1, round(1.25 * n / rows))  # a product of the rows, and one of the buildings
    ways = {"ours": ours, "the product alone": until_done(lambda: block.T @ block, times)}
    yield speed(
        f"moments, {n:,} x {dim}", timing.seconds(ways, gpu.sizes.rounds), "ours", "the product alone", n, "rows/s"
    )


def head(gpu: Gpu) -> Iterator[Row]:
    """All embeddings through a head."""
    settings, n = config.load().training_model, gpu.sizes.rows
    embeddings = vectors_on(gpu.device, n)
    model = ProjectionHead(bench_neighbors.DIM, settings.hidden_dim, settings.output_dim).to(gpu.device).eval()
    block = embeddings[: heads.EMBED_ROWS].float()
    times = -(-n // heads.EMBED_ROWS)
    ways = {
        "ours": until_done(lambda: heads.embed(model, embeddings, gpu.device)),
        "one block, again and again": until_done(lambda: model(block), times),
    }
    vectors_bytes, block_bytes = n * settings.output_dim * 4, heads.EMBED_ROWS * bench_neighbors.DIM * 4
    copies = 4  # of a block: itself, normalised, centred, and normalised for the MLP
    before = reset_peak()
    heads.embed(model, embeddings, gpu.device)
    yield memory(f"head embedding, {n:,} rows", peak_since(before), vectors_bytes + copies * block_bytes)
    taken = timing.seconds(ways, gpu.sizes.rounds)
    yield speed(f"head embedding, {n:,} rows", taken, "ours", "one block, again and again", n, "rows/s")


def evaluation(gpu: Gpu) -> Iterator[Row]:
    """Every image against all others, and nothing but the product."""
    data, before = bench_evaluation.Data(gpu.sizes.evaluated), reset_peak()
    n, dim = data.vectors.shape
    vectors = data.vectors.to(gpu.device)
    data.ours(vectors, gpu.device)
    formula = n * dim * 4 + bench_evaluation.MEMORY_MB * 2**20
    yield memory(f"evaluation, {n:,} x {n:,}", peak_since(before), formula)

    def product_alone() -> None:
        for queries in vectors.split(4_096):
            for gallery in vectors.split(32_768):
                queries @ gallery.T

    ways = {"ours": lambda: data.ours(vectors, gpu.device), "the product alone": until_done(product_alone)}
    taken = timing.seconds(ways, gpu.sizes.rounds, warm_up=False)
    yield speed(f"evaluation, {n:,} x {n:,} x {dim}", taken, "ours", "the product alone", n, "queries/s")


CHECKS: dict[str, Callable[[Gpu], Iterator[Row]]] = {
    "product": product,
    "search": search,
    "moments": moments,
    "training": training,
    "head embedding": head,
    "evaluation": evaluation,
    "feeding": feed,
    **{f"ViT-{size}/14": functools.partial(vit, size=size, is_compiled=False) for size in "SBL"},
    **{f"ViT-{size}/14, compiled": functools.partial(vit, size=size, is_compiled=True) for size in "SBL"},
}
