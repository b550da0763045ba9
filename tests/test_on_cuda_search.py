"""The neighbour search on a simulated CUDA device. Oracle: the same search on the CPU."""

import made_up_merge
import numpy as np
import pytest
import short_training
import simulated_cuda
import torch
from conftest import paths_below

from common import config, devices, parquet
from common.places.zones import Zones, make_zones
from difficulty import compute_visual_neighbors
from difficulty.search import exact_search
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
N, DIM, K = 1_500, 24, 20
ANCHORS = {"a run of rows": np.arange(600, 800), "scattered rows": np.arange(0, N, 11)}
HOMES = pytest.mark.parametrize("home", [CUDA, CPU], ids=["embeddings on the device", "embeddings on the host"])
KERNELS = 15  # of a tile, with the conversion of its rows


@pytest.fixture(scope="module")
def places() -> Zones:
    """Buildings of 3 images each, 11 m apart: the ignore zone holds five of them."""
    building = np.repeat(np.arange(N // 3), 3)
    return make_zones(building, building * 1e-4, np.zeros(N), 25.0)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    """Clusters, and 400 copies of one vector: ties, and more candidates for their anchors than are kept."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, DIM))[rng.integers(0, 20, N)] + 0.3 * rng.normal(size=(N, DIM))
    vectors[rng.choice(N, 400, replace=False)] = vectors[0]
    return vectors.astype(np.float16)


def search(embeddings: torch.Tensor, places: Zones, rows: np.ndarray, device: torch.device, memory_mb=1.0):
    return exact_neighbors(SearchVectors(embeddings, device), places, k=K, rows=rows, memory_mb=memory_mb)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)  # of float64, or of sums in float32


@pytest.mark.parametrize("bf16", [True, False], ids=["with bfloat16", "without bfloat16"])
@HOMES
@pytest.mark.parametrize("rows", ANCHORS.values(), ids=ANCHORS)
def test_neighbours_are_those_of_the_cpu(embeddings, places, rows, home, bf16):
    expected = search(torch.from_numpy(embeddings), places, rows, CPU)
    with simulated_cuda.installed(bf16=bf16) as cuda:
        assert_same(search(torch.from_numpy(embeddings).to(home), places, rows, CUDA), expected)
        assert not cuda.races


def test_tiles_of_a_few_anchors_give_the_same(cuda, embeddings, places):
    there, rows = torch.from_numpy(embeddings).to(CUDA), np.arange(60)
    large, small = (search(there, places, rows, CUDA, memory_mb) for memory_mb in (64, 0.2))
    assert cuda.peak < 64 * 2**20 + 4 * embeddings.nbytes
    assert_same(small, large)


@HOMES
def test_a_tile_takes_few_kernels_and_the_host_does_not_wait_for_them(cuda, embeddings, places, home):
    vectors = SearchVectors(torch.from_numpy(embeddings).to(home), CUDA)

    def counts(size: int) -> np.ndarray:
        """Kernels and waits of N / size tiles, rounded up."""
        before = np.array([cuda.counts.launches, sum(cuda.counts.waits.values())])
        exact_search._collect(vectors, places, np.arange(40), 30, size)
        return np.array([cuda.counts.launches, sum(cuda.counts.waits.values())]) - before

    kernels, waits = (counts(96) - counts(480)) / 12  # 16 tiles and 4
    assert kernels <= KERNELS
    assert waits == (0 if home == CUDA else 1)  # until a pinned buffer is free again


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.67, 0.9, 1.5])
def test_embeddings_of_any_size_are_searched_within_the_device(places, share):
    vectors = np.random.default_rng(0).normal(size=(80_000, 128)).astype(np.float16)
    building = np.arange(80_000)
    places = make_zones(building, building * 1e-3, np.zeros(80_000), 25.0)
    rows = np.arange(0, 80_000, 80)
    expected = search(torch.from_numpy(vectors), places, rows, CPU, memory_mb=64)
    settings = config.load(None, []).infrastructure
    total = int(vectors.nbytes / share)
    with simulated_cuda.installed(total) as cuda:
        embeddings = devices.place(vectors, CUDA)
        assert embeddings.is_cuda == (share <= 2 / 3)
        assert devices.search_memory_mb(settings, CUDA) == 256  # at least
        for part in np.array_split(rows, 2):  # the second finds the memory that the first has freed
            found = search(embeddings, places, part, CUDA, memory_mb=8)
            assert_same(found, [array[np.isin(rows, part)] for array in expected])
            assert devices.free_bytes(CUDA) == total - cuda.allocated
        held = len(vectors) * 8 + (vectors.nbytes if embeddings.is_cuda else 0)
        # 5.5 MB if a tile were kept while the next is made; from the host, blocks of 8,192 rows to be measured
        assert cuda.peak <= held + (5 if embeddings.is_cuda else 8) * 2**20
        assert not cuda.races


def test_the_stage_writes_what_it_writes_on_the_cpu(tmp_path):
    made_up_merge.write_merge(paths_below(tmp_path).merged_dir)
    cfg = config.load(None, short_training.settings(tmp_path))

    def difficulty():
        assert compute_visual_neighbors.main([*short_training.flags(tmp_path), "--overwrite"]) == 0
        return parquet.read(cfg.paths.difficulty_dir / "difficulty_metadata.parquet")

    expected = difficulty()
    with simulated_cuda.installed() as cuda:
        found = difficulty()
        assert cuda.counts.launches
        assert not cuda.races
    for name in ("streetview_image_id", "neighbor_rows", "band_offsets"):
        assert found[name].equals(expected[name]), name
