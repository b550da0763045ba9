"""The report's figures as inline SVG that takes the page's own colours, in light and in dark.

Each function returns markup with an alternative text; none touches matplotlib's global state.
"""

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup

from common import pages

MAX_CLASSES = 12  # bars that fit a figure


@matplotlib.rc_context(pages.STYLE)
def recall_curve(curve: dict, gallery: int) -> Markup:
    """Share of the queries whose best match is among the first k, for k up to 1000 or a tenth of the `gallery`, by
    method."""
    largest = int(np.clip(gallery // 10, 10, 1000))
    axes = pages.axes("k", "Recall@k, %")
    looks = pages.looks(list(curve["methods"]))
    for number, (method, recall) in enumerate(curve["methods"].items()):
        # the first lines on top: a solid line would hide a dashed one
        axes.plot(curve["k"], 100 * np.array(recall), label=method, zorder=20 - number, **looks[method])
    axes.set(xscale="log", xlim=(1, largest), ylim=(0, 101))
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= largest]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    if len(looks) > len(pages.METHOD_LOOKS):  # above: no corner is empty enough for so many
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    else:
        axes.legend(loc="lower right")
    return pages.svg(axes.figure, "Recall at k against k for each method")


@matplotlib.rc_context(pages.STYLE)
def breakdown(figures: dict, xlabel: str) -> Markup:
    """Recall@1 of each method in each class, with intervals if available; of many classes the largest."""
    queries = np.array([entry["queries"] for entry in figures["classes"]])
    largest = np.sort(np.argsort(-queries, kind="stable")[:MAX_CLASSES])  # in their own order
    classes = [figures["classes"][i] for i in largest if queries[i]]
    methods = list(classes[0]["methods"])
    upright = len(classes) > 6  # the labels of the classes
    axes = pages.axes(f"{xlabel}\n({'after' if upright else 'below'} each class: its queries)", "Recall@1, %")
    width = 0.8 / len(methods)
    for place, (method, look) in enumerate(pages.looks(methods).items()):
        recall = [entry["methods"][method]["recall@1"] for entry in classes]
        # None, where a class has too few cells for an interval, becomes NaN
        values, low, high = (100 * np.array([x[key] for x in recall], float) for key in ("value", "low", "high"))
        x = np.arange(len(classes)) + (place - (len(methods) - 1) / 2) * width
        axes.bar(x, values, width * 0.9, color=look["color"], label=method)
        lengths = np.abs([low - values, high - values])
        axes.errorbar(x, values, lengths, fmt="none", ecolor=pages.INK, elinewidth=0.8)
    ticks = [f"{entry['class']}{': ' if upright else chr(10)}{entry['queries']:,}" for entry in classes]
    axes.set_xticks(range(len(classes)), ticks, fontsize=9, rotation=90 if upright else 0)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1, handlelength=1.2)
    return pages.svg(axes.figure, f"Recall at 1 of each method by {xlabel}")


@matplotlib.rc_context(pages.STYLE)
def histogram(pairs: dict, method: str) -> Markup:
    """Cosines of matching pairs and of random pairs, each as a share of its own total."""
    axes = pages.axes(f"cosine of two images, {method}", "% of the pairs")
    for name, colour, line in (("matches", pages.GREEN, "-"), ("non_matches", pages.VERMILLION, ":")):
        counts = np.array(pairs[name], float)
        shares = 100 * counts / max(counts.sum(), 1)
        axes.stairs(shares, pairs["edges"], fill=True, color=colour, alpha=0.35)
        label = name.replace("_", "-")
        axes.stairs(shares, pairs["edges"], color=colour, linestyle=line, linewidth=1.4, label=label)
    axes.legend()
    return pages.svg(axes.figure, "Histograms of the cosine of matching pairs and of random non-matching pairs")


@matplotlib.rc_context(pages.STYLE)
def training_curves(history: pd.DataFrame) -> Markup:
    """The loss and the validation mAP@R by epoch."""
    validation, loss = pages.BLUE, pages.ORANGE
    look = {"markersize": 3, "markevery": 1 + len(history) // 50}
    left = pages.axes("epoch", "validation mAP@R, %")
    left.plot(history["epoch"], 100 * history["val_map_at_r"], "o-", color=validation, **look)
    left.yaxis.label.set_color(validation)
    left.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    right = left.twinx()
    right.spines["right"].set_visible(True)
    right.plot(history["epoch"], history["loss"], "s--", color=loss, **look)
    right.set_ylabel("training loss", color=loss)
    return pages.svg(left.figure, "Validation mAP at R and training loss by epoch")


@matplotlib.rc_context(pages.STYLE)
def band_shares(history: pd.DataFrame) -> Markup | None:
    """The share of anchors whose negatives came from each band (0 is the hardest), by epoch; None if the history
    has no shares, as with negatives mined in the batch."""
    columns = [name for name in history if name.startswith("share_")]
    rows = history.dropna(subset=columns)
    if rows.empty:
        return None
    every = 1 + len(rows) // 100  # epochs to a step: the page stays small however long the training
    edges = np.append(rows["epoch"].iloc[::every], rows["epoch"].iloc[-1] + 1) - 0.5
    shares = rows[columns].groupby(np.arange(len(rows)) // every).mean()
    axes = pages.axes("epoch", "% of the anchors")
    bottom = np.zeros(len(edges) - 1)
    for name, colour in zip(columns, pages.arm_colours(len(columns) - 1), strict=True):
        top = bottom + 100 * shares[name].to_numpy()
        label = name.removeprefix("share_").replace("_", " ")
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=label)
        bottom = top
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return pages.svg(axes.figure, "Share of the anchors by band of their negatives, by epoch")
