"""Small pictures of images that lie in tars, and sheets of them, for a person to look at."""

import io
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

PX = 160  # height and width of a small picture


def small(content: bytes) -> Image.Image | None:
    """A JPEG, PX x PX; None if `content` is not an image."""
    try:
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (PX, PX))
        return image.convert("RGB").resize((PX, PX), Image.Resampling.LANCZOS)
    except OSError:  # PIL's errors about an image's bytes are OSErrors too
        return None


def read(tar_path: Path, offset: int, size: int) -> Image.Image | None:
    """The same of an image in a tar; None if the tar is missing or does not hold an image there."""
    try:
        with open(tar_path, "rb") as tar:
            tar.seek(offset)
            return small(tar.read(size))
    except OSError:
        return None


class Line(NamedTuple):
    """A line of a sheet: its title, and pictures with what stands under each."""

    title: str
    pictures: list[Image.Image]
    captions: list[str]


def sheet(lines: list[Line], columns: int) -> bytes:
    """A PNG of lines of up to `columns` pictures, all of the same shape."""
    across = max((image.width / image.height for line in lines for image in line.pictures), default=1.0)
    figure = Figure(figsize=(1.6 * across * columns, 1.95 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for row, line in zip(axes, lines, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, image, caption in zip(row, line.pictures, line.captions, strict=False):
            axis.imshow(image)
            axis.text(0.5, -0.02, caption, transform=axis.transAxes, ha="center", va="top", fontsize=7)
        row[0].set_title(line.title, fontsize=8, loc="left")
    return png(figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG that is the same in every run."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
