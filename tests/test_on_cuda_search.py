"""The neighbour search on a simulated CUDA device. Oracle: the same search on the CPU, to the last bit: its
candidates may differ with the kernels, but the cosines that decide are of float64.
"""

import made_up_merge
import numpy as np
import pytest
import short_training
import simulated_cuda
import torch

from common import config, parquet
from common.places.zones import Zones, make_zones
from difficulty import compute_visual_neighbors
from difficulty.search.exact_search import exact_neighbors

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
N, DIM, K = 1_500, 24, 20
ANCHORS = {"a run of rows": np.arange(600, 800), "scattered rows": np.arange(0, N, 11)}


@pytest.fixture(scope="module")
def places() -> Zones:
    """Buildings of 3 images each, 11 m apart: the ignore zone holds five of them."""
    building = np.repeat(np.arange(N // 3), 3)
    return make_zones(building, building * 1e-4, np.zeros(N), 25.0)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    """Clusters, and 100 copies of one vector: ties, and more candidates for their anchors than are kept."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, DIM))[rng.integers(0, 20, N)] + 0.3 * rng.normal(size=(N, DIM))
    vectors[rng.choice(N, 100, replace=False)] = vectors[0]
    return vectors.astype(np.float16)


def search(embeddings: torch.Tensor, places: Zones, rows: np.ndarray, device: torch.device, memory_mb=1.0):
    return exact_neighbors(embeddings, places, k=K, rows=rows, memory_mb=memory_mb, device=device)


@pytest.mark.parametrize("bf16", [True, False], ids=["with bfloat16", "without bfloat16"])
@pytest.mark.parametrize("home", [CUDA, CPU], ids=["embeddings on the device", "embeddings on the host"])
@pytest.mark.parametrize("rows", ANCHORS.values(), ids=ANCHORS)
def test_neighbours_are_those_of_the_cpu(embeddings, places, rows, home, bf16):
    expected = search(torch.from_numpy(embeddings), places, rows, CPU)
    with simulated_cuda.installed(bf16=bf16) as cuda:
        found = search(torch.from_numpy(embeddings).to(home), places, rows, CUDA)
        assert not cuda.races
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tiles_of_a_few_anchors_give_the_same(cuda, embeddings, places):
    there, rows = torch.from_numpy(embeddings).to(CUDA), np.arange(60)
    large, small = (search(there, places, rows, CUDA, memory_mb) for memory_mb in (64, 0.2))
    assert cuda.peak < 64 * 2**20 + 4 * embeddings.nbytes
    for ours, theirs in zip(large, small, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_stage_writes_what_it_writes_on_the_cpu(tmp_path):
    made_up_merge.write_merge(tmp_path / "data" / "merged")
    cfg = config.load(None, short_training.settings(tmp_path))

    def difficulty():
        assert compute_visual_neighbors.main([*short_training.flags(tmp_path), "--overwrite"]) == 0
        return parquet.read(cfg.paths.difficulty_dir / "difficulty_metadata.parquet")

    expected = difficulty()
    with simulated_cuda.installed() as cuda:
        assert difficulty().equals(expected)
        assert cuda.counts.launches
        assert not cuda.races
