"""Cosines of chosen pairs of rows, in float32 and float64: what a search settles its candidates by."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from difficulty.search.search_vectors import SearchVectors

DECIMALS = 12  # of cosines in float64: those equal but for rounding (parallel vectors, say) are ties
_ROWS = 8_192  # rows that candidates are compared with in float32 at a time: on a GPU half a GB


def of_pairs(embeddings: torch.Tensor, left: torch.Tensor, right: torch.Tensor, memory_mb: float):
    """Cosines (P,) float64, to DECIMALS, of the pairs of rows (left[i], right[i]), from products summed row by
    row: pairs of equal vectors get equal cosines, whatever else is in the list."""
    step = max(int(memory_mb * 2**20 // (320 * embeddings.shape[1])), 64)
    left, right = left.to(embeddings.device), right.to(embeddings.device)
    parts = [torch.empty(0, dtype=torch.float64, device=embeddings.device)]
    for start in range(0, len(left), step):
        x, y = (embeddings[side[start : start + step]].double() for side in (left, right))
        norms = (x * x).sum(dim=1).sqrt() * (y * y).sum(dim=1).sqrt()
        parts.append(((x * y).sum(dim=1) / norms.clamp(min=1e-300)).round(decimals=DECIMALS))
    return torch.cat(parts)


def in_float32(
    gallery: SearchVectors, anchors: np.ndarray, rows: torch.Tensor, asked: torch.Tensor, memory_mb: float
) -> torch.Tensor:
    """Cosines (A, W) of each anchor with the rows (A, W) that go with it, of any value where not `asked`."""
    dim, own = gallery.embeddings.shape[1], torch.from_numpy(anchors).to(gallery.device)
    at_once = int(np.clip(memory_mb * 2**20 // 8 // (12 * dim), 1, _ROWS))
    if gallery.device.type == "cpu":
        return _sampled_products(gallery.unit, own, rows, asked, at_once)
    cosines, step = torch.empty(rows.shape, device=gallery.device), max(1, at_once // rows.shape[1])
    for start in range(0, len(rows), step):
        x, some = gallery.unit(own[start : start + step]), rows[start : start + step]
        y = gallery.unit(some.reshape(-1)).view(*some.shape, dim)
        cosines[start : start + step] = torch.bmm(y, x[:, :, None]).squeeze(2)
    return cosines


def in_float64(
    gallery: SearchVectors, anchors: np.ndarray, rows: torch.Tensor, asked: torch.Tensor, memory_mb: float
) -> torch.Tensor:
    """The same in float64, to DECIMALS: equal vectors get equal cosines."""
    embeddings, own = gallery.embeddings, torch.from_numpy(anchors).to(gallery.device)
    if gallery.device.type == "cpu":
        at_once = int(np.clip(memory_mb * 2**20 // 8 // (26 * embeddings.shape[1]), 1, _ROWS))
        products = _sampled_products(
            lambda which: _unit_float64(embeddings.index_select(0, which)), own, rows, asked, at_once
        )
        return products.round(decimals=DECIMALS)
    cosines = torch.zeros(rows.shape, dtype=torch.float64, device=gallery.device)
    which, place = asked.nonzero(as_tuple=True)
    values = of_pairs(embeddings, own[which], rows[which, place], memory_mb)
    cosines[which, place] = values.to(gallery.device)
    return cosines


def _unit_float64(vectors: torch.Tensor) -> torch.Tensor:
    if vectors.dtype == torch.float16:
        vectors = vectors.float()  # from there to float64 takes less time than at once
    vectors = vectors.to(torch.float64, copy=True)
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=1e-300))


def _sampled_products(
    vectors_of: Callable[[torch.Tensor], torch.Tensor],
    own: torch.Tensor,
    rows: torch.Tensor,
    asked: torch.Tensor,
    at_once: int,
) -> torch.Tensor:
    """Products (A, W) of the vectors of the anchors `own` (A,) and of the rows `asked` of each, on a CPU: so many
    rows of the gallery after the other, each made once for all the anchors that ask for it. An eighth of the time
    of gathering rows for each anchor."""
    x = vectors_of(own)
    products = torch.zeros(rows.shape, dtype=x.dtype)
    block_of = torch.where(asked, rows // at_once, -1)
    for number in block_of.unique().tolist():
        if number < 0:
            continue
        anchor, place = (block_of == number).nonzero(as_tuple=True)
        wanted, column = rows[anchor, place].unique(return_inverse=True)
        ends = torch.bincount(anchor, minlength=len(x)).cumsum(0)
        nothing = torch.zeros(len(column), dtype=x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR tensors beta
            pattern = torch.sparse_csr_tensor(
                F.pad(ends, (1, 0)), column, nothing, (len(x), len(wanted)), check_invariants=False
            )
        products[anchor, place] = torch.sparse.sampled_addmm(pattern, x, vectors_of(wanted).T, beta=0.0).values()
    return products
