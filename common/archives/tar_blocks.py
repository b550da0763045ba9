"""Bytes of a file, as walking through an archive asks for them: forward, a little at a time or all of them."""

import os
from collections.abc import Callable
from concurrent.futures import Executor

Read = Callable[[int, int], bytes]  # up to `size` bytes at `offset`; fewer only at the end of the file
CHUNK_BYTES = 2**20  # of a block: large for a file system, and still in the cache


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes of an open file; fewer only at its end, unlike a single pread."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def buffered(descriptor: int, buffer_bytes: int) -> Read:
    """Reads an open file through one buffer. A closure, not a class: it is called for each member, and faster."""
    start, buffer = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, buffer
        at = offset - start
        if at < 0 or at + size > len(buffer):
            at, start, buffer = 0, offset, read_at(descriptor, offset, max(size, buffer_bytes))
        return buffer[at : at + size]

    return read


def is_zeros(read: Read, at: int) -> bool:
    """Whether all bytes of a file from `at` on are 0."""
    while data := read(at, CHUNK_BYTES):
        if data.count(0) < len(data):
            return False
        at += len(data)
    return True


class Blocks:
    """Reads a file in blocks of CHUNK_BYTES, each in memory of its own, so that views of it stay valid. A thread
    of `executor` reads the next block meanwhile.
    """

    def __init__(self, read: Read, executor: Executor):
        self._read_file, self._executor = read, executor
        self._start, self._block = 0, memoryview(b"")
        self._prefetch(0)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        return bytes(self.view(offset, size))

    def view(self, offset: int, size: int) -> memoryview:
        """As `read`, and without a copy where one block holds them all."""
        at = self._find(offset)
        if at + size <= len(self._block):
            return self._block[at : at + size]
        copy = bytearray()
        while len(copy) < size and (part := self._block[at : at + size - len(copy)]):
            copy += part
            at = self._find(offset + len(copy))
        return memoryview(copy)

    def _find(self, offset: int) -> int:
        """The position of `offset` in the current block, after moving to the block that holds it."""
        if not 0 <= offset - self._start < len(self._block):
            start = offset - offset % CHUNK_BYTES
            is_next = start == self._next_start
            self._block = memoryview(self._next.result() if is_next else self._read_file(start, CHUNK_BYTES))
            self._start = start
            self._prefetch(start + CHUNK_BYTES)
        return offset - self._start

    def _prefetch(self, start: int) -> None:
        self._next_start, self._next = start, self._executor.submit(self._read_file, start, CHUNK_BYTES)
