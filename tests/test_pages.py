"""common/pages.py: templates, figures as SVG, and their colours."""

from itertools import combinations

import jinja2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from common import pages

# how linear red, green, blue look to those who lack a cone (Machado et al. 2009, severity 1)
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear red, green, blue."""
    x, y, z = np.cbrt(np.clip(TO_XYZ @ rgb, 0, None) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_values_are_escaped_counted_and_required(tmp_path):
    template = tmp_path / "page.html"
    template.write_text(
        "{% if true %}\n<p>{{ name }} {{ count | number }} {{ share | number }}</p>\n{% endif %}\n"
    )
    assert pages.render(template, name="<a>", count=12_345, share=0.5) == "<p>&lt;a&gt; 12,345 0.5</p>\n"
    with pytest.raises(jinja2.UndefinedError, match="count"):
        pages.render(template, name="")


def test_figures_are_named_take_the_pages_colour_and_are_reproducible():
    def draw():
        figure = Figure()
        figure.text(0.5, 0.5, "text", color=pages.INK)
        return pages.svg(figure, 'a "name"')

    assert draw() == draw()
    assert "currentColor" in draw()
    assert pages.INK not in draw()
    assert 'aria-label="a &#34;name&#34;"' in draw()
    assert " id=" not in draw().split("<defs>")[0]  # ids would repeat from figure to figure


@pytest.mark.parametrize("num_bands", [1, 7, 20])
def test_each_band_has_a_colour_of_its_own_and_random_is_grey(num_bands):
    colours = pages.arm_colours(num_bands)
    assert len(set(colours)) == len(colours) == num_bands + 1
    assert colours[-1] == "#8c8c8c"
    assert colours[0] == pages.arm_colours(7)[0]  # the hardest looks the same in every figure


@pytest.mark.parametrize("people", SEEN_BY)
def test_the_colour_blind_tell_the_palette_apart(people):
    seen = [lab(SEEN_BY[people] @ linear(colour)) for colour in pages.PALETTE]
    least = min(np.linalg.norm(one - other) for one, other in combinations(seen, 2))
    assert least > 12  # 2.3 is just noticeable; two of tab10's first six are 6 apart for protanopes
