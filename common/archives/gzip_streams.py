"""The content of gzip files, from the beginning or from a restart point, as far as damaged ones can be inflated.

Deflate data are inflated without their gzip frame, and the checksum is computed beside it: libraries that read the
frame withhold the last data of a stream whose checksum is wrong. Several gzip members in one file are one stream.
If deflate data are invalid or end early, everything before that point is given, to the byte.

Memory: READ_BYTES of the file, two pieces of its content, and 0.4 % of the content for restart points.
"""

import bisect
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from threading import Lock

from isal import isal_zlib

from common.archives import restart_points
from common.archives.restart_points import WINDOW_BYTES, RestartPoint, inflate_briefly
from common.archives.tar_blocks import Read, is_zeros

MAGIC = b"\x1f\x8b"
CUT_OFF = "the gzip stream is cut off (is the file as long as the one it was copied from?)"
SPACING_BYTES = 8 * 2**20  # of content from one restart point to the next: 25 ms to inflate
READ_BYTES = 2**18  # of the file, at a time
_PIECE_BYTES = 2**21  # inflated at a time, however well the data are compressed
_SEARCHED_BYTES = 2**16  # of the file, for the next block: blocks of JPEGs take about 32 kB
_SLICE_BYTES = 2**13  # of it, at a time
_PROVED_BYTES = 2**15  # of the file, inflated from a point to prove it
_LEAST_PROVED_BYTES = 1024  # of the content, that must be equal
_STEP_BYTES = 2**12  # of the file, on the way to where the data become invalid
_HEADER_BYTES = 2**17  # more than a gzip header takes
_TRAILER_BYTES = 8


class Stream:
    """The content of a gzip file, read at any place; cheaply where reads go forward, or `points` are near.

    Several threads may read. `points` grow where the file is read for the first time; `damages`: what is wrong
    with it as (byte of the content, what), as far as it has been read.
    """

    def __init__(self, read: Read, points: list[RestartPoint], kept_bytes: int = 0):
        """`kept_bytes`: how much of the latest content to keep, for threads that come a little late."""
        self.points, self.damages = points, list[tuple[int, str]]()
        self._read_file, self._kept_bytes, self._lock = read, kept_bytes, Lock()
        self._jump(None)

    def _jump(self, point: RestartPoint | None) -> None:
        self._pieces = inflate(self._read_file, self.points, self.damages, point)
        self._kept: deque[tuple[int, bytes]] = deque()  # of the content: offset and bytes, without gaps
        self._position = point.offset if point else 0  # of the next piece

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the content at `offset`; fewer only at its end."""
        with self._lock:
            point = _last_point(self.points, offset)
            start = self._kept[0][0] if self._kept else self._position
            if offset < start or (point and point.offset > self._position):
                self._jump(point)
            while self._position < offset + size and (piece := self._next_piece()):
                self._kept.append((self._position, piece))
                self._position += len(piece)
                needed_from = min(offset, self._position - self._kept_bytes)
                while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= needed_from:
                    self._kept.popleft()
            parts = [
                piece[max(0, offset - at) : offset + size - at]
                for at, piece in self._kept
                if at < offset + size and offset < at + len(piece)
            ]
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_piece(self) -> bytes:
        try:
            return next(self._pieces, b"")
        except OSError:
            self._jump(None)  # a generator that has raised gives no more
            raise


def inflate(
    read: Read, points: list[RestartPoint], damages: list[tuple[int, str]], point: RestartPoint | None = None
) -> Iterator[bytes]:
    """The content of a gzip file, in pieces of at most 2 MB, from `point` on if it is given.

    Restart points are appended to `points` where none is near, and to `damages` what is wrong, and where.
    """
    at, offset = (point.bit // 8, point.offset) if point else (0, 0)  # of the file and of the content

    def note(what: str) -> None:
        if (offset, what) not in damages:  # a part of a file may be read again
            damages.append((offset, what))

    while at == 0 or point or read(at, 1):
        start = point
        if start is None:
            size = _header_size(read(at, _HEADER_BYTES))
            if size is None:
                if at == 0:
                    note("the gzip header is damaged")
                elif not is_zeros(read, at):
                    note("data after the gzip stream that are not gzip")
                return
            start = RestartPoint(offset, 8 * (at + size), b"")
            if not points or offset - points[-1].offset >= SPACING_BYTES:
                points.append(start)
        member_offset = offset
        at, offset, checksum, what = yield from _deflated(read, start, points)
        trailer = read(at, _TRAILER_BYTES)
        if what or len(trailer) < _TRAILER_BYTES:
            note(what or CUT_OFF)
            return
        if point is None and trailer[:4] != checksum.to_bytes(4, "little"):
            note("the gzip stream's checksum is wrong")
        if point is None and trailer[4:] != ((offset - member_offset) % 2**32).to_bytes(4, "little"):
            note("the gzip stream's length is wrong")
        at, point = at + _TRAILER_BYTES, None


def _deflated(
    read: Read, start: RestartPoint, points: list[RestartPoint]
) -> Generator[bytes, None, tuple[int, int, int, str]]:
    """The content of the deflate stream in which `start` lies, from there on; returns the byte of the file after
    it, the byte of the content, the checksum, and what is wrong there, or "".
    """
    at, offset, window, checksum = start.bit // 8, start.offset, start.window, 0
    inflater = isal_zlib.decompressobj(-zlib.MAX_WBITS, zdict=window)
    pending, what = _lead_in(read, start), ""
    at += 1 - len(pending)  # `pending` takes the place of the bytes of the file up to the one after the point's
    due_at = points[-1].offset + SPACING_BYTES  # of the next restart point, in the content
    while not inflater.eof and not what:
        pending = pending or read(at, READ_BYTES)
        try:
            if offset >= due_at and len(pending) > _SEARCHED_BYTES:
                piece, used = _inflate_to_point(inflater, pending, 8 * at, offset, window, points)
                was_found = points[-1].offset >= offset
                due_at = offset + (SPACING_BYTES if was_found else SPACING_BYTES // 8)
            else:
                piece, used = _feed(inflater, pending)
            what = "" if pending or piece else CUT_OFF
        except isal_zlib.IsalError:
            what = "invalid deflate data"
        if what:
            last = _last_point(points, offset)
            piece, used = _salvaged(read, max(start, last or start), offset), 0
        pending, at, offset = pending[used:], at + used, offset + len(piece)
        checksum = isal_zlib.crc32(piece, checksum)
        window = piece[-WINDOW_BYTES:] if len(piece) >= WINDOW_BYTES else (window + piece)[-WINDOW_BYTES:]
        if piece:
            yield piece
    return at, offset, checksum, what


def _lead_in(read: Read, point: RestartPoint) -> bytes:
    """What to inflate in place of the byte of the file that `point` is in; empty at the file's end."""
    first = read(point.bit // 8, 1)
    return restart_points.lead_in(point.bit, first[0]) if first else b""


def _feed(inflater, data: bytes) -> tuple[bytes, int]:
    """What comes out of `data`, at most _PIECE_BYTES, and how many bytes that takes."""
    piece = inflater.decompress(data, _PIECE_BYTES)
    return piece, len(data) - len(inflater.unconsumed_tail) - len(inflater.unused_data)


def _inflate_to_point(
    inflater, data: bytes, bit: int, offset: int, window: bytes, points: list[RestartPoint]
) -> tuple[bytes, int]:
    """As `_feed`, up to a block and somewhat beyond; its start is appended to `points` if it is confirmed.

    `bit`: of the file, where `data` begin; `offset` and `window`: of what has been inflated before.
    """
    before, done = b"", 0
    for start in _candidates(data):
        # up to the byte in which the block begins: less than its header is in it, and nothing of its content
        piece, used = _feed(inflater, data[done : -(-start // 8)])
        before, done = before + piece, done + used
        if inflater.eof or inflater.unconsumed_tail or len(before) > _PIECE_BYTES:
            break
        point = RestartPoint(offset + len(before), bit + start, (window + before)[-WINDOW_BYTES:])
        proof = data[start // 8 : start // 8 + _PROVED_BYTES]
        proved = inflate_briefly(proof, start % 8, point.window)
        if len(proved) >= _LEAST_PROVED_BYTES:
            piece, used = _feed(inflater, data[done : start // 8 + len(proof)])
            before, done = before + piece, done + used
            common = min(len(proved), len(piece))
            if common >= _LEAST_PROVED_BYTES and proved[:common] == piece[:common]:
                points.append(point)
            break
    return before, done


def _candidates(data: bytes) -> Iterator[int]:
    """Bits of `data` at which a block may begin, in rising order, searched for as far as they are requested."""
    for begin in range(0, _SEARCHED_BYTES, _SLICE_BYTES):
        searched = data[begin : begin + _SLICE_BYTES + restart_points.BEYOND_BYTES]
        yield from (8 * begin + bit for bit in restart_points.block_starts(searched).tolist())


def _salvaged(read: Read, point: RestartPoint, offset: int) -> bytes:
    """The content from `offset` until the data become invalid, inflated from `point` on, at last byte by byte."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=point.window)
    content, data, first = bytearray(), _lead_in(read, point), point.bit // 8 + 1
    at, step, skipped = first, _STEP_BYTES, offset - point.offset
    while data and not inflater.eof:
        before = inflater.copy()
        try:
            piece = inflater.decompress(data)
        except zlib.error:
            if step == 1 or at == first:
                break
            inflater, piece, step, at = before, b"", 1, at - len(data)
        content += piece[skipped:]
        skipped = max(0, skipped - len(piece))
        data = read(at, step)
        at += len(data)
    return bytes(content)


def _last_point(points: list[RestartPoint], offset: int) -> RestartPoint | None:
    """The last of `points` up to `offset`."""
    number = bisect.bisect_right(points, offset, key=lambda point: point.offset)
    return points[number - 1] if number else None


def _header_size(header: bytes) -> int | None:
    """Bytes of the gzip header that `header` begins with; None if it begins with none (RFC 1952, 2.3)."""
    if len(header) < 10 or header[:2] != MAGIC or header[2] != 8:
        return None
    flags, size = header[3], 10
    if flags & 4:  # an extra field
        size += 2 + int.from_bytes(header[size : size + 2], "little")
    for flag in (8, 16):  # a name, a comment
        if flags & flag:
            size = header.find(b"\0", size) + 1 or len(header) + 1
    size += flags & 2  # a checksum of the header
    return size if size <= len(header) else None
