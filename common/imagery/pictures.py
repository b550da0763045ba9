"""Thumbnails of images in tars, and sheets of them, for people to look at."""

import contextlib
import io
import math
from itertools import accumulate
from typing import NamedTuple

import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common.errors import PipelineError
from common.imagery import decoding
from common.imagery.tar_images import TarImages

PX = 160  # height and width of a small picture
_FONT_PX, _GAP_PX, _TITLE_PX, _CAPTION_PX = 13, 8, 24, 20  # of a sheet


def small(content: bytes, px: int = PX) -> Image.Image | None:
    """An image, px x px; None if `content` is not one."""
    try:
        image = Image.fromarray(decoding.decode(content, min_px=px))
    except decoding.Undecodable:
        return None
    return image.resize((px, px), Image.Resampling.LANCZOS)


def read(store: TarImages, rows: pa.Table, px: int = PX) -> list[Image.Image | None]:
    """The thumbnails, px x px, of rows with tar_file, image_offset and image_size; None if the tar is missing, or
    does not hold an image there.
    """
    places = [tuple(row.values()) for row in rows.select(["tar_file", "image_offset", "image_size"]).to_pylist()]
    thumbnails: dict[tuple, Image.Image | None] = {}
    for name, offset, size in sorted(places):  # tar by tar, each from front to back
        with contextlib.suppress(PipelineError):
            thumbnails[name, offset, size] = small(store.tar(name).read([offset], [size])[0], px)
    return [thumbnails.get(place) for place in places]


class Line(NamedTuple):
    """A line of a sheet: its title, and pictures with their captions; without pictures the title alone."""

    title: str
    pictures: list[Image.Image]
    captions: list[str]


def absent() -> Image.Image:
    """The placeholder in a sheet for an image that cannot be read."""
    tile = Image.new("RGB", (PX, PX), "#dddddd")
    font = ImageFont.load_default(_FONT_PX)
    ImageDraw.Draw(tile).text((PX // 2, PX // 2), "cannot be read", "black", font, anchor="mm")
    return tile


def sheet(lines: list[Line]) -> bytes:
    """A PNG of lines of pictures, none of them scaled."""
    columns = max(len(line.pictures) for line in lines)
    width = max((image.width for line in lines for image in line.pictures), default=PX)
    height = max((image.height for line in lines for image in line.pictures), default=PX)
    across, down = width + _GAP_PX, _TITLE_PX + height + _CAPTION_PX
    font = ImageFont.load_default(_FONT_PX)
    widest = max(columns * across, *(math.ceil(font.getlength(line.title)) + _GAP_PX for line in lines))
    bottoms = list(accumulate(down if line.pictures else _TITLE_PX for line in lines))
    page = Image.new("RGB", (_GAP_PX + widest, _GAP_PX + bottoms[-1]), "white")
    pen = ImageDraw.Draw(page)
    for line, above in zip(lines, [0, *bottoms], strict=False):
        top = above + _TITLE_PX
        pen.text((_GAP_PX, top - 4), line.title, "black", font, anchor="ld")
        for place, (image, caption) in enumerate(zip(line.pictures, line.captions, strict=True)):
            left = _GAP_PX + place * across
            page.paste(image, (left, top))
            pen.text((left + image.width // 2, top + image.height + 2), caption, "black", font, anchor="ma")
    picture = io.BytesIO()
    page.save(picture, "PNG")
    return picture.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG with the same bytes in every run."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
