"""preprocess/tars/jpegs.py. Oracle: images that were spoilt, or are flat, on purpose."""

import io

import pytest
from PIL import Image
from small_pairs import jpeg

from preprocess.tars import jpegs


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg()[:-2], "jpeg_corrupt"),  # no end marker
        (jpeg(size=(640, 640))[:9000] + b"\xff\xd9", "jpeg_corrupt"),  # cut, with an end marker: PIL shows grey
        (jpeg()[:300] + bytes(200) + jpeg()[500:], "jpeg_corrupt"),
        (b"<html>404</html>", "not_an_image"),
        (jpeg(size=(8, 8)), "jpeg_blank"),  # one block, one level
    ],
)
def test_bad_jpegs(content, reason):
    assert jpegs.inspect(content).reason.value == reason


@pytest.mark.parametrize("quality", [40, 95])
def test_flat_colours_are_blank_and_faint_fog_is_not(quality):
    for colour in ((0, 0, 0), (128, 128, 128), (255, 255, 255), (200, 30, 90)):
        buffer = io.BytesIO()
        Image.new("RGB", (640, 640), colour).save(buffer, "JPEG", quality=quality)
        assert jpegs.inspect(buffer.getvalue()).reason.value == "jpeg_blank"
    fog = Image.linear_gradient("L").point(lambda level: 200 + level // 16).resize((640, 640))  # 200..215
    buffer = io.BytesIO()
    fog.save(buffer, "JPEG", quality=quality)
    assert jpegs.inspect(buffer.getvalue()).width == 640


def test_progressive_and_grey_jpegs_are_images():
    assert jpegs.inspect(jpeg(progressive=True)).width == 48
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).convert("L").save(buffer, "JPEG")
    assert jpegs.inspect(buffer.getvalue()).height == 32
