"""Bands of difficulty re-mined during training, in the space of the current head instead of the backbone's.

Search (always exact) and bands are those of difficulty/. They are a function of the head, so a resumed run keeps
the head that it last mined with, and mines again with that. Memory: N x output_dim x 2 bytes more, on the
device if they fit there; what difficulty/search/exact_search.py takes; and the new bands beside the old while they
are made (N x k x 8, with the ratios).
"""

import copy
import dataclasses
import logging

import numpy as np
import torch

from common import devices
from common.sections import Config
from difficulty import bands
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors
from publish.model.projection_head import ProjectionHead
from train.datasets import TrainRows
from train.evaluation import heads

log = logging.getLogger("pipeline")


def mine(cfg: Config, rows: TrainRows, head: ProjectionHead, state: dict[str, torch.Tensor]) -> TrainRows:
    """`rows` with the bands in the space of `head` with the weights `state`. Raises Stopped on a signal."""
    head = copy.deepcopy(head)
    head.load_state_dict(state)
    vectors = SearchVectors(heads.embed(head, rows.embeddings, rows.device, torch.float16), rows.device)
    n, k = rows.neighbor_rows.shape
    neighbors, ratios = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    memory_mb = devices.search_memory_mb(cfg.infrastructure, rows.device)
    for start in range(0, n, cfg.data.rows_per_part):
        block = np.arange(start, min(start + cfg.data.rows_per_part, n))
        nearest, similarities = exact_neighbors(vectors, rows.zones, k=k, rows=block, memory_mb=memory_mb)
        neighbors[block] = nearest
        ratios[block] = bands.ratios(similarities, nearest, cfg.data.band_reference_rank)
    edges = bands.edges_of(bands.histogram(ratios), cfg.data.band_percentiles)
    before = rows.neighbor_rows[:, 0].cpu().numpy()
    log.info(
        "bands re-mined: %.0f %% of the nearest neighbours have changed", 100 * (before != neighbors[:, 0]).mean()
    )
    return dataclasses.replace(
        rows,
        neighbor_rows=devices.place(neighbors, rows.device),
        band_offsets=devices.place(bands.offsets(ratios, edges), rows.device),
    )
