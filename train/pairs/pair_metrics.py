"""How well the cosine of two images tells pairs of one target from others, with 95 % intervals from a bootstrap.

An image is in several pairs, and all pairs of a city may be harder than another's: pairs are not independent. Each
figure's variance is put together as in multiway clustering (Cameron, Gelbach and Miller 2011; for pairs Aronow,
Samii and Assenova 2015), of bootstraps that draw images, pairs and datasets: that of the images, less that of the
pairs, which it counts twice; at least that of the pairs, and that of the datasets. Intervals are those of
Student's t with one degree of freedom less than there are datasets, of a single dataset normal, on the scale of
the logit; those of differences, in which both methods are judged on the same draws, as they are. They cover the
choice of images and of cities, not the seed of the training.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import special

from train.evaluation.breakdowns import HEADING_DEG, heading_difference_deg

METRICS = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "fpr_at_95_recall": "false positives at 95 % recall",
}
ALL = "all"  # the class of all pairs
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
        angle = heading_difference_deg(self.heading, np.zeros(1))
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


def draw_weights(pairs: JudgedPairs, level: str, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How much each pair counts, (b, P) float64 at a time, if things of this level ("pairs", "images", "datasets")
    are drawn with replacement: as often as it was drawn, or its two images on average."""
    rng = np.random.default_rng(seed)
    dataset = np.unique(pairs.dataset_of_image, return_inverse=True)[1]
    number = np.arange(len(pairs.same))
    one, other = {
        "pairs": (number, number),
        "images": (pairs.first, pairs.second),
        "datasets": (dataset[pairs.first], dataset[pairs.second]),
    }[level]
    used, numbered = np.unique([one, other], return_inverse=True)
    one, other = numbered.reshape(2, -1)
    block = max(1, _BLOCK_VALUES // len(number))
    for start in range(0, draws, block):
        drawn = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), min(block, draws - start))
        yield (drawn[:, one] + drawn[:, other]) / 2


def estimates(
    cosines: dict[str, np.ndarray], same: np.ndarray, weights: Iterable[np.ndarray], classes: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """METRICS (B, 3) by class and method. `weights`: (b, P) at a time; `classes`: (P,) bool each."""
    found: dict[str, dict[str, list]] = {name: {method: [] for method in cosines} for name in classes}
    for of_block in weights:
        for name, chosen in classes.items():
            for method, of_method in cosines.items():
                figures = judge(of_method[chosen], same[chosen], of_block[:, chosen])
                found[name][method].append(figures)
    return {name: {m: np.concatenate(parts) for m, parts in of_class.items()} for name, of_class in found.items()}


def summary(cosines: dict[str, np.ndarray], pairs: JudgedPairs, draws: int, seed: int) -> dict:
    """{"methods", "differences", "by_heading"}: METRICS of each method with their intervals, and of "trained"
    minus "whitening" and "raw"; classes without a pair of one target are left out. `cosines`: (P,) by method."""
    classes = {ALL: np.ones(len(pairs.same), bool), **dict(pairs.classes())}
    classes = {name: chosen for name, chosen in classes.items() if pairs.same[chosen].any()}
    itself = estimates(cosines, pairs.same, [np.ones((1, len(pairs.same)))], classes)
    datasets = len(np.unique(pairs.dataset_of_image))
    levels = ("pairs", "images", "datasets")[: 3 if datasets > 1 else 2]
    drawn = {
        level: estimates(cosines, pairs.same, draw_weights(pairs, level, draws, seed), classes) for level in levels
    }

    def figures(of_class: str, method: str, other: str = "") -> dict[str, dict]:
        """With intervals: of a method, or of the difference to another."""
        fewest = min(np.sum(pairs.same[classes[of_class]]), np.sum(~pairs.same))
        value, *spread = (
            found[of_class][method] - (found[of_class][other] if other else 0)
            for found in (itself, *drawn.values())
        )
        bounds = _bounds(value[0], dict(zip(levels, spread, strict=True)), datasets, fewest, is_share=not other)
        return {
            metric: {"value": float(v), "low": low, "high": high}
            for metric, v, (low, high) in zip(METRICS, value[0], bounds, strict=True)
        }

    compared = [("trained", other) for other in ("whitening", "raw") if {"trained", other} <= cosines.keys()]
    return {
        "methods": {method: figures(ALL, method) for method in cosines},
        "differences": {f"{a}-{b}": figures(ALL, a, b) for a, b in compared},
        "by_heading": [
            {
                "class": name,
                "same": int(pairs.same[chosen].sum()),
                "methods": {method: figures(name, method) for method in cosines},
            }
            for name, chosen in classes.items()
            if name != ALL
        ],
    }


def _bounds(
    value: np.ndarray, drawn: dict[str, np.ndarray], datasets: int, fewest: int, is_share: bool
) -> list[tuple[float | None, float | None]]:
    """(low, high) of each of K figures, given their estimates (draws, K) by level; (None, None) with fewer than
    MIN_PAIRS pairs of a kind. `fewest`: pairs of the rarer kind; `is_share`: between 0 and 1, not a difference."""
    if fewest < MIN_PAIRS:
        return [(None, None)] * len(value)
    edge = 0.5 / fewest  # a share of 0 or 1 is taken for half a pair

    def scaled(figures: np.ndarray) -> np.ndarray:
        return special.logit(np.clip(figures, edge, 1 - edge)) if is_share else figures

    variance = {level: np.nanvar(scaled(of_level), axis=0) for level, of_level in drawn.items()}
    total = np.maximum(4 * variance["images"] - variance["pairs"], variance["pairs"])  # 4: of twice the average
    quantile = special.ndtri(0.975)
    if datasets > 1:
        total = np.maximum(total, variance["datasets"] * datasets / (datasets - 1))
        quantile = special.stdtrit(datasets - 1, 0.975)
    middle, half = scaled(value), quantile * np.sqrt(total)
    low, high = middle - half, middle + half
    if is_share:  # within the data's own value where that is nearer to 0 or 1 than `edge`
        low, high = np.minimum(special.expit(low), value), np.maximum(special.expit(high), value)
    return list(zip(low.tolist(), high.tolist(), strict=True))


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
