"""Recall@k and mAP@R of all images against all others: counting in tiles, against a loop over the queries.

The loop is what most evaluations do: one query's scores, the best 1,000 of them (or all, sorted), a look at which
are of its building. It is timed on a sample of the queries, ours on all of them, and its time scaled up.

Command  python tests/benchmarks/bench_evaluation.py [--json PATH]
         python tests/benchmarks/bench_evaluation.py --rows 200000
             train/evaluate.py itself, as a process, on so many test images: seconds and peak memory
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timing  # before what lies in the repository: it puts that on the path
import torch
from small_merge import MODEL, write_checkpoint

from common import config, parquet, provenance, schemas
from common.places import geo, zones
from train.evaluation import metrics

ROWS, DIM, SAMPLE = 50_000, 256, 200
METRES_APART = 12  # buildings along a street: the ignore zone of 25 m holds two on either side
MEMORY_MB = 1024
CPU = torch.device("cpu")


class Data:
    """Unit vectors of buildings of 2 to 7 views that stand in a row, and what a loop over the queries finds."""

    def __init__(self, rows: int):
        rng = np.random.default_rng(0)
        self.building = np.repeat(np.arange(rows), rng.integers(2, 8, rows))[:rows]
        looks = rng.normal(size=(self.building[-1] + 1, DIM)).astype(np.float32)
        vectors = looks[self.building] + 1.7 * rng.normal(size=(rows, DIM)).astype(np.float32)
        self.vectors = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        self.lat = 10 + self.building * METRES_APART / geo.METRES_PER_DEGREE
        around = zones.make_zones(self.building, self.lat, np.zeros(rows), 25.0)
        self.junk = around.rows_of(np.arange(rows), own=False)

    def ours(self, vectors: torch.Tensor | None = None, device: torch.device = CPU) -> metrics.PerQuery:
        """On the device, of the vectors, or of a copy of them elsewhere."""
        vectors = self.vectors if vectors is None else vectors
        return metrics.retrieval(
            vectors,
            vectors,
            query_building=self.building,
            gallery_building=self.building,
            self_rows=np.arange(len(self.building)),
            junk=self.junk,
            memory_mb=MEMORY_MB,
            device=device,
        )

    def loop(self, queries: np.ndarray, best: int) -> np.ndarray:
        """Recall at each k, and mAP@R: each query's product, its `best` highest scores, the hits among them."""
        indptr, indices = self.junk
        building, found = torch.from_numpy(self.building), []
        for query in queries.tolist():
            scores = self.vectors @ self.vectors[query]
            scores[indices[indptr[query] : indptr[query + 1]]] = -torch.inf
            scores[query] = -torch.inf
            same = building == building[query]
            hits, matches = same[scores.topk(best).indices], int(same.sum()) - 1
            if matches:
                precisions = hits.cumsum(0) / torch.arange(1, best + 1)
                precision = (precisions * hits)[:matches].sum() / matches
                found.append([*(hits[:k].any() for k in metrics.RECALL_AT), precision])
        return np.array(found, float).mean(axis=0)


def measure() -> list[timing.Ratio]:
    """Ratios of the times per query."""
    data, sample = Data(ROWS), np.linspace(0, ROWS - 1, SAMPLE).astype(int)
    expected = metrics.summarize(data.ours().select(sample))
    np.testing.assert_allclose(data.loop(sample, 1000), list(expected.values())[:6], atol=1e-6)
    loops = {"loop, top 1,000": 1000, "loop, all sorted": ROWS}
    ways = {name: lambda best=best: data.loop(sample, best) for name, best in loops.items()}
    taken = timing.seconds({"ours": data.ours, **ways}, rounds=3, warm_up=False)
    for name in loops:
        taken[name] = [seconds * ROWS / SAMPLE for seconds in taken[name]]
    what = f"recall@k and mAP@R, 50k x 50k ({SAMPLE} looped)"
    return [timing.ratio(what, taken, "ours", name, items=ROWS, unit="queries/s", target=8) for name in loops]


def write_split(cfg, split: str, rows: int, first: int) -> None:
    """merged/<split>.parquet of so many images, its ids and its street beginning at `first`; the cells of the map
    are streets of a kilometre."""
    data = Data(rows)
    lat, numbers, zeros = data.lat + first / 1e5, first + np.arange(rows), np.zeros(rows)
    made = provenance.record("merge_and_split", {}, {})
    with parquet.writer(cfg.paths.merged_dir / f"{split}.parquet", schemas.merged(DIM), made) as out:
        out.facts["embedding_model"] = {**MODEL, "dim": DIM}
        out.append(
            {
                "building_id": [f"0088_{b}" for b in first + data.building],
                "streetview_image_id": [f"0088_{n}" for n in numbers],
                **dict.fromkeys(["dataset_id"], zeros.astype(np.int32) + 88),
                **dict.fromkeys(["target_id"], first + data.building),
                **dict.fromkeys(["patch_id", "street_view_id"], numbers),
                **dict.fromkeys(["target_lat", "camera_lat"], lat),
                **dict.fromkeys(["target_lon", "camera_lon", "target_height", "pitch"], zeros),
                "heading": np.random.default_rng(1).uniform(0, 360, rows),
                "distance": zeros + 10,
                "cell_id": geo.cell_ids(lat, zeros, 1000.0),
                "tar_file": ["0088.tar"] * rows,
                **dict.fromkeys(["image_offset", "image_size"], numbers * 0),
                "embedding": data.vectors.numpy().astype(np.float16),
            }
        )


def run_evaluation(rows: int) -> None:
    """Evaluate a test split of so many images in a process of its own; print how long it took and its greatest
    resident size."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config.load(None, [f"paths.root={folder}"])
        for split, size, first in (("test", rows, 0), ("train", 5_000, 10**6), ("val", 5_000, 2 * 10**6)):
            write_split(cfg, split, size, first)
        write_checkpoint(cfg, seed=1, hidden=512, out=DIM)
        script = Path(__file__).resolve().parents[2] / "train" / "evaluate.py"
        started = time.monotonic()
        subprocess.run([sys.executable, str(script), "--set", f"paths.root={folder}"], check=True)
        seconds = time.monotonic() - started
        page = (cfg.paths.evaluation_dir / "report.html").stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{timing.machine()}\n{rows:,} x {rows:,} x {DIM}, four methods, breakdowns, report ({page:.1f} MB): "
        f"{seconds:.0f} s, at most {peak:.2f} GiB resident"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        run_evaluation(int(sys.argv[2]))
    else:
        timing.main(__doc__, measure)
