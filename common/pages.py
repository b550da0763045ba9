"""HTML templates, figures as inline SVG, and their shared style and colours.

Loads matplotlib, so only modules that draw import it.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

INK = "#0a0b0c"  # replaced by the page's text colour in the SVG
# Okabe and Ito's: the colour-blind tell them apart
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION = PALETTE
GREY = "#8c8c8c"
SPLIT_COLOURS = {"train": BLUE, "val": ORANGE, "test": GREEN, "all": BLUE}
METHOD_LOOKS: dict[str, dict[str, Any]] = {  # of the methods of an evaluation: different in more than colour
    "raw": {"color": GREY, "linestyle": ":"},
    "pca": {"color": PURPLE, "linestyle": "-."},
    "whitening": {"color": ORANGE, "linestyle": "--"},
    "trained": {"color": BLUE, "linestyle": "-"},
}
_MARKERS = cycler(marker=list("osD^vP")) + cycler(markersize=[3] * 6) + cycler(markevery=[6] * 6)
_FURTHER_LOOKS = _MARKERS * cycler(color=(GREEN, VERMILLION, SKY))
STYLE: dict[Any, Any] = {  # Any: matplotlib's type enumerates its settings
    "svg.fonttype": "none",  # text stays text: smaller, and in the page's font
    "text.parse_math": False,  # method names come from file names: "$" is literal
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def arm_colours(num_bands: int) -> list[str]:
    """A colour for each difficulty band, from orange (band 0, the hardest) to blue, then grey for "random"."""
    return [*map(to_hex, matplotlib.colormaps["plasma"](np.linspace(0.8, 0.1, num_bands))), GREY]


def looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` for each method of an evaluation."""
    further = _FURTHER_LOOKS()  # without end
    return {method: METHOD_LOOKS.get(method) or next(further) for method in methods}


def axes(xlabel: str, ylabel: str) -> Any:
    """Matplotlib's Axes in a new figure of the usual size. Call this, and plot, within rc_context(STYLE)."""
    plot: Any = Figure(figsize=(4.2, 3.0), layout="constrained").add_subplot(xlabel=xlabel, ylabel=ylabel)
    plot.set_axisbelow(True)
    plot.grid(axis="y", color="#80808040", linewidth=0.6)
    return plot


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an <svg> element with `alt` as its name. Equal figures give equal bytes."""
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # unused, and ids would repeat in the page
    view_box = re.findall(r'viewBox="[^"]*"', text)[0]
    text = f'<svg {view_box} role="img" aria-label="{escape(alt)}"' + text[text.index(">") :]
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip())


def render(template: Path, **values) -> str:
    """A rendered template. Values are escaped, and a missing one is an error; `number` is a filter."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(template.name).render(values)


def number(value) -> str:
    """Integers with thousands separators, everything else unchanged."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
