"""Perceptual hashes of JPEGs, 64 bits each: equal or nearly so for pictures that look alike.

pHash: the signs of the lowest 8 x 8 frequencies of the picture at 32 x 32, against their median. dHash: whether
each of 8 x 9 grey levels is below its right neighbour's. Both as in the library `imagehash`, bit for bit; the
first bit of its matrix is the highest of ours.
"""

import io
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash
from PIL import Image
from scipy import fft

from common import tars
from common.errors import PipelineError

# "fast" decodes at the smallest scale with both sides this long: 1/4 of 640 px, five pixels for each of pHash's 32
FAST_MIN_PX = 128
_PHASH_SIZE = (32, 32)
_DHASH_SIZE = (9, 8)  # width, height


def hash_images(contents: list[bytes], method: str) -> tuple[np.ndarray, np.ndarray]:
    """pHash and dHash of N JPEGs, (N,) uint64 each. `method`: data.fingerprint, "fast" or "exact"."""
    shrunk = [_shrink(decode_grey(content, method)) for content in contents]
    for_phash = np.array([image for image, _ in shrunk], np.uint8).reshape(-1, *_PHASH_SIZE)
    for_dhash = np.array([image for _, image in shrunk], np.uint8).reshape(-1, *_DHASH_SIZE[::-1])
    return phash_bits(for_phash), dhash_bits(for_dhash)


def hash_members(tar: Path, offsets, sizes, content_hashes, method: str) -> tuple[np.ndarray, np.ndarray]:
    """`hash_images` of members of a tar. Raises PipelineError if their bytes are not those of `content_hashes`."""
    contents = tars.read_members(tar, offsets, sizes)
    found = np.array([xxhash.xxh3_64_intdigest(content) for content in contents], np.uint64)
    if not np.array_equal(found, content_hashes):
        raise PipelineError(
            f"{tar} has other images than when process_tar.py read it, though it is as large\n"
            "put the old tar back, or run process_tar.py and what follows with --overwrite"
        )
    return hash_images(contents, method)


def decode_grey(content: bytes, method: str) -> Image.Image:
    """The picture in grey levels: as PIL makes it ("exact"), or the brightness channel at reduced scale."""
    if method == "exact":
        return Image.open(io.BytesIO(content)).convert("L")
    pixels = simplejpeg.decode_jpeg(content, "GRAY", min_height=FAST_MIN_PX, min_width=FAST_MIN_PX)
    return Image.fromarray(pixels[:, :, 0])


def phash_bits(images: np.ndarray) -> np.ndarray:
    """(N,) uint64 from (N, 32, 32) grey levels."""
    frequencies = fft.dctn(images.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    return _pack(frequencies > np.median(frequencies, axis=1, keepdims=True))


def dhash_bits(images: np.ndarray) -> np.ndarray:
    """(N,) uint64 from (N, 8, 9) grey levels."""
    return _pack(images[:, :, 1:] > images[:, :, :-1])


def _shrink(grey: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(grey.resize(_PHASH_SIZE, lanczos)), np.asarray(grey.resize(_DHASH_SIZE, lanczos))


def _pack(bits: np.ndarray) -> np.ndarray:
    """64 bits per row as a number, the first one the highest."""
    return np.packbits(bits.reshape(-1, 64), axis=1).view(">u8")[:, 0].astype(np.uint64)
