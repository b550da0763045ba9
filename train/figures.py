"""The report's figures as inline SVG that takes the page's own colours, in light and in dark.

Each function returns markup with an alternative text; none touches matplotlib's global state.
"""

import io
import re

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

_INK = "#0a0b0c"  # drawn with this, then replaced by the page's text colour
COLOURS = {"raw": "#8c8c8c", "pca": "#b07ad0", "whitening": "#e08a1e", "trained": "#2a86d8"}
LINES = {"raw": ":", "pca": "-.", "whitening": "--", "trained": "-"}  # told apart without colour too
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_SIZE_INCH = (4.4, 3.0)


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an <svg> element with `alt` as its name. Equal figures give equal bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": alt}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(_INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and ids would repeat in the page
    view_box = re.search(r'viewBox="[^"]*"', text).group()
    text = f'<svg {view_box} role="img" aria-label="{escape(alt)}"' + text[text.index(">") :]
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip())


def _axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=_SIZE_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", color="#80808040", linewidth=0.6)
    return figure, axes


def recall_curve(best_ranks: dict[str, np.ndarray]) -> Markup:
    """Share of the queries whose best match is among the first k, for k up to 1000. One array per method."""
    k = np.unique(np.geomspace(1, 1000, 60).astype(int))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("k (results looked at)", "Recall@k, %")
        for method, ranks in best_ranks.items():
            recall = 100 * np.searchsorted(np.sort(ranks), k, side="right") / len(ranks)
            axes.plot(k, recall, LINES[method], color=COLOURS[method], label=method)
            axes.lines[-1].set_zorder(7 - len(axes.lines))  # a solid line would hide a dashed one
        axes.set(xscale="log", xlim=(1, 1000), ylim=(0, 101))
        axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        axes.legend()
    return svg(figure, "Recall at k against k for each method")


def breakdown(found: dict, xlabel: str) -> Markup:
    """Recall@1 of each method in each class of (query, match) pairs, with intervals where there are some."""
    classes = [entry for entry in found["classes"] if entry["pairs"]]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(xlabel, "Recall@1, %")
        width = 0.8 / len(COLOURS)
        for number, method in enumerate(COLOURS):
            figures = [entry["methods"][method]["recall@1"] for entry in classes]
            values = np.array([100 * figure["value"] for figure in figures])
            x = np.arange(len(classes)) + (number - (len(COLOURS) - 1) / 2) * width
            axes.bar(x, values, width * 0.9, color=COLOURS[method], label=method)
            ends = [[figure[end] for figure in figures] for end in ("low", "high")]  # None: too few cells
            lengths = np.abs(100 * np.array(ends, float) - values)
            axes.errorbar(x, values, lengths, fmt="none", ecolor=_INK, elinewidth=0.8)
        axes.set_xticks(range(len(classes)), [f"{entry['class']}\n{entry['pairs']:,} pairs" for entry in classes])
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(figure, f"Recall at 1 of each method by {xlabel}")


def histogram(found: dict) -> Markup:
    """Cosines of matching pairs and of random pairs, each as a share of its own total."""
    edges = np.array(found["edges"])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("cosine of two images, trained head", "% of the pairs")
        for name, colour in (("matches", "#3a9d4e"), ("non_matches", "#d4483b")):
            counts = np.array(found[name], float)
            shares = 100 * counts / max(counts.sum(), 1)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(shares, edges, color=colour, label=name.replace("_", "-"))
        axes.legend()
    return svg(figure, "Histograms of the cosine of matching pairs and of random pairs that do not match")


def training_curves(history: pd.DataFrame) -> Markup:
    """The loss and the validation mAP@R by epoch."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("epoch", "validation mAP@R, %")
        axes.plot(history["epoch"], 100 * history["val_map_at_r"], "o-", ms=3, color=COLOURS["trained"])
        axes.yaxis.label.set_color(COLOURS["trained"])
        axes.xaxis.get_major_locator().set_params(integer=True)
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.plot(history["epoch"], history["loss"], "s--", ms=3, color=COLOURS["whitening"])
        other.set_ylabel("training loss", color=COLOURS["whitening"])
    return svg(figure, "Validation mAP at R and training loss by epoch")


def band_shares(history: pd.DataFrame) -> Markup | None:
    """Which share of the anchors drew its negatives from which band (0 is the hardest), by epoch; None where the
    history has no shares, as with negatives that are mined in the batch."""
    columns = [name for name in history if name.startswith("share_")]
    rows = history.dropna(subset=columns)
    if rows.empty:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("epoch", "% of the anchors")
        colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, len(columns)))
        labels = [name.removeprefix("share_").replace("_", " ") for name in columns]
        bottom = np.zeros(len(rows))
        for name, label, colour in zip(columns, labels, colours, strict=True):
            share = 100 * rows[name].to_numpy()
            axes.bar(rows["epoch"], share, 0.9, bottom=bottom, color=colour, label=label)
            bottom += share
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return svg(figure, "Share of the anchors by band of their negatives, by epoch")
