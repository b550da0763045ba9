"""Bytes of a file, as walking through an archive asks for them: forward, a little at a time or all of them."""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future

Read = Callable[[int, int], bytes]  # up to `size` bytes at `offset`; fewer only at the end of the file
CHUNK_BYTES = 2**20  # read at a time: large for a file system, and still in the cache


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes of an open file; fewer only at its end, unlike a single pread."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def buffered(read: Read, chunk_bytes: int, executor: Executor | None = None) -> Read:
    """Reads forward through one buffer, a chunk at a time; a thread of `executor` reads the next chunk meanwhile.

    A closure, not a class: it is called for each member, and finds what it holds faster.
    """
    start, buffer = 0, b""
    ahead: tuple[int, Future[bytes]] | None = None  # the next chunk: offset and content

    def chunk(offset: int) -> bytes:
        nonlocal ahead
        content = ahead[1].result() if ahead and ahead[0] == offset else read(offset, chunk_bytes)
        if executor:
            end = offset + len(content)
            ahead = end, executor.submit(read, end, chunk_bytes)
        return content

    def get(offset: int, size: int) -> bytes:
        nonlocal start, buffer
        at = offset - start
        if at < 0 or at + size > len(buffer):
            if size > chunk_bytes:  # not through the buffer: it would be in memory twice
                return read(offset, size)
            buffer = buffer[at:] if at >= 0 else b""
            at, start = 0, offset
            while len(buffer) < size and (more := chunk(start + len(buffer))):
                buffer += more
        return buffer[at : at + size]

    return get


def is_zeros(read: Read, at: int) -> bool:
    """Whether all bytes of a file from `at` on are 0."""
    while data := read(at, CHUNK_BYTES):
        if data.count(0) < len(data):
            return False
        at += len(data)
    return True
