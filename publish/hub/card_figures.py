"""What the model card shows of an evaluation: its picture, and the table of what a cosine means.

Loads matplotlib. Neither shows a photograph: the dataset's may not be published.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import pages

SHARES = (0.1, 0.01, 0.001)  # of non-matching pairs
MIN_PAIRS = 10  # that a share must stand for


class Threshold(NamedTuple):
    """Of the pairs, the shares whose cosine is at least `cosine`."""

    cosine: float
    matches: float
    non_matches: float


def at_least(histograms: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The edges of the bins, and for "matches" and "non_matches" the share of pairs at or above each."""
    shares = {}
    for name in ("matches", "non_matches"):
        counts = np.array(histograms[name], float)
        above = np.append(np.cumsum(counts[::-1])[::-1], 0)
        shares[name] = above / max(counts.sum(), 1)
    return np.array(histograms["edges"]), shares


def thresholds(histograms: dict) -> list[Threshold]:
    """The lowest cosines that at most SHARES of the non-matching pairs reach, as far as there are enough pairs."""
    edges, shares = at_least(histograms)
    found = []
    for share in SHARES:
        if share * sum(histograms["non_matches"]) >= MIN_PAIRS:
            first = int(np.argmax(shares["non_matches"] <= share))
            found.append(Threshold(edges[first], shares["matches"][first], shares["non_matches"][first]))
    return found


@matplotlib.rc_context(pages.STYLE)
def draw(path: Path, metrics: dict, names: dict[str, str]) -> None:
    """Write a PNG: Recall@k of each method in `names` (its title), and the shares of `at_least`."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    recall, cosine = figure.subplots(1, 2)
    curve, last = metrics["recall_curve"], max(metrics["counts"]["gallery"] // 10, 1)
    shown = [k for k in curve["k"] if k <= last]
    for method, name in names.items():
        if method in curve["methods"]:
            values = 100 * np.array(curve["methods"][method][: len(shown)])
            recall.plot(shown, values, label=name, **pages.METHOD_LOOKS[method])
    recall.set(xscale="log", xlabel="k", ylabel="Recall@k, %", title="Is the building among the k nearest images?")
    recall.set_xlim(1, max(last, 2))
    ticks = [k for k in (1, 10, 100, 1000) if k <= last]
    recall.set_xticks(ticks, map(str, ticks))
    recall.minorticks_off()
    edges, shares = at_least(metrics["similarity_histograms"])
    cosine.plot(edges, 100 * shares["matches"], label="the same building", **pages.METHOD_LOOKS["trained"])
    cosine.plot(edges, 100 * shares["non_matches"], label="different buildings", **pages.METHOD_LOOKS["raw"])
    cosine.set(xlabel="cosine", ylabel="pairs at least this similar, %", title="What does a cosine mean?")
    cosine.set_xticks([-1, -0.5, 0, 0.5, 1])
    for axes in (recall, cosine):
        axes.grid(axis="y", color="#80808040", linewidth=0.6)
        axes.legend()
    figure.savefig(path, dpi=144, metadata={"Software": None})
