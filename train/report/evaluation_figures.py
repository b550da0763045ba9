"""The report's figures as inline SVG that takes the page's own colours, in light and in dark.

Each function returns markup with an alternative text; none touches matplotlib's global state.
"""

import io
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

_INK = "#0a0b0c"  # drawn with this, then replaced by the page's text colour
_COLOURS = {"raw": "#8c8c8c", "pca": "#b07ad0", "whitening": "#e08a1e", "trained": "#2a86d8"}
_LINES = {"raw": ":", "pca": "-.", "whitening": "--", "trained": "-"}  # told apart without colour too
_FURTHER_COLOURS = ("#3a9d4e", "#d4483b", "#12a5a5", "#c2a800", "#d667a8", "#7a5a40")
_MARKERS = "osD^vP"
MAX_CLASSES = 12  # bars that fit a figure
_STYLE: dict[Any, Any] = {  # matplotlib's own type lists the names of all settings
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "text.parse_math": False,  # methods are named after files: "$" is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_SIZE_INCH = (4.2, 3.0)


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an <svg> element with `alt` as its name. Equal figures give equal bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": alt}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(_INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and ids would repeat in the page
    view_box = re.findall(r'viewBox="[^"]*"', text)[0]
    text = f'<svg {view_box} role="img" aria-label="{escape(alt)}"' + text[text.index(">") :]
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip())


def _axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=_SIZE_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#80808040", linewidth=0.6)
    return figure, axes


def _looks(methods: list[str]) -> dict[str, dict]:
    """Colour, line and marker of each method; the markers tell apart what is not one of the four."""
    looks: dict[str, dict] = {}
    further = 0
    for method in methods:
        if method in _COLOURS:
            looks[method] = {"color": _COLOURS[method], "linestyle": _LINES[method]}
        else:
            marker = _MARKERS[further % len(_MARKERS)]
            colour = _FURTHER_COLOURS[further % len(_FURTHER_COLOURS)]
            looks[method] = {"color": colour, "marker": marker, "markersize": 3, "markevery": 6}
            further += 1
    return looks


def recall_curve(found: dict) -> Markup:
    """Share of the queries whose best match is among the first k, for k up to 1000, by method."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("k (results looked at)", "Recall@k, %")
        looks = _looks(list(found["methods"]))
        for number, (method, recall) in enumerate(found["methods"].items()):
            # the first lines on top: a solid line would hide a dashed one
            axes.plot(found["k"], 100 * np.array(recall), label=method, zorder=20 - number, **looks[method])
        axes.set(xscale="log", xlim=(1, 1000), ylim=(0, 101))
        axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        if len(looks) > len(_COLOURS):  # above: there is no empty corner for so many
            axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        else:
            axes.legend(loc="lower right")
    return svg(figure, "Recall at k against k for each method")


def breakdown(found: dict, xlabel: str) -> Markup:
    """Recall@1 of each method in each class, with intervals where there are some; of many classes the largest."""
    queries = np.array([entry["queries"] for entry in found["classes"]])
    largest = np.sort(np.argsort(-queries, kind="stable")[:MAX_CLASSES])  # in their own order
    classes = [found["classes"][i] for i in largest if queries[i]]
    methods = list(classes[0]["methods"])
    with matplotlib.rc_context(_STYLE):
        many = len(classes) > 6  # then their names stand upright
        where = "after" if many else "below"
        figure, axes = _axes(f"{xlabel}\n({where} each class: its queries)", "Recall@1, %")
        width = 0.8 / len(methods)
        for number, (method, look) in enumerate(_looks(methods).items()):
            figures = [entry["methods"][method]["recall@1"] for entry in classes]
            values = np.array([100 * figure["value"] for figure in figures])
            x = np.arange(len(classes)) + (number - (len(methods) - 1) / 2) * width
            axes.bar(x, values, width * 0.9, color=look["color"], label=method)
            ends = [[figure[end] for figure in figures] for end in ("low", "high")]  # None: too few cells
            lengths = np.abs(100 * np.array(ends, float) - values)
            axes.errorbar(x, values, lengths, fmt="none", ecolor=_INK, elinewidth=0.8)
        ticks = [f"{entry['class']}{': ' if many else chr(10)}{entry['queries']:,}" for entry in classes]
        axes.set_xticks(range(len(classes)), ticks, fontsize=9, rotation=90 if many else 0)
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1, handlelength=1.2)
    return svg(figure, f"Recall at 1 of each method by {xlabel}")


def histogram(found: dict, method: str) -> Markup:
    """Cosines of matching pairs and of random pairs, each as a share of its own total."""
    edges = np.array(found["edges"])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(f"cosine of two images, {method}", "% of the pairs")
        for name, colour, line in (("matches", "#3a9d4e", "-"), ("non_matches", "#d4483b", ":")):
            counts = np.array(found[name], float)
            shares = 100 * counts / max(counts.sum(), 1)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.4, label=name.replace("_", "-"))
        axes.legend()
    return svg(figure, "Histograms of the cosine of matching pairs and of random pairs that do not match")


def training_curves(history: pd.DataFrame) -> Markup:
    """The loss and the validation mAP@R by epoch."""
    every = 1 + len(history) // 50  # epochs from marker to marker
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("epoch", "validation mAP@R, %")
        look = {"ms": 3, "markevery": every, "color": _COLOURS["trained"]}
        axes.plot(history["epoch"], 100 * history["val_map_at_r"], "o-", **look)
        axes.yaxis.label.set_color(_COLOURS["trained"])
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.plot(history["epoch"], history["loss"], "s--", **{**look, "color": _COLOURS["whitening"]})
        other.set_ylabel("training loss", color=_COLOURS["whitening"])
    return svg(figure, "Validation mAP at R and training loss by epoch")


def band_shares(history: pd.DataFrame) -> Markup | None:
    """Which share of the anchors drew its negatives from which band (0 is the hardest), by epoch; None where the
    history has no shares, as with negatives that are mined in the batch."""
    columns = [name for name in history if name.startswith("share_")]
    rows = history.dropna(subset=columns)
    if rows.empty:
        return None
    every = 1 + len(rows) // 100  # epochs to a step: the page stays small however long the training
    edges = np.append(rows["epoch"].iloc[::every], rows["epoch"].iloc[-1] + 1) - 0.5
    shares = rows[columns].groupby(np.arange(len(rows)) // every).mean()
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes("epoch", "% of the anchors")
        colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, len(columns)))
        labels = [name.removeprefix("share_").replace("_", " ") for name in columns]
        bottom = np.zeros(len(edges) - 1)
        for name, label, colour in zip(columns, labels, colours, strict=True):
            top = bottom + 100 * shares[name].to_numpy()
            axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=label)
            bottom = top
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 100))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return svg(figure, "Share of the anchors by band of their negatives, by epoch")
