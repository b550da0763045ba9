"""common/imagery/pictures.py: sheets. Oracle: pictures of one colour each, found again where they belong."""

import io

import numpy as np
from embedding_setup import jpeg, picture
from image_kinds import claiming, encoded
from PIL import Image, ImageOps

from common.imagery import pictures
from common.imagery.pictures import _CAPTION_PX, _GAP_PX, _TITLE_PX, PX, Line


def test_a_small_picture_is_pillows_and_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (jpeg(picture(640, 480), exif=exif), encoded(picture(640, 480), "PNG", exif=exif)):
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        expected = np.asarray(whole.resize((PX, PX), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(pictures.small(content)) - expected).mean() < 2  # not turned: 17


def test_what_is_no_image_or_too_large_has_no_small_picture():
    content = jpeg(picture(80, 80))
    for bad in (b"", b"<html>", content[:300], claiming(content, 65_500, 65_500)):
        assert pictures.small(bad) is None


def test_a_title_wider_than_its_pictures_is_shown_whole():
    one = [Image.new("RGB", (PX, PX), "red")]
    for title in ("a", "a title that is far too long for a single picture, and ends in a square \u2588"):
        page = Image.open(io.BytesIO(pictures.sheet([Line(title, one, [""])])))
        right = np.asarray(page.crop((page.width - _GAP_PX, 0, page.width, _TITLE_PX)))
        assert (right == 255).all()  # the margin
    inked = (np.asarray(page.crop((0, 0, page.width, _TITLE_PX))) < 128).any(axis=(0, 2))
    assert page.width - np.flatnonzero(inked)[-1] < 3 * _GAP_PX  # up to the end


def test_a_line_without_pictures_is_its_title_alone():
    one = Line("a", [Image.new("RGB", (PX, PX), "red")], [""])
    heights = [Image.open(io.BytesIO(pictures.sheet(lines))).height for lines in ([one], [one, Line("b", [], [])])]
    assert heights[1] - heights[0] == _TITLE_PX


def test_every_picture_stands_in_its_line_and_column_with_its_title_and_caption():
    colours = [["red", "lime"], ["blue"]]
    lines = [
        Line(f"line {n}", [Image.new("RGB", (PX, PX), name) for name in names], names)
        for n, names in enumerate(colours)
    ]
    page = Image.open(io.BytesIO(pictures.sheet(lines)))
    for number, names in enumerate(colours):
        top = number * (_TITLE_PX + PX + _CAPTION_PX)
        assert np.asarray(page.crop((0, top, page.width, top + _TITLE_PX))).min() < 128  # a title
        for place, name in enumerate(names):
            left, under = _GAP_PX + place * (PX + _GAP_PX), top + _TITLE_PX + PX
            box = (left, top + _TITLE_PX, left + PX, under)
            assert page.crop(box).getcolors() == Image.new("RGB", (PX, PX), name).getcolors()
            caption = np.asarray(page.crop((left, under, left + PX, under + _CAPTION_PX)))
            assert (caption[:, 40:-40].min(), caption[:, :20].min()) == (0, 255)  # in the middle
