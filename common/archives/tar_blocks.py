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
    """Reads forward through one buffer, a chunk at a time. `executor`: of a thread that requests the next chunk
    meanwhile, for a `read` that computes, and keeps what it gave last.

    A closure, not a class: it is called for each member, and finds what it holds faster.
    """
    start, buffer = 0, b""
    ahead: Future[bytes] | None = None

    def get(offset: int, size: int) -> bytes:
        nonlocal start, buffer, ahead
        at = offset - start
        if at < 0 or at + size > len(buffer):
            if size > chunk_bytes:  # not through the buffer: it would be in memory twice
                return read(offset, size)
            if ahead:
                ahead.exception()  # wait; an error is raised again below
            at, start, buffer = 0, offset, read(offset, chunk_bytes)
            ahead = executor.submit(read, offset + chunk_bytes, chunk_bytes) if executor else None
        return buffer[at : at + size]

    return get


def is_zeros(read: Read, at: int) -> bool:
    """Whether all bytes of a file from `at` on are 0."""
    while data := read(at, CHUNK_BYTES):
        if data.count(0) < len(data):
            return False
        at += len(data)
    return True
