"""gzip files read as what they hold, from the beginning or from a restart point, and as much of damaged ones as
can be had.

Deflate data are inflated without their gzip frame and the checksum is formed beside it: libraries that look at the
frame do not give the last data of a stream whose checksum is wrong. Several gzip members in one file are one
stream. Where the deflate data themselves make no sense, or end early, what stands before is given, to the byte.

Memory: READ_BYTES of the file, two pieces of what it holds, and the restart points: 32 kB for each SPACING_BYTES
(0.4 % of what the file holds: 57 MB for a tar of 14 GB).
"""

import bisect
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from threading import Lock

from isal import isal_zlib

from common.archives.restart_points import (
    ANY_WINDOW,
    BEYOND_BYTES,
    WINDOW_BYTES,
    RestartPoint,
    block_starts,
    inflate_briefly,
    lead_in,
)

MAGIC = b"\x1f\x8b"
CUT_OFF = "the gzip stream is cut off (is the file as long as the one it was copied from?)"
SPACING_BYTES = 8 * 2**20  # of inflated data from one restart point to the next: 25 ms to inflate
READ_BYTES = 2**18  # of the file, at a time
_PIECE_BYTES = 2**21  # inflated at a time, however well the data are compressed
_SEARCHED_BYTES = 2**16  # of the file, for the next block: blocks of JPEGs take about 32 kB
_SLICE_BYTES = 2**13  # of it, at a time
_PAUSE_BYTES = 2**20  # of the content, until a block is sought again after a search in vain
_PROVED_BYTES = 2**15  # of the file, inflated from a point to prove it
_LEAST_PROVED_BYTES = 1024  # of the content, that must be equal
_STEP_BYTES = 2**12  # of the file, on the way to where the data make no sense
_BLOCK_BYTES = 512
_HEADER_BYTES = 2**17  # more than a gzip header takes
_TRAILER_BYTES = 8
_EXTRA, _NAME, _COMMENT, _HEADER_CRC = 4, 8, 16, 2  # flags of a header (RFC 1952, 2.3)

Read = Callable[[int, int], bytes]  # up to `size` bytes at `offset`; fewer only at the end of the file


class Stream:
    """The content of a gzip file, read at any place; cheaply where reads go forward, or `points` are there.

    Several threads may read. `points` grow where the file is read for the first time; `damages`: what is wrong
    with it as (byte of the content, what), as far as it has been read.
    """

    def __init__(self, read: Read, points: list[RestartPoint], kept_bytes: int = 0):
        """`kept_bytes`: of what was inflated last, for threads that come a little late."""
        self.points, self.damages = points, list[tuple[int, str]]()
        self._most_kept = kept_bytes
        self._read, self._lock = read, Lock()
        self._pieces = inflate(read, points, self.damages)
        self._kept: deque[tuple[int, bytes]] = deque()  # of the content: offset and bytes, without gaps
        self._kept_bytes = self._position = 0  # _position: of the next piece
        self._has_failed = False  # the disk, as the last thing: then there are no more pieces

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the content at `offset`; fewer only at its end."""
        with self._lock:
            start = self._kept[0][0] if self._kept else self._position
            nearest = bisect.bisect_right(self.points, offset, key=lambda point: point.offset) - 1
            is_ahead = nearest >= 0 and self.points[nearest].offset > self._position
            if offset < start or is_ahead or self._has_failed:
                self._jump(self.points[nearest] if nearest >= 0 else None)
            self._has_failed = True  # if what follows raises
            while self._position < offset + size and (piece := next(self._pieces, b"")):
                self._keep(piece, offset)
            self._has_failed = False
            parts = []
            for at, piece in self._kept:
                if at < offset + size and offset < at + len(piece):
                    parts.append(piece[max(0, offset - at) : offset + size - at])
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def _jump(self, point: RestartPoint | None) -> None:
        self._pieces = inflate(self._read, self.points, self.damages, point)
        self._kept.clear()
        self._kept_bytes, self._position = 0, point.offset if point else 0

    def _keep(self, piece: bytes, needed_from: int) -> None:
        """Hold on to `piece`, and let go of what is too long ago, but for what lies beyond `needed_from`."""
        self._kept.append((self._position, piece))
        self._position += len(piece)
        self._kept_bytes += len(piece)
        while self._kept_bytes > self._most_kept and self._kept[0][0] + len(self._kept[0][1]) <= needed_from:
            self._kept_bytes -= len(self._kept.popleft()[1])


def inflate(
    read: Read, points: list[RestartPoint], damages: list[tuple[int, str]], point: RestartPoint | None = None
) -> Iterator[bytes]:
    """What a gzip file holds, in pieces of at most 2 MB; from `point` on, if there is one.

    Restart points are added to `points` where none is near, and to `damages` what is wrong, and where.
    """
    at = 0 if point is None else point.bit // 8  # byte of the file
    offset = 0 if point is None else point.offset
    while True:
        start, checksum, length = point, 0, 0
        if start is None:
            # few headers take more than a block
            size = _header_size(read(at, _BLOCK_BYTES)) or _header_size(read(at, _HEADER_BYTES))
            if size is None:
                if at == 0:
                    _note(damages, offset, "the gzip header is damaged")
                elif not is_zeros(read, at):
                    _note(damages, offset, "data behind the gzip stream that are not gzip")
                return
            start = RestartPoint(offset, 8 * (at + size), b"")
            if not points or offset - points[-1].offset >= SPACING_BYTES:
                points.append(start)
        pieces = _deflated(read, start, points)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                at, what = end.value
                break
            checksum = isal_zlib.crc32(piece, checksum)
            length += len(piece)
            yield piece
        offset += length
        if what:
            _note(damages, offset, what)
            return
        trailer = read(at, _TRAILER_BYTES)
        if len(trailer) < _TRAILER_BYTES:
            _note(damages, offset, CUT_OFF)
            return
        if point is None and trailer[:4] != checksum.to_bytes(4, "little"):
            _note(damages, offset, "the gzip stream's checksum is wrong")
        if point is None and trailer[4:] != (length % 2**32).to_bytes(4, "little"):
            _note(damages, offset, "the gzip stream's length is wrong")
        at, point = at + _TRAILER_BYTES, None
        if not read(at, 1):
            return


def _deflated(
    read: Read, start: RestartPoint, points: list[RestartPoint]
) -> Generator[bytes, None, tuple[int, str]]:
    """What the deflate stream in which `start` lies gives from there on; returns the byte of the file after it,
    and what is wrong there, or "".
    """
    at, offset, window = start.bit // 8, start.offset, start.window
    first = read(at, 1)
    lead = lead_in(start, first[0]) if first else None
    if lead is None:
        return at, CUT_OFF
    dictionary, pending, extra = lead
    at += 1 - len(pending)  # `pending` stands for the bytes of the file from here on
    inflater = isal_zlib.decompressobj(-zlib.MAX_WBITS, zdict=dictionary)
    search_from = start.offset  # of the content
    while not inflater.eof:
        pending = pending or read(at, READ_BYTES)
        due_at = max(points[-1].offset + SPACING_BYTES, search_from)
        try:
            if not extra and len(pending) > _SEARCHED_BYTES and offset >= due_at:
                piece, used = _inflate_to_point(inflater, pending, 8 * at, offset, window, points)
                if points[-1].offset < offset:  # in vain
                    search_from = offset + _PAUSE_BYTES
            else:
                piece = inflater.decompress(pending, _PIECE_BYTES)
                used = len(pending) - len(inflater.unconsumed_tail) - len(inflater.unused_data)
        except isal_zlib.IsalError:
            yield from _salvaged(read, _last_before(points, offset, start), offset)
            return at, "invalid deflate data"
        if not pending and not piece:
            yield from _salvaged(read, _last_before(points, offset, start), offset)
            return at, CUT_OFF
        pending, at = pending[used:], at + used
        piece, extra = piece[extra:], max(0, extra - len(piece))
        offset += len(piece)
        window = piece[-WINDOW_BYTES:] if len(piece) >= WINDOW_BYTES else (window + piece)[-WINDOW_BYTES:]
        if piece:
            yield piece
    return at, ""


def _inflate_to_point(
    inflater, data: bytes, bit: int, offset: int, window: bytes, points: list[RestartPoint]
) -> tuple[bytes, int]:
    """Inflate `data` up to a block and somewhat beyond, and add the block's beginning to `points` if it is proved;
    returns what came out, and how many bytes that took.

    `bit`: of the file, where `data` begin; `offset` and `window`: of what has been inflated before.
    """
    for start in _candidates(data):
        proof = data[start // 8 : start // 8 + _PROVED_BYTES]
        if inflate_briefly(proof, start % 8, ANY_WINDOW) is None:
            continue
        # with the byte in which the block begins: less than its header is there, and nothing of what it holds
        head = -(-start // 8)
        before = inflater.decompress(data[:head], _PIECE_BYTES)
        if inflater.eof or inflater.unconsumed_tail:
            return before, head - len(inflater.unconsumed_tail) - len(inflater.unused_data)
        after = inflater.decompress(data[head : start // 8 + len(proof)], _PIECE_BYTES)
        point = RestartPoint(offset + len(before), bit + start, (window + before)[-WINDOW_BYTES:])
        proved = inflate_briefly(proof, start % 8, point.window) or b""
        common = min(len(proved), len(after))
        if common >= _LEAST_PROVED_BYTES and proved[:common] == after[:common]:
            points.append(point)
        unused = len(inflater.unconsumed_tail) + len(inflater.unused_data)
        return before + after, start // 8 + len(proof) - unused
    piece = inflater.decompress(data, _PIECE_BYTES)
    return piece, len(data) - len(inflater.unconsumed_tail) - len(inflater.unused_data)


def _candidates(data: bytes) -> Iterator[int]:
    """Bits of `data` at which a block may begin, in rising order, searched for as far as they are asked for."""
    for begin in range(0, _SEARCHED_BYTES, _SLICE_BYTES):
        # what a header may take is looked at twice
        for bit in block_starts(data[begin : begin + _SLICE_BYTES + BEYOND_BYTES]).tolist():
            yield 8 * begin + bit


def _salvaged(read: Read, point: RestartPoint, offset: int) -> Iterator[bytes]:
    """What comes beyond `offset` before the data make no sense: from `point` on, in the end byte by byte."""
    lead = lead_in(point, read(point.bit // 8, 1)[0])
    if lead is None:
        return
    dictionary, data, extra = lead
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, zdict=dictionary)
    known = extra + offset - point.offset
    at, step = point.bit // 8 + 1 - len(data), _STEP_BYTES  # the first data stand for the bytes up to the point's
    while data and not inflater.eof:
        before = inflater.copy()
        try:
            piece = inflater.decompress(data)
            at += len(data)
        except zlib.error:
            if step == 1:
                return
            inflater, piece, step = before, b"", step // 64
        if piece[known:]:
            yield piece[known:]
        known = max(0, known - len(piece))
        data = read(at, step)


def _last_before(points: list[RestartPoint], offset: int, start: RestartPoint) -> RestartPoint:
    """The last of `points` up to `offset` and behind `start`, or that."""
    number = bisect.bisect_right(points, offset, key=lambda point: point.offset) - 1
    return points[number] if number >= 0 and points[number].offset > start.offset else start


def _header_size(header: bytes) -> int | None:
    """Bytes of the gzip header that `header` begins with; None if it does with none (RFC 1952, 2.3)."""
    if len(header) < 10 or header[:2] != MAGIC or header[2] != 8:
        return None
    flags, size = header[3], 10
    if flags & _EXTRA:
        size += 2 + int.from_bytes(header[size : size + 2], "little")
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            size = header.find(b"\0", size) + 1 or len(header) + 1
    size += 2 if flags & _HEADER_CRC else 0
    return size if size <= len(header) else None


def is_zeros(read: Read, at: int) -> bool:
    """Whether all bytes of the file from `at` on are 0."""
    while data := read(at, READ_BYTES):
        if data.count(0) < len(data):
            return False
        at += len(data)
    return True


def _note(damages: list[tuple[int, str]], offset: int, what: str) -> None:
    """Add a damage, once: a part of a file may be read again."""
    if (offset, what) not in damages:
        damages.append((offset, what))
