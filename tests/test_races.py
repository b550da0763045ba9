"""Races in the training feed, the generation loop and the search: none as they are, and with a line of theirs
taken out those that the line prevents. So the simulated device sees in real code what it is for.
"""

import numpy as np
import pytest
import torch
from embedding_setup import photographs
from mutations import mutated
from simulated_cuda import MixedDevices

from common import config, devices
from difficulty.search import search_vectors
from generate import loop, pixels
from train import datasets
from train.sampling import feed

CUDA = torch.device("cuda")


def make_rows() -> datasets.TrainRows:
    """100 buildings of 4 images each, with 20 neighbours."""
    rng = np.random.default_rng(0)
    building = np.repeat(np.arange(100), 4)
    columns = {"target_lat": building * 0.01, "target_lon": np.zeros(400), "street_view_id": np.arange(400)}
    neighbors = rng.integers(0, 400, (400, 20)).astype(np.int32)
    offsets = np.tile(np.array([0, 5, 10, 20], np.uint8), (400, 1))
    embeddings = rng.normal(size=(400, 16)).astype(np.float16)
    return datasets.make_rows(embeddings, neighbors, offsets, building, columns, 25.0, CUDA)


def take_steps(module, reads_reward: bool = True) -> None:
    """Five steps of a Feed as training takes them: something is computed of a batch, its reward is read, and the
    next batch is drawn while the device still computes."""
    ahead, arms = module.Feed(make_rows(), 32, 4, 0), np.zeros(4, np.int64)
    weights = torch.randn(16, 8, device=CUDA)
    ahead.draw(0, arms)
    for step in range(5):
        batch, embeddings = ahead.take()
        vectors = embeddings.float() @ weights
        read = module.reading((vectors @ vectors.T).sum())
        later = embeddings * 2
        if reads_reward:
            assert np.isfinite(read())
        if step < 4:
            ahead.draw(step + 1, arms)
        del batch, embeddings, vectors, later


@pytest.fixture(params=["on the device", "on the host"])
def place(request, monkeypatch):
    """Where the embeddings are."""
    monkeypatch.setattr(devices, "fits", lambda size, device: request.param == "on the device")
    return request.param


OF_FEED = {
    "current.wait_stream(self._stream)": "reads what",
    "tensor.record_stream(current)": "is freed while",
    "torch.cuda.synchronize(rows.device)": "reads what",
    "copied.synchronize()": "the host reads a pinned buffer",
}


def test_the_feed_as_it_is_has_no_race(cuda, place):
    take_steps(feed)


@pytest.mark.parametrize(("line", "found"), OF_FEED.items(), ids=OF_FEED)
def test_a_feed_without_one_of_its_lines_has_one(racing_cuda, place, line, found):
    take_steps(mutated(feed, line, "pass"))
    assert any(found in race for race in racing_cuda.take_races())


@pytest.mark.parametrize("reads_reward", [True, False])
def test_a_pinned_buffer_used_again_before_it_was_copied_is_found(racing_cuda, monkeypatch, reads_reward):
    monkeypatch.setattr(devices, "fits", lambda size, device: False)
    line = "batch = self.sampler.draw(step, arms)"  # which waits for the stream that copies
    take_steps(mutated(feed, line, f"self._pinned.zero_(); {line}"), reads_reward)
    expected = [] if reads_reward else ["the host writes a pinned buffer while a copy may be under way"]
    assert racing_cuda.take_races() == expected  # the reward comes after the copy


def test_a_sampler_with_a_generator_of_the_cpu_is_refused(cuda, monkeypatch):
    module = mutated(datasets, "torch.Generator(rows.device)", "torch.Generator()")
    monkeypatch.setattr(feed, "Sampler", module.Sampler)
    with pytest.raises(MixedDevices, match="rand: a generator of cpu for a tensor on cuda"):
        take_steps(feed)


def embed(module, jpegs: list[bytes]) -> np.ndarray:
    """Images in batches of two chunks through the loop, with a "model" that gives their mean colour."""
    preprocessing = pixels.Preprocessing(None, (16, 16), None, "bilinear", False, 1.0, (0.0,) * 3, (1.0,) * 3)
    overrides = ["infrastructure.embedding_batch_size=16", "infrastructure.workers=2"]
    settings = config.load(None, overrides).infrastructure
    job = module.Job("a", len(jpegs), lambda start, stop: jpegs[start:stop])
    progress = module.GenerationProgress("test", "image")
    (result,) = module.embed([job], lambda x: x.mean(dim=(2, 3)), preprocessing, CUDA, settings, progress)
    return result.vectors


JPEGS = photographs(48)
OF_LOOP = {
    "current.wait_event(chunk.ready)": ("pass", "reads what"),
    "chunk.pixels.record_stream(current)": ("pass", "is freed while"),
    "arrived.synchronize() or host": ("host", "the host reads a pinned buffer"),
}


def test_the_generation_as_it_is_has_no_race(cuda):
    assert len(embed(loop, JPEGS)) == 48


@pytest.mark.parametrize(("line", "by", "found"), [(line, *rest) for line, rest in OF_LOOP.items()], ids=OF_LOOP)
def test_a_generation_without_one_of_its_lines_has_a_race(racing_cuda, line, by, found):
    embed(mutated(loop, line, by), JPEGS)
    assert any(found in race for race in racing_cuda.take_races())


OF_SEARCH = {
    "current.wait_event(arrived[number % 2])": "reads what",
    "block.record_stream(current)": "is freed while",
    "arrived[number % 2].synchronize()": "the host writes a pinned buffer",
}


def multiply_tiles(module) -> None:
    """Every tile of a gallery on the host, in a product, as the search does."""
    vectors = module.SearchVectors(torch.ones(200, 16).half(), CUDA)
    queries = vectors.take(torch.arange(8))
    for _, block, inverse_length in vectors.tiles(32):
        module.products(queries, block).mul_(inverse_length)
        del block


def test_a_gallery_that_travels_has_no_race(cuda):
    multiply_tiles(search_vectors)


@pytest.mark.parametrize(("line", "found"), OF_SEARCH.items(), ids=OF_SEARCH)
def test_a_gallery_that_travels_without_one_of_these_lines_has_one(racing_cuda, line, found):
    multiply_tiles(mutated(search_vectors, line, "pass"))
    assert any(found in race for race in racing_cuda.take_races())
