"""Search in an index: ours, exact and inverted, against faiss's exact indexes and a plain product of all vectors.

Vectors  made up, seed 0: buildings of 2 to 7 views in styles that about 80 views share; a view is its style, half
         as much of the building, and half as much noise. Queries are further views, which are not in the index
Size     1,000,000 x 256, 1,000 queries: about 8 minutes on two cores; --vectors 100000 for a quick look
Command  python tests/benchmarks/bench_index.py [--vectors N] [--json PATH]
Memory   N x D x 13 bytes: the vectors in float32, faiss's copies in float32 and float16, and an inverted file
"""

import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import timing  # puts the repository's root on sys.path
import torch

from common import cli, parquet, provenance, schemas
from publish.retrieval import embedding_tables, index_files, vector_index

DIM, QUERIES, ALONE = 256, 1_000, 10  # ALONE: queries that are asked one after the other
KS = (10, 100)
CPU = torch.device("cpu")


def made_up(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, DIM) vectors and (QUERIES, DIM) queries, float32 of length 1."""
    rng = np.random.default_rng(0)
    views = rng.integers(2, 8, n // 2)
    building = np.repeat(np.arange(len(views)), views)[:n]
    styles = rng.normal(size=(max(1, n // 80), DIM)).astype(np.float32)
    centres = styles[rng.integers(0, len(styles), building[-1] + 1)]
    centres += 0.5 * rng.normal(size=centres.shape).astype(np.float32)

    def seen(buildings: np.ndarray) -> np.ndarray:
        vectors = centres[buildings] + 0.5 * rng.standard_normal((len(buildings), DIM), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    vectors = np.concatenate([seen(some) for some in np.array_split(building, -(-n // 50_000))])
    return vectors, seen(rng.choice(len(centres), QUERIES))


def in_float64(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The rows (Q, 100) of the largest products in float64."""
    best, rows = torch.empty(len(queries), 0, dtype=torch.float64), torch.empty(len(queries), 0, dtype=torch.int64)
    asked = torch.from_numpy(queries).double()
    for start in range(0, len(vectors), 8_192):
        cosines, columns = (asked @ torch.from_numpy(vectors[start : start + 8_192]).double().T).topk(max(KS))
        best, order = torch.cat([best, cosines], dim=1).topk(max(KS))
        rows = torch.cat([rows, columns + start], dim=1).gather(1, order)
    return rows.numpy()


def recalls(found: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """The share of the true k most similar that was found, for each k of KS."""
    pairs = [(set(one), set(other)) for k in KS for one, other in zip(found[:, :k], truth[:, :k], strict=True)]
    hits = np.reshape([len(one & other) for one, other in pairs], (len(KS), -1)).sum(axis=1)
    return {k: float(hit / (k * len(truth))) for k, hit in zip(KS, hits, strict=True)}


def write_table(path: Path, vectors: np.ndarray) -> None:
    """The vectors as the pipeline writes them, with an id and a building."""
    fields = [("streetview_image_id", pa.string()), ("cell_id", pa.int64())]
    schema = pa.schema([*fields, ("embedding", schemas.vector(pa.float32(), DIM))])
    with parquet.writer(path, schema, provenance.record("generate_embeddings_from_parquet", {}, {})) as out:
        for start in range(0, len(vectors), 20_000):
            numbers = np.arange(start, min(start + 20_000, len(vectors)))
            rows = {"streetview_image_id": [f"0088_{n}" for n in numbers], "cell_id": numbers // 80}
            out.append(rows | {"embedding": vectors[numbers]})


def built(folder: Path, tables, kind: str) -> vector_index.VectorIndex:
    record = provenance.record("build_index", {}, {})
    with cli.Progress("build_index", "vector", tables.num_rows) as progress:
        print(index_files.write(folder, tables, kind, record, CPU, progress), flush=True)
    index = vector_index.open(folder)
    print(f"{kind}: built in {index.record['seconds']:.0f} s", flush=True)
    return index


def of_faiss(name: str, vectors: np.ndarray):
    """An exact index of faiss, and the seconds that building it took."""
    started = time.perf_counter()
    index = faiss.index_factory(DIM, name, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:100_000])
    index.add(vectors)
    seconds = time.perf_counter() - started
    print(f"faiss {name}: built in {seconds:.1f} s", flush=True)
    return index, seconds


def measure(n: int = 1_000_000) -> list[timing.Ratio]:
    vectors, queries = made_up(n)
    truth = in_float64(vectors, queries)
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch, "vectors", "0.parquet"), vectors)
        tables = embedding_tables.tables_at(Path(scratch, "vectors"))
        exact, ivf = (built(Path(scratch, kind), tables, kind) for kind in ("exact", "ivf"))
        return compare(exact, ivf, vectors, queries, truth)


def compare(exact, ivf, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> list[timing.Ratio]:
    flat, _ = of_faiss("Flat", vectors)
    halves, _ = of_faiss("SQfp16", vectors)
    searches = {
        "exact": lambda some: exact.search(some, max(KS)),
        "ivf": lambda some: ivf.search(some, max(KS)),
        "faiss Flat": lambda some: flat.search(some, max(KS)),
        "faiss SQfp16": lambda some: halves.search(some, max(KS)),
    }
    for name, search in searches.items():
        found = recalls(search(queries)[1], truth)
        print(f"{name}: " + ", ".join(f"recall@{k} {value:.4f}" for k, value in found.items()), flush=True)
        if name == "ivf":
            of_ivf = found
    alone = {
        name: lambda search=search: [search(queries[i : i + 1]) for i in range(ALONE)]
        for name, search in searches.items()
    }
    alone["float32 product"] = lambda: [vectors @ queries[i] for i in range(ALONE)]
    one = timing.seconds(alone, rounds=5)
    many = timing.seconds(
        {name: lambda search=search: search(queries) for name, search in searches.items()}, 1, warm_up=False
    )
    for name, taken in one.items():
        batch = f", of {QUERIES:,} at once {1000 * many[name][0] / QUERIES:.2f} ms" if name in many else ""
        print(f"{name}: {1000 * np.median(taken) / ALONE:.2f} ms a query{batch}", flush=True)
    what = f"search {len(vectors):,} x {DIM}"
    rows = [
        timing.ratio(
            f"{what}, exact, one query", one, "exact", other, items=ALONE, unit="queries/s", target=target
        )
        for other, target in (("float32 product", 1), ("faiss Flat", 1), ("faiss SQfp16", None))
    ]
    rows += [
        timing.ratio(f"{what}, exact, {QUERIES:,} queries", many, "exact", other, items=QUERIES, unit="queries/s")
        for other in ("faiss Flat", "faiss SQfp16")
    ]
    rows += [
        timing.ratio(f"{what}, ivf, one query", one, "ivf", "exact", items=ALONE, unit="queries/s", target=10),
        timing.ratio(f"{what}, ivf, one query", one, "ivf", "faiss Flat", items=ALONE, unit="queries/s"),
    ]
    for k, target in ((10, 1), (100, None)):
        share = of_ivf[k] / 0.99
        label = f"recall@{k} of ivf, {len(vectors):,} x {DIM}"
        rows.append(timing.Ratio(label, "0.99 wanted", of_ivf[k], "", share, share, share, target))
    size = len(vectors) * DIM * 4
    for index in (exact, ivf):
        smaller = size / index.record["bytes"]
        label = f"{index.record['kind']} index of {len(vectors):,} x {DIM}, with its rows"
        megabytes = index.record["bytes"] / 1e6
        rows.append(timing.Ratio(label, "vectors in float32", megabytes, "MB", smaller, smaller, smaller, None))
    return rows


if __name__ == "__main__":
    size = 1_000_000
    if "--vectors" in sys.argv:
        place = sys.argv.index("--vectors")
        size = int(sys.argv[place + 1])
        del sys.argv[place : place + 2]
    timing.main(__doc__, lambda: measure(size))
