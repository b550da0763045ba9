"""Small images and their labels, as they lie in a tar of the dataset."""

import io

import numpy as np
from PIL import Image

# target at 40, -74, 10 m; camera 15.5 m away, so that it looks 10 degrees east of north and 2 degrees up
_NUMBERS = "40 -74 10  0 1 0  39.99986272 -74.0000316 9.458725  15.5 10 2 0"


def jpeg(seed=0, size=(48, 32), **options) -> bytes:
    """Smooth colours."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def label(dataset=88, target=1, patch=1, view=1, tail="") -> bytes:
    """The text of a label; `tail` is what follows its first line."""
    return f"d {dataset} {target} {patch} {view} {_NUMBERS}\n{tail}".encode()
