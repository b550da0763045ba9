"""train/sampling/feed.py. Oracle: the sampler, and rows taken from the table one by one. (CUDA's streams need a
GPU.)
"""

import numpy as np
import pytest
import torch

from train.datasets import Sampler, make_rows
from train.sampling.feed import Feed, reading

CPU = torch.device("cpu")


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    building = np.repeat(np.arange(20), 3)
    places = {"target_lat": building * 0.01, "target_lon": np.zeros(60)}
    embeddings = rng.normal(size=(60, 5)).astype(np.float16)
    neighbors, offsets = np.full((60, 4), -1, np.int32), np.zeros((60, 3), np.uint8)
    columns = {"street_view_id": np.arange(60), **places}
    return make_rows(embeddings, neighbors, offsets, building, columns, 25.0, CPU)


@pytest.mark.parametrize("through_a_buffer", [False, True])
def test_it_hands_over_the_samplers_batch_with_its_embeddings(rows, through_a_buffer):
    feed, sampler = Feed(rows, 8, 4, seed=3), Sampler(rows, 8, 4, seed=3)
    if through_a_buffer:  # as from the host to CUDA, where it is pinned
        feed._pinned = torch.empty((24, 5), dtype=torch.float16)
    for step in range(3):
        assert feed.is_empty
        feed.draw(step, np.full(4, 2))
        batch, embeddings = feed.take()
        expected = sampler.draw(step, np.full(4, 2))
        assert torch.equal(batch.rows, expected.rows)
        assert torch.equal(batch.arms, expected.arms)
        taken = [rows.embeddings[row].tolist() for row in batch.rows.tolist()]
        assert embeddings.tolist() == taken


def test_a_reading_is_what_the_tensor_was():
    assert reading(torch.tensor([1.5, 2.5], dtype=torch.float64))().tolist() == [1.5, 2.5]
