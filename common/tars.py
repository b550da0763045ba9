"""Tars read in place: who their members are and where their bytes lie, without extracting anything.

Headers of ustar, GNU (long names, sizes in base 256) and pax (path, size) tars are read here, front to back, with
their checksums: eight times as fast as `tarfile`, and a damaged tar gives everything before the damage. Nearly all
members are plain files with a short name, whose header `_plain_file` reads; all others take `_unusual_member`.

Memory: two blocks of CHUNK_BYTES, and the largest member, of at most MAX_CONTENT_BYTES. The contents of members
are views of the blocks that they were read in, or copies where they lie in several; views keep theirs in memory.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple
from zlib import adler32

import numpy as np

from common.errors import PipelineError

CHUNK_BYTES = 2**20  # of a block when contents are wanted: large for a file system, and still in the cache
MAX_CONTENT_BYTES = 64 * 2**20  # a larger member is not an image or a label of the dataset
_BLOCK = 512
_INDEX_BYTES = 3 * _BLOCK  # of one read when they are not: a label's header, its content, and the next header
_MAX_EXTENDED_BYTES = 2**20  # of a long name or a pax header
_ZEROS = bytes(_BLOCK)
# of a header: name, digits of the size and the byte after them, checksum, type, first byte of the name's prefix
_FIELDS = Struct("100s 24x 11s B 12x 8s B 188x B 166x")
_PLAIN = ord("0")
Read = Callable[[int, int], bytes]  # up to `size` bytes at `offset`; fewer only at the end of the file
_new = tuple.__new__  # takes half the time of a NamedTuple's own constructor
_REGULAR = (b"0", b"\0", b"7")
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")  # they say something of the member that follows, or of all
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"6")  # links, devices, pipes: whatever their size field says
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}


class Member(NamedTuple):
    """A file, link or directory of a tar."""

    name: str
    offset: int  # bytes from the start of the tar to its data
    size: int  # bytes
    kind: str  # "file", "directory" or "other" (links, devices, sparse files)
    content: memoryview | None = None  # if it was asked for: of a file of at most MAX_CONTENT_BYTES


class Damage(Exception):
    """The tar ends, or makes no sense, at byte `offset`; `member`: the name of the one that is cut off, or ""."""

    def __init__(self, offset: int, detail: str, member: str = ""):
        super().__init__(f"{detail} at byte {offset:,}")
        self.offset, self.member = offset, member


class BadSector(PipelineError):
    """The disk does not give some bytes of a tar; it may give the others."""


class _Header(NamedTuple):
    name: bytes
    size: int
    type: bytes
    is_continued: bool


def of_shard(raw_dir: Path, shard: int, num_shards: int) -> list[Path]:
    """The tars whose rank in the sorted listing of `raw_dir` is `shard` modulo `num_shards`."""
    there = sorted(raw_dir.iterdir()) if raw_dir.is_dir() else []
    # macOS leaves "._0088.tar" beside what it copies
    listing = [p for p in there if p.suffix.lower() == ".tar" and p.is_file() and not p.name.startswith(".")]
    compressed = [p for p in there if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", p.name, re.IGNORECASE)]
    lost = [p for p in there if p.suffix.lower() == ".tar" and not p.is_file()]
    if lost:
        what = "is a folder" if lost[0].is_dir() else "links to a file that does not exist"
        raise PipelineError(f"{lost[0]} {what}\nput the tar back, or take this out of paths.raw_dir")
    stems = [p.stem for p in listing]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise PipelineError(f"{raw_dir} has {twice[0]}.tar twice, in small and capital letters\nkeep one of them")
    if compressed:
        raise PipelineError(
            f"{compressed[0]} is compressed, or has something after .tar in its name"
            f"{f' ({len(compressed):,} such files)' if len(compressed) > 1 else ''}\n"
            "decompress it, or take it out of paths.raw_dir: images are read from plain tars by their offsets"
        )
    if not listing:
        what = (
            "does not exist"
            if not raw_dir.exists()
            else "is a file"
            if raw_dir.is_file()
            else "holds no .tar file"
        )
        raise PipelineError(f"{raw_dir} {what}\nput the dataset's tars there, or set paths.raw_dir")
    return listing[shard::num_shards]


def walk(path: Path, contents: bool = False) -> Iterator[Member]:
    """The members of a tar, front to back; with their bytes if `contents`, each byte being read once.

    Raises Damage where the tar is cut off or garbled, after all members before that; PipelineError if it is
    compressed.
    """
    with _open(path) as file, ThreadPoolExecutor(1) as ahead:
        blocks = _Blocks(file.fileno(), ahead) if contents else None
        read: Read = (blocks or _Window(file.fileno(), _INDEX_BYTES)).read
        _refuse_compressed(path, read(0, _BLOCK))
        file_bytes = os.fstat(file.fileno()).st_size
        shared: dict[str, bytes] = {}  # pax records that hold for all members
        at = 0
        while (block := read(at, _BLOCK)) != _ZEROS:
            member = None if shared else _plain_file(block, at + _BLOCK)
            if member is not None:
                name, data, size, kind, _ = member
                end = data + size
            else:
                member, stored = _unusual_member(read, at, shared)
                name, data, size, kind, _ = member
                end = data + stored
            if end > file_bytes:
                there = max(0, file_bytes - data)
                raise Damage(at, f"{there:,} of {end - data:,} bytes are there of a member that begins", name)
            if blocks and kind == "file" and size <= MAX_CONTENT_BYTES:
                member = _new(Member, (name, data, size, kind, blocks.view(data, size)))
            yield member
            at = end + -end % _BLOCK
        _check_end(read, at)


def read_members(path: Path, offsets, sizes) -> list[bytes]:
    """The bytes of members, by where they lie; neighbours are read at once. Raises PipelineError if some lack,
    BadSector if the disk does not give one of them.
    """
    offsets, sizes = [int(offset) for offset in offsets], [int(size) for size in sizes]
    if not offsets:
        return []
    with _open(path) as file:
        first = min(offsets)
        span = max(offset + size for offset, size in zip(offsets, sizes, strict=True)) - first
        together = span <= 2 * sum(sizes)
        # the spans between are headers and labels: cheaper to read than to skip
        window = _Window(file.fileno(), span if together else 0)
        if together:
            window.read(first, span)
        members = [window.read(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    if [len(member) for member in members] != sizes:
        raise PipelineError(
            f"{path} is shorter than when its members were listed: it has been replaced or cut off\n"
            "put the tar back, or run process_tar.py again"
        )
    return members


def printable(name: str) -> str:
    """A member's name as text that can be stored: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Window:
    """Reads a file through one buffer of `chunk` bytes; a request outside of it moves it there."""

    def __init__(self, descriptor: int, chunk: int):
        self._descriptor, self._chunk = descriptor, chunk
        self._start = self._end = 0
        self._buffer = b""

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        at = offset - self._start
        if at < 0 or offset + size > self._end:
            self._move(offset, max(size, self._chunk))
            at = 0
        return self._buffer[at : at + size]

    def _move(self, offset: int, size: int) -> None:
        """Hold `size` bytes from `offset` on."""
        buffer = os.pread(self._descriptor, size, offset)
        while len(buffer) < size and (
            more := os.pread(self._descriptor, size - len(buffer), offset + len(buffer))
        ):
            buffer += more
        self._buffer, self._start, self._end = buffer, offset, offset + len(buffer)


class _Blocks:
    """Reads a file in blocks of CHUNK_BYTES, each in memory of its own, so that views of it last; and in a thread
    the next block, while this one is looked at.
    """

    def __init__(self, descriptor: int, ahead: Executor):
        self._descriptor, self._executor = descriptor, ahead
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

    def _read(self, start: int) -> memoryview:
        block = np.empty(CHUNK_BYTES, np.uint8).data  # not filled with zeros first, as a bytearray is
        end = 0
        while end < CHUNK_BYTES and (more := os.preadv(self._descriptor, [block[end:]], start + end)):
            end += more
        return block[:end]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The tar, unbuffered. Raises PipelineError that names it where it cannot be opened, or read in the block
    (BadSector if that is for some of its bytes).
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: put the tar back, or set paths.raw_dir") from None
    except OSError as error:
        kind = BadSector if error.errno == errno.EIO else PipelineError
        raise kind(f"{path} cannot be read: {error.strerror}") from None


def _plain_file(block: bytes, data: int) -> Member | None:
    """The file whose header is `block` and whose data begins at `data`; None if that needs a second look."""
    if len(block) < _BLOCK:
        return None
    name, digits, after_size, checksum, kind, prefix = _FIELDS.unpack(block)
    if kind != _PLAIN or prefix or after_size or adler32(block) & 0xFFFF != _adler_of(checksum):
        return None
    try:
        size, text = int(digits, 8), name.partition(b"\0")[0].decode()
    except ValueError:  # or the name is not UTF-8
        return None
    return _new(Member, (text, data, size, "file", None)) if size >= 0 else None


@lru_cache(2**16)
def _adler_of(field: bytes) -> int:
    """The lower half of the Adler-32 of a header with this checksum field, if it is right; -1 if it is no number.

    That half is 1 + the sum of all bytes, modulo 65,521: what the field says, in a twelfth of the time of sum().
    """
    checksum = _number(field)
    return -1 if checksum is None else (1 + checksum - 8 * ord(" ") + sum(field)) % 65_521


def _unusual_member(read: Read, start: int, shared: dict[str, bytes]) -> tuple[Member, int]:
    """The member whose first header is at `start`, and how many bytes it stores.

    `shared`: pax records that hold for all members, updated where the tar does.
    """
    at = start
    own: dict[str, bytes] = {}  # of this member alone; where two headers say one thing, the first counts
    while True:
        block = read(at, _BLOCK)
        if len(block) < _BLOCK:
            raise Damage(start, "the tar is cut off" if block or own else "the tar ends without its end marker")
        header = _parse_header(block, at)
        data = at + _BLOCK
        if header.type not in _EXTENDED:
            break
        record = _extended(read, header, data, at)
        if header.type == b"g":
            shared.update(record)
        else:
            own = {**record, **own}
        at = data + _padded(header.size)

    records = {**shared, **own}
    name = records.get("path", header.name).decode("utf-8", "surrogateescape")
    size = _pax_size(records, header.size, at)
    while header.is_continued:  # an old GNU sparse file lists its parts in blocks of their own
        more = read(data, _BLOCK)
        header = header._replace(is_continued=len(more) == _BLOCK and more[504] != 0)
        data += _BLOCK
    if header.type == b"5" or (header.type == b"\0" and header.name.endswith(b"/")):
        return Member(name, data, size, "directory"), 0
    if header.type in _WITHOUT_DATA:
        return Member(name, data, size, "other"), 0
    return Member(name, data, size, "file" if header.type in _REGULAR else "other"), size


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic) and start[257:262] != b"ustar":
            raise PipelineError(
                f"{path} is compressed ({method})\n"
                "decompress it first: images are read out of the tar by their offsets, again and again"
            )


def _check_end(read: Read, at: int) -> None:
    """Raise Damage unless everything from the block of zeros at `at` on is zeros: the end marker and padding."""
    offset = at
    while chunk := read(offset, 2**20):
        if chunk.count(0) < len(chunk):
            raise Damage(at, "zeros, with more data behind them,")
        offset += len(chunk)


def _parse_header(block: bytes, at: int) -> _Header:
    """The fields of a 512-byte header. Raises Damage if its checksum or its size is wrong."""
    field = block[148:156]
    if adler32(block) & 0xFFFF != _adler_of(field) and _number(field) != _signed_checksum(block):
        raise Damage(at, "there is no valid header")
    size = _number(block[124:136])
    if size is None or size < 0:
        raise Damage(at, "there is a header without a valid size")
    kind = block[156:157]
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(name, size, kind, kind == b"S" and block[482] != 0)


def _signed_checksum(block: bytes) -> int:
    """The checksum as some old programs formed it: of signed bytes."""
    return sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 256


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or in base 256 where the first bit is set; None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _extended(read: Read, header: _Header, data: int, at: int) -> dict[str, bytes]:
    """What an extended header says of the member that follows: {"path": ..., "size": ...}, as far as it does."""
    if header.size > _MAX_EXTENDED_BYTES:
        raise Damage(at, f"there is an extended header of {header.size:,} bytes")
    content = read(data, header.size)
    if len(content) < header.size:
        raise Damage(at, "the tar is cut off in an extended header")
    if header.type == b"L":
        return {"path": content.partition(b"\0")[0]}
    return {} if header.type == b"K" else _pax_records(content, at)


def _pax_records(content: bytes, at: int) -> dict[str, bytes]:
    """The path and size of pax records, each "LENGTH key=value\\n" with the length of all of it."""
    records = {}
    while content and content[0]:
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if length > len(content) or not equals or not value.endswith(b"\n"):
            raise Damage(at, "there is a pax header that cannot be read")
        if key in (b"path", b"size"):
            records[key.decode()] = value[:-1]
        content = content[length:]
    return records


def _pax_size(records: dict[str, bytes], size: int, at: int) -> int:
    text = records.get("size", b"")
    if not text:
        return size
    if not text.isdigit() or len(text) > 18:
        raise Damage(at, "there is a pax header without a valid size")
    return int(text)
