"""Neighbour search: ours, exact, against ten lines of torch, faiss's exact index and the peer's tree on a PCA.

Size     12,000, 30,000 and 100,000 x 768; the last, also against faiss and the tree, in one round, for it takes
         minutes: about 6 on two cores. --images 20000 instead of it for a quick look
Command  python tests/benchmarks/bench_neighbors.py [--images N] [--json PATH]
Memory   N x 768 x 10 bytes: the embeddings, faiss's copy in float32 and that of the ten lines
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import timing  # puts the repository's root on sys.path
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import BallTree
from torch.nn import functional as F

from common.places.zones import Zones, make_zones
from difficulty.search.balltree import recall
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors

DIM, K, RADIUS_M, MEMORY_MB = 768, 150, 25.0, 1024
CPU = torch.device("cpu")
TREE_DIM, TREE_QUERIES = 32, 500  # the peer's PCA; the queries that its time is carried on from
CHECKED = 500  # anchors whose neighbours are compared with float64
PLAIN_TILE = {"cpu": (1_024, 16_384), "cuda": (8_192, 32_768)}  # anchors, rows


def street_zones(n: int) -> Zones:
    """The zones of n images of buildings of 4, 12 m apart along streets of 25 buildings."""
    building = np.arange(n) // 4
    street = building // 25
    lat = 45 + street % 500 * 200 / 111_195
    return make_zones(building, lat, street // 500 * 0.05 + building % 25 * 1.53e-4, RADIUS_M)


def made_up(n: int) -> tuple[np.ndarray, Zones]:
    """(n, DIM) float16 vectors and their zones: the buildings of `street_zones`, in styles that about 80 images
    share, each image with noise of its own."""
    rng = np.random.default_rng(0)
    building = np.arange(n) // 4
    styles = rng.normal(size=(max(1, n // 80), DIM)).astype(np.float32)
    own = rng.normal(size=(building[-1] + 1, DIM)).astype(np.float32)
    style = styles[rng.integers(0, len(styles), len(own))]
    noise = rng.normal(size=(n, DIM)).astype(np.float32)
    common = rng.normal(size=DIM).astype(np.float32)  # a backbone's vectors all lean one way
    vectors = 0.7 * common + (style + 0.5 * own)[building] + 0.5 * noise
    return vectors.astype(np.float16), street_zones(n)


def plain_tiles(
    embeddings: torch.Tensor, zones: Zones, k: int, device: torch.device, rows: np.ndarray | None = None
) -> torch.Tensor:
    """The neighbours (n, k) int64 of the anchors `rows` (n,), or of all, most similar first, -1 where there are
    fewer: what anyone would write. Float32 throughout, so that near ties may be in another order than exact."""
    unit, found = F.normalize(embeddings.to(device).float(), dim=1), []
    rows, (size, width) = np.arange(len(unit)) if rows is None else rows, PLAIN_TILE[device.type]
    for some in np.split(rows, range(size, len(rows), size)):
        indptr, forbidden = zones.rows_of(some, own=True)
        of_anchor = np.repeat(np.arange(len(some)), np.diff(indptr))
        anchors = unit[torch.from_numpy(some).to(device)]
        best = torch.full((len(some), k), -torch.inf, device=device)
        at = torch.full((len(some), k), -1, device=device)
        for start in range(0, len(unit), width):
            scores = anchors @ unit[start : start + width].T
            here = (forbidden >= start) & (forbidden < start + scores.shape[1])
            scores[of_anchor[here], forbidden[here] - start] = -torch.inf
            values, columns = scores.topk(min(k, scores.shape[1]), dim=1)
            best, order = torch.cat([best, values], dim=1).topk(k, dim=1)
            at = torch.cat([at, columns + start], dim=1).gather(1, order)
        found.append(at.masked_fill(best == -torch.inf, -1))
    return torch.cat(found)


def peers_way(vectors: np.ndarray):
    """PCA to 32 dimensions and a ball tree on them, asked for some of the queries, without masks."""
    reduced = PCA(TREE_DIM, random_state=0).fit_transform(vectors.astype(np.float32))
    tree = BallTree(reduced)
    queries = np.linspace(0, len(vectors) - 1, TREE_QUERIES).astype(int)
    started = time.perf_counter()
    found = tree.query(reduced[queries], K + 1, return_distance=False)
    return time.perf_counter() - started, queries, found


def with_faiss(vectors: np.ndarray, zones: Zones) -> np.ndarray:
    """IndexFlatIP asked for K and as many more as the largest zone holds, which is then filtered."""
    import faiss

    n = len(vectors)
    unit = vectors.astype(np.float32)
    faiss.normalize_L2(unit)
    index = faiss.IndexFlatIP(DIM)
    index.add(unit)
    found = np.empty((n, K), np.int64)
    for start in range(0, n, 4_096):
        rows = np.arange(start, min(n, start + 4_096))
        indptr, forbidden = zones.rows_of(rows, own=True)
        asked = index.search(unit[rows], K + int(np.diff(indptr).max()))[1]
        pairs = np.repeat(np.arange(len(rows)), np.diff(indptr)) * n + forbidden
        allowed = ~np.isin(np.arange(len(rows))[:, None] * n + asked, pairs)
        order = np.argsort(~allowed, axis=1, kind="stable")[:, :K]
        found[rows] = np.take_along_axis(asked, order, axis=1)
    return found


def in_float64(vectors: np.ndarray, zones: Zones, rows: np.ndarray) -> np.ndarray:
    """The K best rows (n, K) of some anchors by products in float64."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarities = unit[rows] @ unit.T
    indptr, forbidden = zones.rows_of(rows, own=True)
    similarities[np.repeat(np.arange(len(rows)), np.diff(indptr)), forbidden] = -np.inf
    return np.argsort(-similarities, axis=1, kind="stable")[:, :K]


def peak_mb(reset: bool = False) -> float:
    """The most memory that this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def against_plain_tiles(n: int, rounds: int) -> timing.Ratio:
    """Ours against the ten lines; ours must be what float64 says, in the memory that it is given."""
    vectors, zones = made_up(n)
    embeddings, found = torch.from_numpy(vectors), {}

    def ours():
        before = peak_mb(reset=True)
        found["rows"] = exactly(embeddings, zones)
        found["mb"] = peak_mb() - before

    ways = {"ours": ours, "plain tiles": lambda: plain_tiles(embeddings, zones, K, CPU)}
    taken = timing.seconds(ways, rounds, warm_up=False)
    allowed_mb = MEMORY_MB + n * (8 + K * 8) / 2**20
    print(f"{n:,} rows: peak memory of ours {found['mb']:,.0f} MB more, of {allowed_mb:,.0f} MB", flush=True)
    assert found["mb"] <= allowed_mb
    checked = np.linspace(0, n - 1, CHECKED).astype(int)
    assert (found["rows"][checked] == in_float64(vectors, zones, checked)).all()  # in the same order, too
    return timing.ratio(named(n), taken, "ours", "plain tiles", items=n, unit="images/s", target=1)


def against_others(n: int) -> list[timing.Ratio]:
    vectors, zones = made_up(n)
    embeddings, found = torch.from_numpy(vectors), {}
    ways = {
        "ours": lambda: exactly(embeddings, zones),
        "faiss IndexFlatIP": lambda: found.update(faiss=with_faiss(vectors, zones)),
    }
    taken = timing.seconds(ways, rounds=1, warm_up=False)
    checked = np.linspace(0, n - 1, CHECKED).astype(int)
    of_faiss = recall(found["faiss"][checked], in_float64(vectors, zones, checked))
    asked_s, queries, by_tree = peers_way(vectors)
    taken["PCA-32 + BallTree"] = [asked_s * n / TREE_QUERIES]
    of_tree = recall(by_tree, in_float64(vectors, zones, queries))
    print(f"recall@{K}: ours 1, faiss {of_faiss:.4f}, the tree {of_tree:.2f}", flush=True)
    targets = {"faiss IndexFlatIP": 1, "PCA-32 + BallTree": 10}
    return [
        timing.ratio(named(n), taken, "ours", other, items=n, unit="images/s", target=target)
        for other, target in targets.items()
    ]


def exactly(embeddings: torch.Tensor, zones: Zones) -> np.ndarray:
    rows = np.arange(len(embeddings))
    return exact_neighbors(SearchVectors(embeddings, CPU), zones, k=K, rows=rows, memory_mb=MEMORY_MB)[0]


def named(n: int) -> str:
    return f"neighbours, {n:,} x {DIM}, k = {K}"


def measure(n: int = 100_000) -> list[timing.Ratio]:
    return [
        against_plain_tiles(12_000, 5),
        against_plain_tiles(30_000, 3),
        against_plain_tiles(n, 1),
        *against_others(n),
    ]


if __name__ == "__main__":
    size = 100_000
    if "--images" in sys.argv:
        place = sys.argv.index("--images")
        size = int(sys.argv[place + 1])
        del sys.argv[place : place + 2]
    timing.main(__doc__, lambda: measure(size))
