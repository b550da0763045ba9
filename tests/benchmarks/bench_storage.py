"""Embeddings to Parquet and back, 100,000 x 768 float16: common/parquet.py against columns of lists in pandas.

Each reading is the first of a new process, as in a stage. Repeated in one process, pandas fills memory that it has
used before, without the kernel clearing it: a fifth of the time, which no stage ever sees.

Command  python tests/benchmarks/bench_storage.py
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import timing  # puts the repository's root on sys.path

from common import parquet, provenance, schemas

ROWS, DIM = 100_000, 768
BASELINE = "pandas lists, snappy"
SCHEMA = pa.schema([("id", pa.int64()), ("embedding", schemas.vector(pa.float16(), DIM))])


def read(path: Path) -> np.ndarray:
    return parquet.read_matrix(path, "embedding")


def read_lists(path: Path) -> np.ndarray:
    return np.stack(pd.read_parquet(path)["embedding"].to_numpy())


def timed(way, path: Path) -> float:
    """Seconds that it takes to read the file, imports aside."""
    started = time.perf_counter()
    way(path)
    return time.perf_counter() - started


def measure() -> list[timing.Ratio]:
    embeddings = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float16)
    ids, made = np.arange(ROWS), provenance.record("bench_storage", {}, {})
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.parquet", Path(folder) / "lists.parquet"

        def write() -> None:
            with parquet.writer(ours, SCHEMA, made) as out:
                out.append({"id": ids, "embedding": embeddings})

        def write_lists() -> None:
            lists = embeddings.astype(np.float32).tolist()
            pd.DataFrame({"id": ids, "embedding": lists}).to_parquet(theirs, compression="snappy")

        written = timing.seconds({"ours": write, BASELINE: write_lists}, rounds=3, warm_up=False)
        assert np.array_equal(read(ours), read_lists(theirs))
        found = {"ours": [], BASELINE: []}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(5):
                found["ours"].append(pool.apply(timed, (read, ours)))
                found[BASELINE].append(pool.apply(timed, (read_lists, theirs)))
    what = f"{ROWS:,} x {DIM} float16"
    return [
        timing.ratio(f"write {what} to Parquet", written, "ours", BASELINE, target=10),
        timing.ratio(f"read {what} from Parquet", found, "ours", BASELINE, target=10),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
