"""Evaluation on a CUDA device that has no room for the vectors: they stay on the host and cross the bus in tiles.

Oracle: the same on the CPU, and the memory of the simulated device (tests/simulated_cuda.py).
"""

import json

import numpy as np
import pytest
import simulated_cuda
import small_merge
import torch
from torch.nn import functional as F

from common import cli, config, devices
from common.places import zones
from train import evaluate
from train.evaluation import building_level, heads, metrics, metrics_json

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MB = 2**20


def find_matches(gallery: torch.Tensor, device: torch.device, memory_mb: int) -> metrics.Matches:
    """Of the first 1,000 rows, in buildings of four; each has two rows of junk."""
    building, rows = np.arange(len(gallery)) // 4, np.arange(1_000)
    return metrics.find_matches(
        gallery[:1_000], gallery, query_building=building[rows], gallery_building=building, self_rows=rows,
        junk=(np.arange(0, 2_001, 2), np.repeat(rows, 2) + np.tile([8, 9], 1_000)),
        memory_mb=memory_mb, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 0.6, 0.67, 0.9, 1.5])
def test_a_gallery_of_any_size_is_ranked_within_the_device_as_on_the_cpu(share):
    torch.manual_seed(0)
    looks, views = (torch.randint(-3, 4, (n, 128)) for n in (10_000, 40_000))
    gallery = (3 * looks.repeat_interleave(4, dim=0) + 4 * views).float()  # products are exact, and many are equal
    expected = find_matches(gallery, CPU, 16)
    total = int(gallery.nbytes / share)
    memory_mb = total // 4 // MB  # as "auto"
    with simulated_cuda.installed(total) as cuda:
        found = find_matches(gallery, CUDA, memory_mb)
        assert cuda.peak <= memory_mb * MB + (gallery.nbytes if share <= 2 / 3 else 0)
        assert not cuda.races
    for name in ("query", "row", "ahead", "score", "wrong_score"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    looks_as_alike = (gallery[:1_000] * gallery[found.wrong_row]).sum(dim=1)  # of equally similar rows, any
    np.testing.assert_array_equal(looks_as_alike, expected.wrong_score)
    assert 0.1 < metrics.per_query(expected).average_precision_at_r.mean() < 0.9


@pytest.mark.parametrize("share", [0.66, 1.5])
def test_buildings_are_ranked_within_the_device_as_on_the_cpu(share, monkeypatch):
    monkeypatch.setattr(heads, "EMBED_ROWS", 500)
    monkeypatch.setattr(building_level, "_BLOCK_ROWS", 500)
    rng = np.random.default_rng(0)
    building = np.repeat(np.arange(12_000), rng.integers(1, 8, 12_000))
    vectors = rng.normal(size=(12_000, 64))[building] + 2 * rng.normal(size=(len(building), 64))
    vectors = F.normalize(torch.from_numpy(vectors).float(), dim=1)
    around = zones.make_zones(building, building * 1e-4, np.zeros(len(building)), 25.0)

    def ranks(placed: torch.Tensor, memory_mb: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        one = building_level.image_to_building(placed, around, 3_000, memory_mb, device, quiet)
        return one, building_level.half_to_half(placed, around, 3_000, 0, memory_mb, device, quiet)

    quiet = cli.Progress("evaluate", "ranking")
    expected = ranks(vectors, 16, CPU)
    with simulated_cuda.installed(int(vectors.nbytes / share)) as cuda:
        placed = heads.by_blocks(lambda x: x, vectors, 64, CUDA)  # on the device, if it has the room
        assert placed.device.type == ("cuda" if share <= 2 / 3 else "cpu")
        found = ranks(placed, devices.free_bytes(CUDA) // 4 // MB, CUDA)  # as "auto"
        assert cuda.counts.launches
        assert not cuda.races
        del placed
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert 0.05 < np.mean(theirs == 1) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_take_their_own_memory_and_a_block(dtype, monkeypatch):
    """Concatenated in the end, as they once were, they took it twice."""
    monkeypatch.setattr(heads, "EMBED_ROWS", 1_000)
    embeddings = torch.randn(50_000, 32).half()
    size, block = 50_000 * 32 * dtype.itemsize, 1_000 * 32 * 4
    for room in (4 * size, size):  # two thirds of which may be taken
        with simulated_cuda.installed(room) as cuda:
            vectors = heads.by_blocks(lambda x: F.normalize(x, dim=1), embeddings, 32, CUDA, dtype)
            assert vectors.device.type == ("cuda" if room > size else "cpu")
            assert cuda.peak <= 4 * block + (size if room > size else 0)
            assert torch.equal(vectors.cpu(), F.normalize(embeddings.float(), dim=1).to(dtype))
            del vectors


def test_an_evaluation_on_a_device_without_room_gives_the_cpus_figures(tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(heads, "EMBED_ROWS", 50)
    settings = [f"paths.root={tmp_path}", "evaluation.gallery=all", "evaluation.bootstrap_samples=20"]
    cfg = config.load(None, settings)
    small_merge.write_merge(cfg)
    small_merge.write_checkpoint(cfg, seed=1)
    figures = {}
    for device in ("cpu", "cuda"):
        asked = [*settings, f"infrastructure.device={device}", f"paths.evaluation_dir={device}"]
        flags = [flag for setting in asked for flag in ("--set", setting)]
        with simulated_cuda.installed(2**40) as cuda:
            monkeypatch.setattr("common.devices.fits", lambda size, device: device.type != "cuda")
            assert evaluate.main(flags) == 0
            assert (cuda.counts.launches > 0) == (device == "cuda")
            assert cuda.counts.to_device_bytes == 0 or device == "cuda"
        figures[device] = json.loads((tmp_path / device / "metrics.json").read_text())
    for key in ("methods", "building_level"):
        assert metrics_json.flat(figures["cuda"][key]) == pytest.approx(
            metrics_json.flat(figures["cpu"][key]), abs=1e-9
        )
