"""Where inflating a gzip file can begin in the middle: what makes single images of a gzip tar cheap to read.

A restart point is the bit at which a deflate block begins, how much has been inflated before it, and the last
32 kB of that, to which the block may refer (as in zlib's examples/zran.c). Inflating libraries do not tell where
blocks begin, so candidates are searched for (`block_starts`, as in Knespel and Brunst, "Rapidgzip", HPDC 2023,
section 3.4), and each is proved by inflating from it what has been inflated anyway.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW_BYTES = 2**15  # how far back deflate refers
BEYOND_BYTES = 16  # of the data, in which no block is sought: its header would not be whole
ANY_WINDOW = b"\xff" * WINDOW_BYTES  # for a first look at a candidate, wherever it may be
_BRIEFLY_BYTES = 2**17  # inflated to prove a point
_HEADER_BITS = 3 + 5 + 5 + 4  # of a dynamic block: its kind, and the sizes of its three codes
_NINE_BITS_FROM = 144  # literals from here on take nine bits in deflate's fixed code, those below eight


class RestartPoint(NamedTuple):
    """A place in a gzip file at which inflating can begin."""

    offset: int  # bytes inflated before it, from the beginning of the file
    bit: int  # of the file: where the deflate block begins
    window: bytes  # the last WINDOW_BYTES of its gzip member before it, or as many as there are


def block_starts(data: bytes) -> np.ndarray:
    """Bits of `data` at which a deflate block may begin, rising, int64; of 2,000 bits one passes by chance.

    Sought are blocks with codes of their own, whose code for code lengths must be complete, and stored blocks
    (RFC 1951, 3.2.7 and 3.2.4), but for a stream's last block and blocks with the fixed code.
    """
    words = np.ndarray(len(data), "<u8", data + bytes(8), strides=(1,))  # the eight bytes from each byte on

    def fields(bits: np.ndarray) -> np.ndarray:
        """The 57 bits from each bit on, as uint64."""
        return words[bits >> 3] >> (bits & 7).astype(np.uint64)

    shifts = np.arange(8, dtype=np.uint64)
    bits = np.flatnonzero((words[:-BEYOND_BYTES, None] >> shifts & 7) == 0b100)  # not the last; codes of its own
    headers = fields(bits)
    valid = ((headers >> 3 & 31) < 30) & ((headers >> 8 & 31) < 30)  # at most 286 literals and 30 distances
    bits, num_lengths = bits[valid], (headers[valid] >> 13 & 15) + 4
    lengths = fields(bits + _HEADER_BITS) & (np.uint64(1) << 3 * num_lengths) - np.uint64(1)
    space = sum(_code_space()[lengths >> np.uint64(12 * n) & np.uint64(0xFFF)] for n in range(5))
    kinds, sizes = (
        words[:-BEYOND_BYTES],
        words[1 : 1 - BEYOND_BYTES],
    )  # of a stored block: the size, its complement
    stored = np.flatnonzero((kinds & 0xE0 == 0) & ((sizes ^ sizes >> 16) & 0xFFFF == 0xFFFF))
    return np.sort(np.concatenate([bits[space == 128], 8 * stored + 5]))


@lru_cache(1)
def _code_space() -> np.ndarray:
    """(4096,) int64: how much of the space of codes, in 128ths, four code lengths of three bits each take up."""
    lengths = np.arange(4096)[:, None] >> np.array([0, 3, 6, 9]) & 7
    return np.where(lengths > 0, 128 >> lengths, 0).sum(axis=1)


def lead_in(point: RestartPoint, first_byte: int) -> tuple[bytes, bytes, int] | None:
    """What an inflater must be given to go on at `point`: a dictionary, and bytes in place of the file's byte in
    which the block begins, `first_byte`; and how many bytes of what comes out then to drop.

    The inflater must find the block at the right bit of a byte: stored blocks and the stream's end depend on that.
    So the bytes are a block with the fixed code that ends there: it gives the end of the window once more, with
    as many literals of nine bits as it takes. None if the window does not have so many.
    """
    if point.bit % 8 == 0:
        return point.window, bytes([first_byte]), 0
    wanted = (point.bit - 3 - 7) % 8  # its kind takes three bits, its end seven
    window = np.frombuffer(point.window, np.uint8)
    long_ones = np.flatnonzero(window >= _NINE_BITS_FROM)
    if len(long_ones) < wanted:
        return None
    count = len(window) - int(long_ones[-wanted]) if wanted else 0
    again = window[len(window) - count :].tolist()
    literals = [
        f"{0x30 + byte:08b}" if byte < _NINE_BITS_FROM else f"{0x190 + byte - _NINE_BITS_FROM:09b}"
        for byte in again
    ]
    stream = "".join(["010", *literals, "0000000"])  # the first bit of a byte is its lowest
    stream += f"{first_byte:08b}"[::-1][point.bit % 8 :]
    return point.window[: len(window) - count], int(stream[::-1], 2).to_bytes(len(stream) // 8, "little"), count


def inflate_briefly(data: bytes, bit: int, window: bytes) -> bytes | None:
    """What `data` gives from the block that begins at `bit` on, 128 kB at most; None if none does."""
    lead = lead_in(RestartPoint(0, bit, window), data[bit >> 3])
    if lead is None:
        return None
    dictionary, prefix, extra = lead
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=dictionary)
    try:
        return inflater.decompress(prefix + data[(bit >> 3) + 1 :], _BRIEFLY_BYTES)[extra:]
    except zlib.error:
        return None
