"""common/pages.py: templates, figures as SVG, and the colours of the bands."""

import jinja2
import pytest
from matplotlib.figure import Figure

from common import pages


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
