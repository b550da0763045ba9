"""publish/retrieval. Oracle: products in float64 of all vectors that an index has stored."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from common import parquet, provenance
from publish.build_index import main
from publish.retrieval import cosine_search, embedding_tables, inverted_file, vector_index

N, DIM = 3_000, 24


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def made_up(n: int, seed: int = 0) -> np.ndarray:
    """(n, DIM) float32 of length 1, three to a building, which has one of 30 styles."""
    rng = np.random.default_rng(seed)
    buildings = rng.normal(size=(30, DIM))[rng.integers(0, 30, -(-n // 3))]
    buildings += 0.7 * rng.normal(size=buildings.shape)
    return unit(np.repeat(buildings, 3, axis=0)[:n] + 0.4 * rng.normal(size=(n, DIM)))


def rows_of(vectors: np.ndarray, first: int = 0) -> pa.Table:
    numbers = first + np.arange(len(vectors))
    return pa.table(
        {
            "building": [f"b{number // 3}" for number in numbers],
            "image": [f"{number}.jpg" for number in numbers],
            "dataset_id": pa.array(numbers % 4, pa.int32()),
            "image_ids": [[str(number)] for number in numbers],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }
    )


def write_vectors(path, vectors: np.ndarray, first: int = 0, model: str | None = "m" * 32) -> None:
    """Rows from `first` on as generate_embeddings_from_parquet.py writes them; without a model, as others do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows_of(vectors, first)
    if model is None:
        pq.write_table(table, path)
        return
    made = provenance.record("generate_embeddings_from_parquet", {"model.weights": model}, {})
    with parquet.writer(path, table.schema, made) as out:
        out.append(table)


def by_hand(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The cosines (Q, n) in float64, -inf outside `rows`."""
    cosines = np.full((len(queries), len(vectors)), -np.inf)
    cosines[:, rows] = queries.astype(np.float64) @ vectors[rows].astype(np.float64).T
    return cosines


def assert_best(found, cosines: np.ndarray, k: int) -> None:
    """Whether `found` are the k best of each query, up to ties within 1e-6."""
    best, rows = found
    assert best.shape == rows.shape == (len(cosines), k)
    assert np.allclose(best, -np.sort(-cosines, axis=1)[:, :k], rtol=0, atol=1e-6)
    assert np.allclose(best, np.take_along_axis(cosines, rows, axis=1), rtol=0, atol=1e-6)
    assert all(len(set(one)) == k for one in rows.tolist())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of vectors in two files, exact index, ivf index)"""
    root = tmp_path_factory.mktemp("index")
    vectors = made_up(N)
    for number, first in enumerate((0, 2_000)):
        write_vectors(root / "vectors" / f"{number}.parquet", vectors[first : first + 2_000], first)
    for kind in ("exact", "ivf"):
        assert main([str(root / "vectors"), str(root / kind), "--kind", kind]) == 0
    return root / "vectors", root / "exact", root / "ivf"


@pytest.mark.parametrize("tile", [7, 1_000, 8_192])  # fewer than k, a divisor of all, and all at once
@pytest.mark.parametrize("share", [None, 0.3, 0.003])
def test_the_exact_search_is_that_of_float64(folders, tile, share, monkeypatch):
    monkeypatch.setattr(cosine_search, "TILE_ROWS", tile)
    monkeypatch.setattr(cosine_search, "TILE_QUERIES", 3)
    monkeypatch.setattr(cosine_search, "SCORES", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # each has a range, whose tiles must not overlap
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    index, queries = vector_index.open(folders[1]), made_up(8, seed=1)
    mask = None if share is None else np.random.default_rng(2).random(N) < share
    rows = np.arange(N) if mask is None else np.flatnonzero(mask)
    expected = by_hand(np.asarray(index.vectors), queries, rows)
    assert_best(index.search(queries, 20, mask), expected, min(20, len(rows)))


def test_a_search_leaves_the_threads_of_torch_as_they_were(folders):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    vector_index.open(folders[1]).search(made_up(1), 5)
    with ThreadPoolExecutor(1) as pool:  # a new thread has the process's number, not its maker's
        later = pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(before)
    assert later == 3


def test_copies_are_found_as_well(folders):
    vectors = np.tile(made_up(5), (40, 1)).astype(np.float16)
    found = cosine_search.most_similar(vectors, made_up(2, seed=1), 50)
    assert_best(found, by_hand(vectors, made_up(2, seed=1), np.arange(200)), 50)


def test_an_inverted_file_misses_as_little_as_its_record_says(folders):
    index = vector_index.open(folders[2])
    rows = np.sort(np.random.default_rng(0).choice(N, 1_000, replace=False))  # the same as were drawn to tune it
    queries = np.asarray(index.vectors[rows]).astype(np.float32)
    exact = by_hand(np.asarray(index.vectors), queries, np.arange(N))
    exact[np.arange(1_000), rows] = -np.inf
    cosines, found = index.search(queries, 101)
    for k in (10, 100):
        wanted = -np.partition(-exact, k - 1, axis=1)[:, k - 1]
        others = [one[one != own][:k] for one, own in zip(found, rows, strict=True)]
        hits = [(exact[i, one[one >= 0]] >= wanted[i] - 1e-6).sum() for i, one in enumerate(others)]
        assert sum(hits) / (1_000 * k) == pytest.approx(index.record[f"recall@{k}"], abs=1e-6)
    assert index.record["recall@10"] >= inverted_file.WANTED_RECALL
    assert 1 < index.record["nprobe"] < index.record["nlist"]  # some lists are not looked at
    looser = inverted_file.read(folders[2] / "index.faiss", index.record["nprobe"] // 2)
    assert inverted_file.tune(looser, np.asarray(index.vectors))["nprobe"] == index.record["nprobe"]
    assert np.allclose(cosines[:, 0], 1, atol=1e-3)  # itself: 11 bits


def test_a_filtered_search_is_exact_whatever_the_index(folders):
    index = vector_index.open(folders[2])
    mask, queries = np.random.default_rng(3).random(N) < 0.01, made_up(5, seed=1)
    expected = by_hand(np.asarray(index.vectors), queries, np.flatnonzero(mask))
    assert_best(index.search(queries, 10, mask), expected, 10)


def test_rows_come_with_their_columns_in_the_order_of_the_vectors(folders):
    source, exact, _ = folders
    vectors = made_up(N)
    for index in (vector_index.open(exact), vector_index.of_tables(embedding_tables.tables_at(source))):
        rows = np.array([2_999, 0, 2_000, 1_999, 0])  # of both files, one twice
        assert [row["image"] for row in index.take(rows)] == [f"{row}.jpg" for row in rows]
        expected = {"building": "b999", "image": "2999.jpg", "dataset_id": 3, "image_ids": ["2999"]}
        assert index.take(rows[:1]) == [expected]
        assert np.allclose(index.vectors, vectors, atol=1e-3)


def test_a_gpu_finds_what_the_cpu_finds(folders, cuda):
    index, queries = vector_index.open(folders[1]), made_up(8, seed=1)
    for mask in (None, np.random.default_rng(2).random(N) < 0.3):
        rows = np.arange(N) if mask is None else np.flatnonzero(mask)
        found = index.search(queries, 20, mask, torch.device("cuda"))
        assert_best(found, by_hand(np.asarray(index.vectors), queries, rows), 20)
