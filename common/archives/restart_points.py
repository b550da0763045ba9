"""Where inflating a gzip file can begin in the middle: what makes single images of a gzip tar cheap to read.

A restart point is the bit at which a deflate block begins, how much has been inflated before it, and the last 32
kB of that, to which the block may refer (as in zlib's examples/zran.c). Inflating libraries do not report where
blocks begin, so candidates are searched for (`block_starts`, as in Knespel and Brunst, "Rapidgzip", HPDC 2023,
section 3.4), and each is proved by inflating from it what has been inflated anyway.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW_BYTES = 2**15  # how far back deflate refers
BEYOND_BYTES = 16  # at the end of the data, where no block is sought: its header would not be whole
_BRIEFLY_BYTES = 2**17  # inflated to prove a point
_HEADER_BITS = 3 + 5 + 5 + 4  # of a dynamic block: its kind, and the sizes of its three codes
# Blocks without content, in the order of their bits: 10 in the fixed code; 95 with a code of their own, whose code
# lengths are 1 (coded as 0) for a literal, the end, and two distances, and 0 (two runs, coded as 1) for all others
_EMPTY_FIXED = "010" + "0000000"
_EMPTY_DYNAMIC = (
    "001"
    + "00000"
    + "10000"
    + "1111"
    + "000000100"
    + 14 * "000"
    + "100"
    + "000"
    + ("0" + "1" + "1111111" + "1" + "0101011" + "0" + "00" + "1")
)


class RestartPoint(NamedTuple):
    """A place in a gzip file at which inflating can begin."""

    offset: int  # bytes inflated before it, from the beginning of the file
    bit: int  # of the file: where the deflate block begins
    window: bytes  # the last WINDOW_BYTES of its gzip member before it, or as many as there are


def block_starts(data: bytes) -> np.ndarray:
    """Bits of `data` at which a deflate block may begin, rising, int64; of 2,000 bits one passes by chance.

    These are blocks with codes of their own, whose code for code lengths must be complete, and stored blocks (RFC
    1951, 3.2.7 and 3.2.4), but not a stream's last block or blocks with the fixed code.
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


def lead_in(bit: int, first_byte: int) -> bytes:
    """The bytes to give an inflater for the byte `first_byte` of a file in which a block begins, at `bit` of the
    file. The bits before the block are filled with empty blocks: of 10 bits, and one of 95 if their number is odd.
    (Stored blocks and the stream's end are aligned to bytes, so the block must begin at the same bit of a byte.)
    """
    skipped = bit % 8
    stream = _EMPTY_DYNAMIC * (skipped % 2) + _EMPTY_FIXED * ((skipped + 1) // 2 % 4)
    stream += f"{first_byte:08b}"[::-1][skipped:]  # the first bit of a byte is its lowest
    return int(stream[::-1], 2).to_bytes(len(stream) // 8, "little")


def inflate_briefly(data: bytes, bit: int, window: bytes) -> bytes:
    """Up to 128 kB of what `data` gives from the block that begins at `bit` on; empty if none does."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=window)
    try:
        return inflater.decompress(lead_in(bit, data[bit >> 3]) + data[(bit >> 3) + 1 :], _BRIEFLY_BYTES)
    except zlib.error:
        return b""
