"""The vectors of buildings on a plane, such that buildings that look alike are close: openTSNE's t-SNE."""

import importlib.util
import logging

import numpy as np

log = logging.getLogger("pipeline")
MAX_PROJECTED = 50_000  # buildings, a sample of more
MIN_PROJECTED = 10  # fewer have no neighbourhoods to keep
PERPLEXITY = 30.0
_MIN_PARALLEL = 5_000  # for fewer, threads wait for one another longer than they save where cores are shared


def method() -> str | None:
    """The library that projects; None if it is not installed."""
    return "openTSNE" if importlib.util.find_spec("openTSNE") else None


def project(vectors: np.ndarray, seed: int, threads: int) -> np.ndarray:
    """(B, 2) float32 from unit vectors (B, D); NaN for buildings beyond the sample, or without openTSNE.

    Equal vectors give equal positions on as many cores (from _MIN_PARALLEL buildings on, threads matter).
    """
    plane = np.full((len(vectors), 2), np.nan, np.float32)
    if method() is None:
        log.warning("x and y are left empty: install openTSNE (pip install 'openTSNE>=1.0.2'), then --remake")
    if method() is None or len(vectors) < MIN_PROJECTED:
        return plane
    from openTSNE import TSNE

    rows = np.arange(len(vectors))
    if len(rows) > MAX_PROJECTED:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_PROJECTED, replace=False))
        log.warning("projecting a sample of %s of %s buildings", f"{len(rows):,}", f"{len(vectors):,}")
    tsne = TSNE(
        perplexity=min(PERPLEXITY, (len(rows) - 1) / 3),
        metric="cosine",
        initialization="pca",
        random_state=seed,
        n_jobs=threads if len(rows) >= _MIN_PARALLEL else 1,
    )
    plane[rows] = tsne.fit(vectors[rows])
    return plane
