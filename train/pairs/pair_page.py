"""pairs.html: one self-contained page of an evaluation of the verified pairs, and its figures as text."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup

from common import pages
from common.imagery import pictures
from common.imagery.verified_pairs import PairFiles
from train.evaluation.metrics_json import percent, share
from train.pairs.pair_images import SUFFIXES, PairImages
from train.pairs.pair_metrics import METRICS, MIN_PAIRS
from train.report.query_sheets import data_uri

SHOWN_PAIRS = 8  # worst of each kind
_TEMPLATE = Path(__file__).with_name("pairs.html")


class ShownPair(NamedTuple):
    """A pair as two pictures, data URIs (None: cannot be decoded), with its cosine and angle."""

    pictures: tuple[str | None, str | None]
    names: tuple[str, str]
    cosine: float
    heading: float


def render(results: dict, images: PairImages, cosines: dict[str, np.ndarray], source: PairFiles) -> str:
    """The page. `results`: as in pairs.json; `cosines`: (P,) of each method."""
    shown = "trained" if "trained" in cosines else next(iter(cosines))
    worst = {
        kind: [_shown(images, row, cosines[shown][row], source, results["images"]) for row in rows]
        for kind, rows in worst_rows(cosines[shown], images.judged.same).items()
    }
    return pages.render(
        _TEMPLATE,
        results=results,
        metrics=METRICS,
        share=share,
        min_pairs=MIN_PAIRS,
        shown=shown,
        roc=roc_figure(results["roc"]),
        worst=worst,
        warning=seen_warning(results),
    )


def worst_rows(cosines: np.ndarray, same: np.ndarray) -> dict[str, np.ndarray]:
    """The pairs of one target with the lowest cosine, and the others with the highest."""
    order = np.argsort(cosines, kind="stable")
    return {"same": order[same[order]][:SHOWN_PAIRS], "different": order[::-1][~same[order[::-1]]][:SHOWN_PAIRS]}


def _shown(images: PairImages, row: int, cosine: float, source: PairFiles, kind: str) -> ShownPair:
    names = images.pairs["first"][int(row)].as_py(), images.pairs["second"][int(row)].as_py()
    contents = source.read([name + SUFFIXES[kind] for name in names])
    small = [None if content is None else pictures.small(content) for content in contents]
    first, second = (None if picture is None else data_uri(picture) for picture in small)
    return ShownPair((first, second), names, float(cosine), float(images.judged.heading[row]))


@matplotlib.rc_context(pages.STYLE)
def roc_figure(curves: dict) -> Markup:
    """The ROC curve of each method."""
    axes = pages.axes("pairs of different targets that pass, %", "pairs of one target that pass, %")
    looks = pages.looks(curves)
    for number, (method, curve) in enumerate(curves.items()):
        fpr, recall = (100 * np.array(curve[name]) for name in ("fpr", "recall"))
        # the first lines on top: a solid line would hide a dashed one
        axes.plot(fpr, recall, label=method, zorder=20 - number, **looks[method])
    axes.axhline(95, color=pages.INK, linewidth=0.6)
    axes.set(xlim=(0, 100), ylim=(0, 101))
    axes.legend(loc="lower right")
    return pages.svg(axes.figure, "ROC curve of each method")


def seen_warning(results: dict) -> str:
    """That training may have seen these images; "" if it has not, as far as is known."""
    seen, images = results["seen"], results["seen"]["images"]
    if not seen["found"]:
        return "it is not known whether training has seen these images: none of them is in the intermediates"
    if not seen["train"] + seen["val"]:
        return ""
    return (
        f"training has seen these images: of {images:,}, {seen['train']:,} show a building or panorama of train, "
        f"and {seen['val']:,} of val; set data.held_out to prevent that, and make everything from "
        "merge_and_split.py on again"
    )


def table(results: dict) -> str:
    """The figures as plain text, in percent, with their 95 % intervals."""
    counts, seen = results["counts"], results["seen"]
    lines = [
        f"{counts['pairs']:,} pairs ({counts['same']:,} of one target, {counts['different']:,} of two) of "
        f"{counts['images']:,} images ({results['images']}) of {counts['datasets']:,} datasets",
        seen_warning(results)
        or f"of {seen['images']:,} images, {seen['found']:,} are in the intermediates, and training has seen none",
    ]
    rows = [(method, "", figures) for method, figures in results["methods"].items()]
    rows += [(pair.replace("-", " - ", 1), "+", figures) for pair, figures in results["differences"].items()]
    width = 1 + max(len(name) for name, _, _ in rows)
    lines.append(f"{'%':<{width}}" + "".join(f"{title:<31}" for title in METRICS.values()).rstrip())
    for name, sign, figures in rows:
        lines.append(
            f"{name:<{width}}" + "".join(f"{percent(figures[key], sign):<31}" for key in METRICS).rstrip()
        )
    if next(iter(results["methods"].values()))["roc_auc"]["low"] is None:
        lines.append(f"no intervals: fewer than {MIN_PAIRS} pairs of one kind")
    return "\n".join(lines)
