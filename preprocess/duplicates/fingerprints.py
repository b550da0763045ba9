"""Perceptual hashes of images, 64 bits each: equal or nearly so for pictures that look alike.

pHash: the signs of the lowest 8 x 8 frequencies of the picture at 32 x 32, against their median. dHash: whether
each of 8 x 9 grey levels is below its right neighbour's. Both as in the library `imagehash`, bit for bit; the
first bit of its matrix is the highest of ours.

"exact" is that library. "fast" decodes the brightness channel alone and shrinks it by two matrix products with the
weights of PIL's Lanczos filter, rounding between them as PIL does: of 369 synthetic views 92 % of the pHashes and
94 % of the dHashes are the same, and none is further off than 2 bits. Decoding at 1/2 scale would save more, but a
clear sky is so level that its dHash hangs on single grey levels: 77 % were the same.
"""

import re
from collections.abc import Callable
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image
from scipy import fft

from common import parquet, schemas
from common.archives.tar_parts import TarPart
from common.errors import PipelineError
from common.imagery import decoding
from common.imagery.tar_images import TarImages

CHUNK = 64  # images that a thread reads and hashes at once
_PHASH_SIZE = (32, 32)
_DHASH_SIZE = (9, 8)  # width, height
_RUN = 4  # neighbours in a row, added up before they are weighed: a quarter of the products
_RUN_FROM = 512  # pixels across, where neighbours' weights hardly differ
_LANCZOS_SUPPORT = 3.0  # the filter reaches this many pixels of the smaller picture to either side


def hash_images(contents: list[bytes], method: str) -> tuple[np.ndarray, np.ndarray]:
    """pHash and dHash of N images, (N,) uint64 each. `method`: data.fingerprint, "fast" or "exact"."""
    if method == "exact":
        pictures = [Image.fromarray(decoding.decode(content)).convert("L") for content in contents]
        found = [[hashed(picture).hash for picture in pictures] for hashed in (imagehash.phash, imagehash.dhash)]
        phash, dhash = (_pack(np.array(bits, bool)) for bits in found)
        return phash, dhash
    shrunk = [_shrink(content) for content in contents]
    for_phash = np.array([image for image, _ in shrunk], np.uint8).reshape(-1, *_PHASH_SIZE[::-1])
    for_dhash = np.array([image for _, image in shrunk], np.uint8).reshape(-1, *_DHASH_SIZE[::-1])
    return phash_bits(for_phash), dhash_bits(for_dhash)


def refuse_whole_tars(folder: Path) -> None:
    """Raises PipelineError if `folder` holds files of an older version, which made one for each tar."""
    old = [path for path in sorted(folder.glob("*.parquet")) if not re.fullmatch(r".+-\d+", path.stem)]
    if old:
        raise PipelineError(
            f"{old[0]} is of an older version, which made one file for each tar\n"
            f"delete it and the others of this kind ({len(old):,} in all): each part of a tar has its own file now"
        )


def write(part: TarPart, store: TarImages, method: str, pool: Executor, on_images: Callable[[int], None]) -> None:
    """The fingerprints of a part's images, in order. `on_images` is told how many more are done; what it raises
    ends the work. Raises ChangedTar if the tar's images are not those of the intermediates any more.
    """
    rows = part.rows()
    read = store.tar(part.tar.name).reader(rows)
    starts = range(0, len(rows), CHUNK)

    def hashes_from(start: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return hash_images(read(start, start + CHUNK), method)
        except decoding.Undecodable as error:
            raise PipelineError(
                f"{part.tar} has an image that cannot be decoded: {error}\n"
                "run process_tar.py again with --overwrite"
            ) from None

    hashes = [pool.submit(hashes_from, start) for start in starts]
    try:
        with parquet.writer(part.target, schemas.FINGERPRINTS, part.made) as out:
            for start, future in zip(starts, hashes, strict=True):
                phash, dhash = future.result()
                ids = rows.slice(start, CHUNK).select(["streetview_image_id", "building_id"])
                out.append({name: ids[name] for name in ids.column_names} | {"phash": phash, "dhash": dhash})
                on_images(len(phash))
            out.rows = {"in": len(rows)}
    finally:  # ended by a signal or an error, the queue is not worked off
        for future in hashes:
            future.cancel()


def phash_bits(images: np.ndarray) -> np.ndarray:
    """(N,) uint64 from (N, 32, 32) grey levels."""
    frequencies = fft.dctn(images.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    return _pack(frequencies > np.median(frequencies, axis=1, keepdims=True))


def dhash_bits(images: np.ndarray) -> np.ndarray:
    """(N,) uint64 from (N, 8, 9) grey levels."""
    return _pack(images[:, :, 1:] > images[:, :, :-1])


def _shrink(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The grey levels that pHash (32, 32) and dHash (8, 9) are made from, within one of PIL's: across for both
    hashes at once, rounded, then down.
    """
    grey = decoding.decode_grey(content)
    height, width = grey.shape
    if width % _RUN == 0 and width >= _RUN_FROM:
        levels, weights = _sums_of_runs(grey), _weights_of_runs(width)
    else:
        levels, weights = grey.astype(np.float32), _weights(width, _PHASH_SIZE[0], _DHASH_SIZE[0])
    across = _rounded(levels @ weights)  # (height, 32 + 9)
    down = _rounded(_weights(height, _PHASH_SIZE[1], _DHASH_SIZE[1]).T @ across)  # (32 + 8, 32 + 9)
    rows, columns = _PHASH_SIZE[1], _PHASH_SIZE[0]
    return down[:rows, :columns], down[rows:, columns:]


def _sums_of_runs(grey: np.ndarray) -> np.ndarray:
    """(H, W) uint8 -> (H, W / 4) float32: sums of four neighbours, which are one word."""
    words = grey.view(np.uint32)
    pairs = (words & 0x00FF00FF) + (words >> 8 & 0x00FF00FF)
    return ((pairs & 0xFFFF) + (pairs >> 16)).astype(np.float32)


def _rounded(levels: np.ndarray) -> np.ndarray:
    """To whole grey levels; the filter overshoots beside edges."""
    return np.clip(np.rint(levels), 0, 255)


@lru_cache(maxsize=64)
def _weights(length: int, *shorter: int) -> np.ndarray:
    """(length, sum of shorter) float32: a line of `length` pixels times this is that line at each shorter length.

    The Lanczos filter as in PIL's Image.resize: stretched by the factor of shrinking, cut off at the line's ends,
    each output's weights adding up to 1.
    """
    parts = []
    for size in shorter:
        scale = length / size
        stretch = max(scale, 1.0)
        centre = (np.arange(size) + 0.5) * scale
        x = (np.arange(length)[:, None] + 0.5 - centre) / stretch
        near = np.where(np.abs(x) < _LANCZOS_SUPPORT, np.sinc(x) * np.sinc(x / _LANCZOS_SUPPORT), 0.0)
        parts.append(near / near.sum(axis=0))
    return np.concatenate(parts, axis=1).astype(np.float32)


@lru_cache(maxsize=64)
def _weights_of_runs(length: int) -> np.ndarray:
    """(length / 4, 32 + 9) float32: the weights of `_sums_of_runs`, means of those of their pixels."""
    return _weights(length, _PHASH_SIZE[0], _DHASH_SIZE[0]).reshape(length // _RUN, _RUN, -1).mean(axis=1)


def _pack(bits: np.ndarray) -> np.ndarray:
    """64 bits per row as a number, the first one the highest."""
    return np.packbits(bits.reshape(-1, 64), axis=1).view(">u8")[:, 0].astype(np.uint64)
