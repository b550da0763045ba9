"""Embeddings to Parquet and back, 100,000 x 768 float16: common/parquet.py against columns of lists in pandas.

Each is the first reading or writing of a new process, as in a stage. Repeated in one process, pandas fills memory
that it has used before, without the kernel clearing it: a fifth of its time to read, which no stage ever sees. A
writing begins with an idle disk: ours forces its file to the disk, and pandas leaves 470 MB for later, which would
be written while ours is timed.

Command  python tests/benchmarks/bench_storage.py
"""

import multiprocessing
import os
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


def made_up() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float16)


def write(path: Path) -> float:
    """Seconds that it takes to write the file, imports and the embeddings aside."""
    embeddings, ids, made = made_up(), np.arange(ROWS), provenance.record("bench_storage", {}, {})
    started = time.perf_counter()
    with parquet.writer(path, SCHEMA, made) as out:
        out.append({"id": ids, "embedding": embeddings})
    return time.perf_counter() - started


def write_lists(path: Path) -> float:
    embeddings, ids = made_up(), np.arange(ROWS)
    started = time.perf_counter()
    lists = embeddings.astype(np.float32).tolist()
    pd.DataFrame({"id": ids, "embedding": lists}).to_parquet(path, compression="snappy")
    return time.perf_counter() - started


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
    written: dict[str, list[float]] = {"ours": [], BASELINE: []}
    found: dict[str, list[float]] = {"ours": [], BASELINE: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        ours, theirs = Path(folder) / "ours.parquet", Path(folder) / "lists.parquet"
        for _ in range(5):
            for name, way, path in (("ours", write, ours), (BASELINE, write_lists, theirs)):
                path.unlink(missing_ok=True)
                os.sync()
                written[name].append(pool.apply(way, (path,)))
        assert np.array_equal(read(ours), read_lists(theirs))
        os.sync()
        for _ in range(9):
            found["ours"].append(pool.apply(timed, (read, ours)))
            found[BASELINE].append(pool.apply(timed, (read_lists, theirs)))
    what = f"{ROWS:,} x {DIM} float16"
    return [
        timing.ratio(f"write {what} to Parquet", written, "ours", BASELINE, target=10),
        timing.ratio(f"read {what} from Parquet", found, "ours", BASELINE, target=10),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
