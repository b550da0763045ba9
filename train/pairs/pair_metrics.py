"""How well the cosine of two images tells pairs of one target from others, with 95 % intervals from a bootstrap.

An image is in several pairs, and so is a city: pairs are not independent. The bootstrap draws images and datasets
with replacement; a pair counts as often as the product of how often its two images and its dataset were drawn. This
is the pigeonhole bootstrap (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1; for more than two
factors Owen and Eckles 2012). Intervals are percentiles. They cover the choice of images and of cities, not the seed
of the training, and are rather too wide than too narrow: by a factor of up to 1.7, the square root of 3, where each
image is in one pair only. All methods are judged on the same draws, so that differences are paired.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.evaluation.breakdowns import HEADING_DEG, heading_difference_deg

METRICS = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "fpr_at_95_recall": "false positives at 95 % recall",
}
RECALL = 0.95
MIN_PAIRS = 20  # of each kind; with fewer there are no intervals
CURVE_POINTS = 300  # of a ROC curve, at most
_BLOCK_VALUES = 1 << 21  # weights of pairs at a time: 16 MB


@dataclass(frozen=True)
class JudgedPairs:
    """P pairs of I images."""

    first: np.ndarray  # (P,) int64: numbers of images
    second: np.ndarray
    same: np.ndarray  # (P,) bool
    heading: np.ndarray  # (P,) degrees between the views, NaN: not known
    dataset_of_image: np.ndarray  # (I,) int64

    def classes(self) -> Iterator[tuple[str, np.ndarray]]:
        """By the angle between the headings: its range, and which pairs (P,) bool: those of one target at such an
        angle, and all of two targets, so that classes differ only in how hard it is to recognise a target.
        """
        angle = heading_difference_deg(self.heading, 0)
        edges = (0, *HEADING_DEG, 181)
        for low, high in pairwise(edges):
            name = f"{low}-{high}" if high <= 180 else f"over {low}"
            yield name, ~self.same | ((angle >= low) & (angle < high))


def judge(cosines: np.ndarray, same: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """METRICS (B, 3) of P pairs, given how much each counts in each of B draws, `weights` (B, P); NaN in a draw
    without pairs of either kind. Equal cosines are one threshold, as in scikit-learn.
    """
    order = np.argsort(-cosines, kind="stable")
    thresholds = np.flatnonzero(np.diff(cosines[order], append=-np.inf))  # the last pair of each
    weights, same = weights[:, order], same[order]
    true, false = (np.cumsum(weights * kind, axis=1)[:, thresholds] for kind in (same, ~same))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, fpr = true / true[:, -1:], false / false[:, -1:]
        precision = np.nan_to_num(
            true / (true + false)
        )  # 0 / 0 before the first pair that counts, and adds nothing
    gained = np.diff(recall, axis=1, prepend=0)
    auc = (np.diff(fpr, axis=1, prepend=0) * (recall - gained / 2)).sum(axis=1)
    average_precision = (gained * precision).sum(axis=1)
    at_recall = np.take_along_axis(fpr, (recall >= RECALL).argmax(axis=1)[:, None], axis=1)[:, 0]
    figures = np.stack([auc, average_precision, at_recall], axis=1)
    figures[~np.isfinite(auc)] = np.nan
    return figures


def draw_weights(pairs: JudgedPairs, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How much each pair counts, (b, P) float64 at a time: once 1 for all, then the draws."""
    yield np.ones((1, len(pairs.same)))
    rng = np.random.default_rng(seed)
    names, dataset = np.unique(pairs.dataset_of_image, return_inverse=True)
    one, other = dataset[pairs.first], dataset[pairs.second]
    block = max(1, _BLOCK_VALUES // max(1, len(pairs.same)))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        images, datasets = (
            rng.multinomial(n, np.full(n, 1 / n), size).astype(np.float64) for n in (len(dataset), len(names))
        )
        weights = images[:, pairs.first] * images[:, pairs.second] * datasets[:, one]
        yield weights * np.where(one == other, 1, datasets[:, other])


def estimates(
    cosines: dict[str, np.ndarray], pairs: JudgedPairs, draws: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """METRICS (1 + draws, 3) by class and method, the data's own first; class "all" has all pairs."""
    classes = {"all": np.ones(len(pairs.same), bool), **dict(pairs.classes())}
    found: dict[str, dict[str, list]] = {name: {method: [] for method in cosines} for name in classes}
    for weights in draw_weights(pairs, draws, seed):
        for name, chosen in classes.items():
            for method, of_method in cosines.items():
                figures = judge(of_method[chosen], pairs.same[chosen], weights[:, chosen])
                found[name][method].append(figures)
    return {name: {m: np.concatenate(parts) for m, parts in of_class.items()} for name, of_class in found.items()}


def summary(cosines: dict[str, np.ndarray], pairs: JudgedPairs, draws: int, seed: int) -> dict:
    """{"methods", "differences", "by_heading"}: METRICS of each method with their intervals, and of "trained"
    minus "whitening" and "raw"; classes without a pair of one target are left out. `cosines`: (P,) by method."""
    found = estimates(cosines, pairs, draws, seed)
    everything = found.pop("all")
    has_interval = min(pairs.same.sum(), (~pairs.same).sum()) >= MIN_PAIRS
    compared = [("trained", other) for other in ("whitening", "raw") if {"trained", other} <= cosines.keys()]
    classes = []
    for (name, chosen), by_method in zip(pairs.classes(), found.values(), strict=True):
        same = int(pairs.same[chosen].sum())
        if same:
            enough = has_interval and same >= MIN_PAIRS
            figures = {method: intervals(of, enough) for method, of in by_method.items()}
            classes.append({"class": name, "same": same, "methods": figures})
    return {
        "methods": {method: intervals(of, has_interval) for method, of in everything.items()},
        "differences": {f"{a}-{b}": intervals(everything[a] - everything[b], has_interval) for a, b in compared},
        "by_heading": classes,
    }


def intervals(figures: np.ndarray, has_interval: bool) -> dict[str, dict]:
    """{"value", "low", "high"} of each of METRICS, from their estimates (1 + draws, 3)."""
    low, high = np.nanquantile(figures[1:], [0.025, 0.975], axis=0) if has_interval else [[None] * 3] * 2
    return {
        metric: {"value": float(value), "low": a if a is None else float(a), "high": b if b is None else float(b)}
        for metric, value, a, b in zip(METRICS, figures[0], low, high, strict=True)
    }


def roc_curve(cosines: np.ndarray, same: np.ndarray) -> dict[str, list[float]]:
    """The curve from (0, 0) to (1, 1) in at most CURVE_POINTS points: "fpr", and the share of the pairs of one
    target that are found, "recall"."""
    order = np.argsort(-cosines, kind="stable")
    thresholds = np.flatnonzero(np.diff(cosines[order], append=-np.inf))
    curve = {"fpr": ~same[order], "recall": same[order]}
    points = {name: np.append(0, np.cumsum(of)[thresholds]) / of.sum() for name, of in curve.items()}
    steps = (np.diff(points["fpr"]) + np.diff(points["recall"])).cumsum()  # 0 to 2 along the curve
    shown = np.unique(
        np.searchsorted(steps, np.linspace(0, 2, CURVE_POINTS - 1), side="left").clip(0, len(steps) - 1)
    )
    return {name: [0.0, *np.round(of[1:][shown], 5).tolist()] for name, of in points.items()}
