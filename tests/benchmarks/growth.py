"""How the time of the stages that compare images with one another grows with their number: measured, fitted by
a N + b N^2, and drawn. full_dataset.py carries it on.

Writes   tests/benchmarks/growth.json and growth.svg
Command  python tests/benchmarks/growth.py     (make bench runs it too)
Memory   the largest step holds 1,000,000 images' metadata or 50,000 vectors: under 2 GB
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import timing  # puts the repository's root on sys.path
import torch
from matplotlib.figure import Figure
from scipy.optimize import nnls

from common import config, files
from common.places.zones import make_zones
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors
from preprocess.split.split_rules import Images, decide
from train.evaluation import metrics

HERE = Path(__file__).resolve().parent
DIM, OUTPUT_DIM, K = 768, 256, 150
VIEWS = 4  # images of a building


def buildings_and_places(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(building of each image, latitude, longitude): buildings 12 m apart along streets 200 m apart."""
    building = np.arange(n) // VIEWS
    along, street = building % 100, building // 100
    return building, 45 + street % 500 * 200 / 111_195, (street // 500 * 2_000 + along * 12) / 78_600


def vectors(n: int, dim: int) -> torch.Tensor:
    """(n, dim) float32 unit vectors: those of a building around its own centre."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(-(-n // VIEWS), dim, generator=generator).repeat_interleave(VIEWS, 0)[:n]
    noisy = centres + torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1)


def split(n: int):
    """Duplicates, cells, buffer and panoramas of n images."""
    rng = np.random.default_rng(n)
    building, lat, lon = buildings_and_places(n)
    hashes = [rng.integers(0, 2**63, n, dtype=np.uint64) for _ in range(3)]
    rows, zeros = np.arange(n), np.zeros(n, np.int32)
    images = Images(zeros, building, rows, rows // 3, lat, lon, *hashes, np.ones(n, bool))
    settings = config.load().data
    return lambda: decide(images, settings, seed=0)


def neighbors(n: int):
    """The 150 nearest images of each of n, 768-d, exactly."""
    building, lat, lon = buildings_and_places(n)
    zones = make_zones(building, lat, lon, 25.0)
    embeddings = vectors(n, DIM).half()
    cpu, rows = torch.device("cpu"), np.arange(n)
    return lambda: exact_neighbors(SearchVectors(embeddings, cpu), zones, k=K, rows=rows, memory_mb=1024)


def evaluation(n: int):
    """n queries against n images, 256-d: every rank of every match."""
    building, lat, lon = buildings_and_places(n)
    junk = make_zones(building, lat, lon, 25.0).rows_of(np.arange(n), own=False)
    found = vectors(n, OUTPUT_DIM)
    return lambda: metrics.find_matches(
        found,
        found,
        query_building=building,
        gallery_building=building,
        self_rows=np.arange(n),
        junk=junk,
        memory_mb=1024,
        device=torch.device("cpu"),
    )


STEPS = {
    "duplicates and split": (split, (10_000, 100_000, 1_000_000)),
    "neighbours, exact, 768-d": (neighbors, (10_000, 20_000, 40_000)),
    "evaluation, 256-d": (evaluation, (10_000, 20_000, 50_000)),
}


def fit(sizes, seconds) -> tuple[float, float]:
    """(a, b) >= 0 of seconds = a n + b n^2 by least squares of the relative errors. (A power law would carry the
    part that grows with n into the one that grows with its square, and be far too low at the full size.)"""
    n, seconds = np.array(sizes, float), np.array(seconds)
    (linear, quadratic), _ = nnls(np.stack([n, n * n], axis=1) / seconds[:, None], np.ones(len(n)))
    return float(linear), float(quadratic)


def draw(found: dict, path: Path) -> None:
    """Seconds over number of images, both logarithmic: measured (dots) and fitted (lines)."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, step in found["steps"].items():
        millions = np.geomspace(step["images"][0], step["images"][-1]) / 1e6
        a, b = step["linear"] * 1e6, step["quadratic"] * 1e12
        label = f"{name}: {a:,.0f} n + {b:,.0f} n² seconds, n in millions"
        (line,) = axes.loglog(millions * 1e6, a * millions + b * millions**2, label=label)
        axes.loglog(step["images"], step["seconds"], "o", color=line.get_color())
    axes.set(xlabel="images", ylabel=f"seconds on {timing.cores()} cores")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    found: dict = {"machine": timing.machine(), "steps": {}}
    for name, (make, sizes) in STEPS.items():
        taken = []
        for n in sizes:
            work = make(n)
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
            print(f"{name:28} {n:>10,} images {taken[-1]:8.1f} s", flush=True)
        linear, quadratic = fit(sizes, taken)
        found["steps"][name] = {"images": sizes, "seconds": taken, "linear": linear, "quadratic": quadratic}
    files.write_text(HERE / "growth.json", json.dumps(found, indent=1) + "\n")
    draw(found, HERE / "growth.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
