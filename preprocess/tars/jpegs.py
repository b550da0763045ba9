"""Checks of images without decoding all their pixels: damaged or not, blank or not, and how large."""

from typing import NamedTuple

import numpy as np
import xxhash

from common.imagery import decoding
from common.schemas import Reject, Rejected

# In grey levels, between the darkest and the brightest 8 x 8 block. One flat colour gives 0 at every quality;
# a photograph of fog or of a white wall more than 10.
BLANK_RANGE = 3


class Jpeg(NamedTuple):
    width: int  # px, of the upright picture
    height: int
    content_hash: int  # xxh3-64 of the file's bytes


def inspect(content: bytes) -> Jpeg | Rejected:
    """Size and hash of an image, or why it is rejected: JPEG_BLANK, or as `decoding` says."""
    try:
        width, height, grey = decoding.survey(content)
    except decoding.Undecodable as error:
        return error.why
    if np.ptp(grey) <= BLANK_RANGE:
        return Rejected(Reject.JPEG_BLANK, f"grey level {int(np.median(grey))} everywhere")
    return Jpeg(width, height, xxhash.xxh3_64_intdigest(content))
