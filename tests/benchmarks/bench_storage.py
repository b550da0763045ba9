"""Embeddings to Parquet and back, 100,000 x 768 float16: common/parquet.py against columns of lists in pandas.

Command  python tests/benchmarks/bench_storage.py
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import timing  # puts the repository's root on sys.path

from common import parquet, provenance, schemas

ROWS, DIM = 100_000, 768
SCHEMA = pa.schema([("id", pa.int64()), ("embedding", schemas.vector(pa.float16(), DIM))])


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

        def read() -> np.ndarray:
            return parquet.read_matrix(ours, "embedding")

        def read_lists() -> np.ndarray:
            return np.stack(pd.read_parquet(theirs)["embedding"].to_numpy())

        baseline = "pandas lists, snappy"
        written = timing.seconds({"ours": write, baseline: write_lists}, rounds=3, warm_up=False)
        assert np.array_equal(read(), read_lists())
        found = timing.seconds({"ours": read, baseline: read_lists}, rounds=5)
    what = f"{ROWS:,} x {DIM} float16"
    return [
        timing.ratio(f"write {what} to Parquet", written, "ours", baseline, target=10),
        timing.ratio(f"read {what} from Parquet", found, "ours", baseline, target=10),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
