"""Bands of difficulty re-mined during training, in the space of the current head instead of the backbone's.

Search (always exact) and bands are those of difficulty/. They are a function of the head, so a resumed run keeps
the head that it last mined with, and mines again with that. Memory: N x output_dim x 2 bytes more, on the
device if they fit there; what difficulty/search/exact_search.py takes; and the new bands beside the old while they
are made (N x k x 8, with the similarities).
"""

import copy
import dataclasses
import logging

import numpy as np
import torch

from common import devices
from common.sections import Config
from difficulty import bands
from difficulty.search import exact_search
from publish.projection_head import ProjectionHead
from train.datasets import TrainRows
from train.evaluation import heads

log = logging.getLogger("pipeline")


def mine(cfg: Config, rows: TrainRows, head: ProjectionHead, state: dict[str, torch.Tensor]) -> TrainRows:
    """`rows` with the bands in the space of `head` with the weights `state`. Raises Stopped on a signal."""
    head = copy.deepcopy(head)
    head.load_state_dict(state)
    vectors = heads.embed(head, rows.embeddings, rows.device, torch.float16)
    neighbors, similarities = exact_search.exact_neighbors(
        exact_search.SearchVectors(vectors, rows.device),
        rows.zones,
        k=rows.neighbor_rows.shape[1],
        rows=np.arange(len(vectors)),
        memory_mb=devices.search_memory_mb(cfg.infrastructure, rows.device),
    )
    ratios = bands.ratios(similarities, neighbors, cfg.data.band_reference_rank)
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
