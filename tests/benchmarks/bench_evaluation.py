"""Recall@k and mAP@R of all images against all others: counting in tiles, against a loop over the queries.

The loop is what most evaluations do: one query's scores, the best 1,000 of them (or all, sorted), a look at which
are of its building. It is timed on a sample of the queries, ours on all of them, and its time scaled up.

Command  python tests/benchmarks/bench_evaluation.py [--json PATH]
         python tests/benchmarks/bench_evaluation.py --rows 200000
             train/evaluate.py itself, as a process, on a file of so many images: seconds and peak memory
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

from common import geo, parquet, provenance, schemas, zones
from train import metrics

ROWS, DIM, SAMPLE = 50_000, 256, 200
METRES_APART = 12  # buildings along a street: the ignore zone of 25 m holds two on either side
MEMORY_MB = 1024


class Data:
    """Unit vectors of buildings of 2 to 7 views that stand in a row, and what a loop over the queries finds."""

    def __init__(self, rows: int):
        rng = np.random.default_rng(0)
        self.building = np.repeat(np.arange(rows), rng.integers(2, 8, rows))[:rows]
        looks = rng.normal(size=(self.building[-1] + 1, DIM)).astype(np.float32)
        vectors = looks[self.building] + 1.7 * rng.normal(size=(rows, DIM)).astype(np.float32)
        self.vectors = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        self.lat = 10 + self.building * METRES_APART / geo.METRES_PER_DEGREE
        self.junk = zones.ignored_rows(self.building, self.lat, np.zeros(rows), 25.0)

    def ours(self) -> metrics.PerQuery:
        return metrics.retrieval(
            self.vectors,
            self.vectors,
            query_building=self.building,
            gallery_building=self.building,
            self_rows=np.arange(len(self.building)),
            junk=self.junk,
            memory_mb=MEMORY_MB,
            device=torch.device("cpu"),
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


def write_embeddings(path: Path, rows: int) -> None:
    """A file as `evaluate.py --embeddings` reads it; streets of a kilometre are the cells of the map."""
    data = Data(rows)
    made = provenance.record("bench_evaluation", {}, {})
    numbers, zeros = np.arange(rows), np.zeros(rows)
    angles = np.random.default_rng(1).uniform(0, 360, rows)
    with parquet.writer(path, schemas.merged(DIM), made) as out:
        out.append(
            {
                "building_id": [f"0088_{b}" for b in data.building],
                "streetview_image_id": [f"0088_{n}" for n in numbers],
                **dict.fromkeys(["dataset_id"], zeros.astype(np.int32) + 88),
                **dict.fromkeys(["target_id"], data.building),
                **dict.fromkeys(["patch_id", "street_view_id"], numbers),
                **dict.fromkeys(["target_lat", "camera_lat"], data.lat),
                **dict.fromkeys(["target_lon", "camera_lon", "target_height", "pitch"], zeros),
                "heading": angles,
                "distance": zeros + 10,
                "cell_id": geo.cell_ids(data.lat, zeros, 1000.0),
                "tar_file": ["0088.tar"] * rows,
                **dict.fromkeys(["image_offset", "image_size"], numbers * 0),
                "embedding": data.vectors.numpy().astype(np.float16),
            }
        )


def run_evaluation(rows: int) -> None:
    """Evaluate so many images in a process of its own; print how long it took and its greatest resident size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.parquet"
        write_embeddings(path, rows)
        script = Path(__file__).resolve().parents[2] / "train" / "evaluate.py"
        command = [sys.executable, str(script), "--embeddings", str(path), "--set", f"paths.root={folder}"]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{timing.machine()}\n{rows:,} x {rows:,} x {DIM}: {seconds:.0f} s, at most {peak:.2f} GiB resident")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rows"]:
        run_evaluation(int(sys.argv[2]))
    else:
        timing.main(__doc__, measure)
