"""JPEGs checked without decoding all their pixels: whole or broken, blank or not, and how large.

At 1/8 scale the decoder still reads all of the file's entropy-coded data, where damage shows, but computes one
pixel of each 8 x 8 block. Strict: what a browser would patch over is an error here.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg
import xxhash

from common.schemas import Reject
from preprocess.labels import Rejected

# In grey levels, between the darkest and the brightest 8 x 8 block. One flat colour gives 0 at every quality;
# a photograph of fog or of a white wall more than 10.
BLANK_RANGE = 3


class Jpeg(NamedTuple):
    width: int  # px
    height: int
    content_hash: int  # xxh3-64 of the file's bytes


def inspect(content: bytes | memoryview) -> Jpeg | Rejected:
    """Size and hash of a JPEG, or why it is rejected: JPEG_CORRUPT or JPEG_BLANK."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content, strict=True)
        grey = simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, strict=True)  # 1/8: the smallest
    except ValueError as error:
        return Rejected(Reject.JPEG_CORRUPT, str(error)[:200])
    # two pixels of nearly every photograph differ by more: there the others need not be looked at
    if abs(grey.item(0) - grey.item(-1)) <= BLANK_RANGE and int(grey.max()) - int(grey.min()) <= BLANK_RANGE:
        return Rejected(Reject.JPEG_BLANK, f"grey level {int(np.median(grey))} everywhere")
    return Jpeg(width, height, xxhash.xxh3_64_intdigest(content))
