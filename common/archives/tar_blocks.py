"""Bytes of a file, read as walking through a tar asks for them: forward, a little at a time or all of them."""

import os
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from common.archives.tar_headers import Read

CHUNK_BYTES = 2**20  # of a block: large for a file system, and still in the cache


def window(descriptor: int, chunk: int) -> Read:
    """Reads a file through one buffer of `chunk` bytes; a request outside of it moves it there.

    A function and not a class: it is called for each member, and finds what it holds faster.
    """
    start = end = 0
    buffer = b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, end, buffer
        at = offset - start
        if at < 0 or offset + size > end:
            at, start, wanted = 0, offset, max(size, chunk)
            buffer = os.pread(descriptor, wanted, offset)
            while len(buffer) < wanted and (
                more := os.pread(descriptor, wanted - len(buffer), offset + len(buffer))
            ):
                buffer += more
            end = start + len(buffer)
        return buffer[at : at + size]

    return read


class Blocks:
    """Reads a tar in blocks of CHUNK_BYTES, each in memory of its own, so that views of it last; and in a thread
    the next block, while this one is looked at.
    """

    def __init__(self, read_block: Callable[[int], memoryview], ahead: Executor):
        self._read, self._executor = read_block, ahead
        self._start, self._block = 0, memoryview(b"")
        self._ahead_start, self._ahead = 0, ahead.submit(self._read, 0)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        return bytes(self.view(offset, size))

    def view(self, offset: int, size: int) -> memoryview:
        """As `read`, and without a copy where one block holds them all."""
        at = self._find(offset)
        if at + size <= len(self._block):
            return self._block[at : at + size]
        copy, end = np.empty(size, np.uint8).data, 0
        while end < size and at < len(self._block):
            count = min(size - end, len(self._block) - at)
            copy[end : end + count] = self._block[at : at + count]
            end += count
            at = self._find(offset + end)
        return copy[:end]

    def _find(self, offset: int) -> int:
        """Where the byte at `offset` lies in the block, having moved there."""
        if not 0 <= offset - self._start < len(self._block):
            self._move(offset - offset % CHUNK_BYTES)
        return offset - self._start

    def _move(self, start: int) -> None:
        """Have the block that begins at `start`, and begin to read the one after it."""
        self._block = self._ahead.result() if self._ahead_start == start else self._read(start)
        self._start, self._ahead_start = start, start + CHUNK_BYTES
        self._ahead = self._executor.submit(self._read, self._ahead_start)


def read_block(descriptor: int, start: int) -> memoryview:
    """CHUNK_BYTES of a file from `start` on; fewer only at its end."""
    block = np.empty(CHUNK_BYTES, np.uint8).data  # not filled with zeros first, as a bytearray is
    end = 0
    while end < CHUNK_BYTES and (more := os.preadv(descriptor, [block[end:]], start + end)):
        end += more
    return block[:end]
