"""Evaluation on a simulated CUDA device. Oracle: the CPU. Tiles have other sizes there, and products
of other sizes round differently: similarities are equal to 1e-6. So are the ranks, as no two are that close here.
"""

import json

import numpy as np
import pytest
import simulated_cuda
import small_evaluation
import small_merge
import torch

from common import config
from train.evaluation import heads, metrics

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
Q, G, DIM = 300, 5_000, 16


@pytest.fixture(scope="module")
def ranking():
    """Arguments of find_matches: queries that are rows of the gallery, with 5 rows a building and some junk."""
    rng = np.random.default_rng(0)
    building = rng.permutation(np.repeat(np.arange(G // 5), 5))
    vectors = rng.normal(size=(G // 5, DIM))[building] + 1.5 * rng.normal(size=(G, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = np.sort(rng.choice(G, Q, replace=False))
    junk = np.arange(0, 3 * Q + 1, 3), np.sort(rng.integers(0, G, (Q, 3)), axis=1).ravel()
    return {
        "queries": vectors[rows],
        "gallery": vectors,
        "query_building": building[rows],
        "gallery_building": building,
        "self_rows": rows,
        "junk": junk,
    }


def rank(ranking: dict, device: torch.device, memory_mb: int = 1) -> metrics.Matches:
    rest = {name: value for name, value in ranking.items() if name not in ("queries", "gallery")}
    return metrics.find_matches(ranking["queries"], ranking["gallery"], **rest, memory_mb=memory_mb, device=device)


@pytest.mark.parametrize("largest", [(64, 1024), (4096, 32_768)], ids=["many tiles", "few tiles"])
def test_ranks_are_those_of_the_cpu(cuda, ranking, monkeypatch, largest):
    monkeypatch.setitem(metrics._LARGEST_TILE, "cuda", largest)
    ours, theirs = rank(ranking, CUDA), rank(ranking, CPU)
    for name in ("query", "row", "ahead", "wrong_row"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for name in ("score", "wrong_score"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)


@pytest.mark.parametrize("width", [1024, 2048, 5120])
def test_a_tile_of_queries_costs_no_more_kernels_and_waits(cuda, ranking, monkeypatch, width):
    costs, rank_tile = [], metrics._rank_tile

    def counted(*arguments):
        cuda.reset()
        result = rank_tile(*arguments)
        costs.append(cuda.reset())
        return result

    monkeypatch.setattr(metrics, "_rank_tile", counted)
    monkeypatch.setitem(metrics._LARGEST_TILE, "cuda", (64, width))
    rank(ranking, CUDA, memory_mb=4)
    tiles, matches = -(-G // width), 4  # of the gallery; of each query
    assert len(costs) > 1
    for cost in costs:
        assert cost.launches <= 10 + tiles * (15 + 4 * matches)
        assert cost.waits == {
            "copy from pageable memory": 6,  # the order of the queries; pairs (twice two); the matches' scores
            "index on the host": 2,  # where those go
            "copy to the host": tiles + 3,  # the matches' scores; what is ahead; the best wrong rows and scores
        }


def test_vectors_of_a_head_and_of_a_baseline_are_those_of_the_cpu(cuda):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(500, DIM)).astype(np.float16)
    torch.manual_seed(0)
    head = heads.ProjectionHead(DIM, 32, 8)
    head.gain.data.fill_(0.5)
    mean, projection = rng.normal(size=DIM), rng.normal(size=(8, DIM))
    for vectors_on in (
        lambda device: heads.embed(head, embeddings, device),
        lambda device: heads.project(embeddings, mean, projection, device),
    ):
        ours, theirs = vectors_on(CUDA), vectors_on(CPU)
        assert ours.device.type == "cuda"
        assert torch.equal(ours.cpu(), theirs)  # of blocks of the same size


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("gallery", ["test", "all"])
def test_the_stage_finds_the_figures_of_the_cpu(tmp_path, gallery):
    cfg = config.load(None, [f"paths.root={tmp_path}", "evaluation.bootstrap_samples=60"])
    small_merge.write_merge(cfg)
    small_merge.write_checkpoint(cfg, seed=1)

    def figures() -> dict:
        assert small_evaluation.run(cfg, "--overwrite", "--set", f"evaluation.gallery={gallery}") == 0
        found = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())
        return {name: value for name, value in found.items() if name != "provenance"}

    expected = figures()
    with simulated_cuda.installed() as cuda:
        ours = figures()
        assert cuda.counts.launches
        assert not cuda.races
    assert ours == expected
