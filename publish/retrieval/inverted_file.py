"""faiss's inverted file: vectors in lists around centres, of which a search looks at the nearest `nprobe` alone.

The vectors in the lists are those of the exact search, in float16, so the cosines are the same; what is in lists
that are not looked at is missed. How much that is depends on the vectors, so `tune` measures it on these.

Memory to build: N x (D x 2 + 8) bytes, and 256 sqrt(N) x D x 4 for the sample that the centres are trained on.
"""

from pathlib import Path

import numpy as np
import torch

from common import files
from common.errors import PipelineError
from publish.retrieval.cosine_search import CPU, most_similar

WANTED_RECALL = 0.995  # recall@10 of rows, at the nprobe that is chosen; of views that are not rows, 0.002 less
QUERIES = 1_000  # that it is measured with
_PER_LIST, _LEAST_PER_LIST = 64, 39  # vectors of the sample; faiss warns below the latter
_BATCH_ROWS = 65_536  # added at a time
_TIE = 1e-6  # cosines as near as this are equal: products in another order differ by as much


def require_faiss():
    """faiss. Raises PipelineError, saying how to install it, if it is missing."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise PipelineError(
            "an index of kind ivf needs faiss, which is not installed\n"
            "install it (pip install faiss-cpu), or build an exact index with --kind exact"
        ) from None
    return faiss


def build(vectors: np.ndarray, seed: int = 0):
    """An IVF{nlist},SQfp16 of `vectors` (N, D) float16 by inner product, with nlist about 4 sqrt(N)."""
    faiss = require_faiss()
    total, dim = vectors.shape
    nlist = max(1, min(round(4 * total**0.5), total // _LEAST_PER_LIST))
    index = faiss.index_factory(dim, f"IVF{nlist},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False  # the same float16 values as are searched exactly
    sample = np.random.default_rng(seed).choice(total, min(total, _PER_LIST * nlist), replace=False)
    index.train(vectors[np.sort(sample)].astype(np.float32))
    for start in range(0, total, _BATCH_ROWS):
        index.add(vectors[start : start + _BATCH_ROWS].astype(np.float32))
    return index


def tune(index, vectors: np.ndarray, device: torch.device = CPU, seed: int = 0) -> dict:
    """Set the smallest power of two as nprobe whose recall@10 is at least WANTED_RECALL: the share of the 10 most
    similar of QUERIES rows, without themselves, that is found. Returns nlist, nprobe and the recalls."""
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), min(QUERIES, len(vectors)), replace=False))
    queries = vectors[rows].astype(np.float32)
    width = min(101, len(vectors))
    exact = _without_own(most_similar(vectors, queries, width, device=device), rows)
    index.nprobe = 1
    while True:
        found = _without_own(index.search(queries, width), rows)
        recalls = {f"recall@{k}": _recall(found, exact, k) for k in (10, 100)}
        if recalls["recall@10"] >= WANTED_RECALL or index.nprobe >= index.nlist:
            return {"nlist": index.nlist, "nprobe": index.nprobe, **recalls}
        index.nprobe = min(2 * index.nprobe, index.nlist)


def _without_own(found: tuple[np.ndarray, np.ndarray], own: np.ndarray) -> np.ndarray:
    """The cosines (Q, k), descending, of what was found for rows (Q,), -inf for the rows themselves."""
    cosines, rows = found
    return -np.sort(-np.where(rows == own[:, None], -np.inf, cosines), axis=1)


def _recall(found: np.ndarray, exact: np.ndarray, k: int) -> float:
    """The share of the k best that was found, by cosine: of two that are equal, either counts."""
    k = min(k, exact.shape[1] - 1)
    return float((found[:, :k] >= exact[:, k - 1, None] - _TIE).mean())


def write(path: Path, index) -> None:
    """Write the index to `path` atomically."""
    faiss = require_faiss()
    with files.atomic(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 2**20))


def read(path: Path, nprobe: int):
    """The index at `path`, memory-mapped, to search `nprobe` lists. Raises PipelineError if it is damaged."""
    faiss = require_faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError:
        raise PipelineError(f"{path} is damaged: run publish/build_index.py --overwrite") from None
    index.nprobe = nprobe
    return index
