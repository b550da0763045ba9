"""What pages and pictures share: filling in HTML templates, figures as inline SVG, their style and their colours.

It loads matplotlib, so only modules that draw import it.
"""

import io
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK = "#0a0b0c"  # drawn with this, then replaced by the page's text colour
STYLE: dict[Any, Any] = {  # matplotlib's own type lists the names of all settings
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "text.parse_math": False,  # methods are named after files: "$" is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def arm_colours(num_bands: int) -> list[str]:
    """A colour for each band of difficulty, from orange (band 0, the hardest) to blue, then one for "random"."""
    return [*map(to_hex, matplotlib.colormaps["plasma"](np.linspace(0.8, 0.1, num_bands))), "#8c8c8c"]


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
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and ids would repeat in the page
    view_box = re.findall(r'viewBox="[^"]*"', text)[0]
    text = f'<svg {view_box} role="img" aria-label="{escape(alt)}"' + text[text.index(">") :]
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip())


def render(template: Path, **values) -> str:
    """The page of a template. Values are escaped, a missing one is an error; `number` is available as a filter."""
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
    """Counts with thousands separators, everything else as it is."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
