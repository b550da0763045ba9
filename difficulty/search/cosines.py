"""Cosines of chosen pairs of rows in float64: they decide the order of a search's candidates."""

import warnings

import numpy as np
import torch
from torch.nn import functional as F

from difficulty.search.search_vectors import SearchVectors

DECIMALS = 12  # of cosines: those that differ only by rounding (of parallel vectors, say) are ties
_ROWS = 8_192  # most rows converted at a time: 768-d, 50 MB


def in_float64(
    gallery: SearchVectors, anchors: np.ndarray, rows: torch.Tensor, asked: torch.Tensor, memory_mb: float
) -> torch.Tensor:
    """Cosines (A, W) float64, to DECIMALS, of each anchor with those `asked` of its rows (A, W); 0 for the others.
    Pairs of equal vectors have equal cosines."""
    own = torch.from_numpy(anchors).to(gallery.device)
    at_once = int(np.clip(memory_mb * 2**20 // 8 // (26 * gallery.embeddings.shape[1]), 1, _ROWS))
    products = sampled_products if gallery.device.type == "cpu" else gathered_products
    return products(gallery, own, rows, asked, at_once).round_(decimals=DECIMALS)


def gathered_products(
    gallery: SearchVectors, own: torch.Tensor, rows: torch.Tensor, asked: torch.Tensor, at_once: int
) -> torch.Tensor:
    """Products (A, W) of the unit vectors of the anchors `own` (A,) and of the rows asked for: pair by pair."""
    products = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    for pairs in asked.nonzero().split(at_once):
        anchor, place = pairs.T
        left, right = _unit(gallery, own[anchor]), _unit(gallery, rows[anchor, place])
        products[anchor, place] = torch.linalg.vecdot(left, right)
    return products


def sampled_products(
    gallery: SearchVectors, own: torch.Tensor, rows: torch.Tensor, asked: torch.Tensor, at_once: int
) -> torch.Tensor:
    """The same on a CPU, in an eighth of the time: a block of the gallery at a time, each row of which is
    converted once for all anchors."""
    anchors, products = _unit(gallery, own), torch.zeros(rows.shape, dtype=torch.float64)
    block_of = torch.where(asked, rows // at_once, -1)
    for number in block_of[asked].unique().tolist():
        anchor, place = (block_of == number).nonzero(as_tuple=True)
        distinct, column = rows[anchor, place].unique(return_inverse=True)
        block, ends = _unit(gallery, distinct), torch.bincount(anchor, minlength=len(own)).cumsum(0)
        nothing = torch.zeros(len(column), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR tensors beta
            pattern = torch.sparse_csr_tensor(
                F.pad(ends, (1, 0)), column, nothing, (len(own), len(block)), check_invariants=False
            )
        products[anchor, place] = torch.sparse.sampled_addmm(pattern, anchors, block.T, beta=0.0).values()
    return products


def _unit(gallery: SearchVectors, rows: torch.Tensor) -> torch.Tensor:
    """The unit vectors of some rows in float64, on the device."""
    vectors = gallery.embeddings.index_select(0, rows.to(gallery.embeddings.device)).to(gallery.device)
    # from float16 by way of float32: less time than at once
    vectors = (vectors.float() if vectors.dtype == torch.float16 else vectors).to(torch.float64, copy=True)
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=1e-300))
