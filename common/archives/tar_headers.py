"""Headers of tars: ustar, GNU (long names, sizes in base 256) and pax (path, size), with their checksums.

Nearly all members are plain files with a short name, whose header `plain_file` reads; all others take
`unusual_member`, and where a tar is damaged, `find_header` looks for the next header.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import NamedTuple
from zlib import adler32

BLOCK = 512
Read = Callable[[int, int], bytes]  # up to `size` bytes at `offset`; fewer only at the end of the tar
_SEARCHED_BYTES = 2**20  # at a time, for a header
_MAX_EXTENDED_BYTES = 2**20  # of a long name or a pax header
# of a header: name, digits of the size and the byte after them, checksum, type, first byte of the name's prefix
_FIELDS = Struct("100s 24x 11s B 12x 8s B 188x B 166x")
_PLAIN = ord("0")
_new = tuple.__new__  # takes half the time of a NamedTuple's own constructor
_REGULAR = (b"0", b"\0", b"7")
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")  # they say something of the member that follows, or of all
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"6")  # links, devices, pipes: whatever their size field says
_TYPES = (*_REGULAR, *_EXTENDED, *_WITHOUT_DATA, b"5", b"S", b"D", b"M", b"N", b"V", b"A", b"I")
_CHECKSUM_AT = 148
_CHECKSUM = re.compile(rb"(?=[ 0-7]{6}[ \0]{2})")  # that field, as programs write it


class Member(NamedTuple):
    """A file, link or directory of a tar."""

    name: str
    offset: int  # bytes from the start of the tar, as it is when inflated, to its data
    size: int  # bytes
    kind: str  # "file", "directory" or "other" (links, devices, sparse files)
    content: memoryview | None = None  # if it was asked for: of a file of at most MAX_CONTENT_BYTES


class NoMember(Exception):
    """No member can be read at a place of a tar. `is_header`: though a valid header is there; `is_cut`: since the
    tar ends.
    """

    def __init__(self, what: str, is_header: bool = False, is_cut: bool = False):
        super().__init__(what)
        self.is_header, self.is_cut = is_header, is_cut


class _Header(NamedTuple):
    name: bytes
    size: int
    type: bytes
    is_continued: bool


def plain_file(block: bytes, data: int) -> Member | None:
    """The file whose header is `block` and whose data begins at `data`; None if that needs a second look."""
    if len(block) < BLOCK:
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


def unusual_member(read: Read, start: int, shared: dict[str, bytes]) -> tuple[Member, int]:
    """The member whose first header is at `start`, and how many bytes it stores.

    `shared`: pax records that hold for all members, updated where the tar does. Raises NoMember.
    """
    at = start
    own: dict[str, bytes] = {}  # of this member alone; where two headers say one thing, the first counts
    while True:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            what = "the tar is cut off" if block or own else "the tar ends without its end marker"
            raise NoMember(what, is_header=at > start, is_cut=True)
        header = _parse_header(block, at > start)
        data = at + BLOCK
        if header.type not in _EXTENDED:
            break
        record = _extended(read, header, data)
        if header.type == b"g":
            shared.update(record)
        else:
            own = {**record, **own}
        at = data + _padded(header.size)

    records = {**shared, **own}
    name = records.get("path", header.name).decode("utf-8", "surrogateescape")
    size = _pax_size(records, header.size)
    while header.is_continued:  # an old GNU sparse file lists its parts in blocks of their own
        more = read(data, BLOCK)
        header = header._replace(is_continued=len(more) == BLOCK and more[504] != 0)
        data += BLOCK
    if header.type == b"5" or (header.type == b"\0" and header.name.endswith(b"/")):
        return Member(name, data, size, "directory"), 0
    if header.type in _WITHOUT_DATA:
        return Member(name, data, size, "other"), 0
    return Member(name, data, size, "file" if header.type in _REGULAR else "other"), size


def find_header(read: Read, start: int) -> tuple[int | None, int]:
    """Where the next header begins, at `start` or behind it, at any byte: one whose checksum holds, with a name
    and a type that exists; None if there is none. Also the end of what was looked at.
    """
    while len(chunk := read(start, _SEARCHED_BYTES + BLOCK - 1)) >= BLOCK:
        last = len(chunk) - BLOCK + _CHECKSUM_AT  # where the last header's checksum may begin
        for match in _CHECKSUM.finditer(chunk, _CHECKSUM_AT, last + 8):
            at = match.start() - _CHECKSUM_AT
            if _is_header(chunk[at : at + BLOCK]):
                return start + at, start + at
        start += last + 1 - _CHECKSUM_AT
    return None, start + len(chunk)


def _is_header(block: bytes) -> bool:
    """Whether these 512 bytes are a header beyond doubt, wherever they were found."""
    size = _number(block[124:136])
    return (
        block[0] != 0
        and block[156:157] in _TYPES
        and size is not None
        and size >= 0
        and adler32(block) & 0xFFFF == _adler_of(block[_CHECKSUM_AT : _CHECKSUM_AT + 8])
    )


def _parse_header(block: bytes, is_continuation: bool) -> _Header:
    """The fields of a 512-byte header. Raises NoMember if its checksum or its size is wrong."""
    field = block[148:156]
    if adler32(block) & 0xFFFF != _adler_of(field) and _number(field) != _signed_checksum(block):
        raise NoMember("there is no valid header", is_continuation)
    size = _number(block[124:136])
    if size is None or size < 0:
        raise NoMember("there is a header without a valid size", is_header=True)
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
    return -(-size // BLOCK) * BLOCK


def _extended(read: Read, header: _Header, data: int) -> dict[str, bytes]:
    """What an extended header says of the member that follows: {"path": ..., "size": ...}, as far as it does."""
    if header.size > _MAX_EXTENDED_BYTES:
        raise NoMember(f"there is an extended header of {header.size:,} bytes", is_header=True)
    content = read(data, header.size)
    if len(content) < header.size:
        raise NoMember("the tar is cut off in an extended header", is_header=True, is_cut=True)
    if header.type == b"L":
        return {"path": content.partition(b"\0")[0]}
    return {} if header.type == b"K" else _pax_records(content)


def _pax_records(content: bytes) -> dict[str, bytes]:
    """The path and size of pax records, each "LENGTH key=value\\n" with the length of all of it."""
    records = {}
    while content and content[0]:
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if length > len(content) or not equals or not value.endswith(b"\n"):
            raise NoMember("there is a pax header that cannot be read", is_header=True)
        if key in (b"path", b"size"):
            records[key.decode()] = value[:-1]
        content = content[length:]
    return records


def _pax_size(records: dict[str, bytes], size: int) -> int:
    text = records.get("size", b"")
    if not text:
        return size
    if not text.isdigit() or len(text) > 18:
        raise NoMember("there is a pax header without a valid size", is_header=True)
    return int(text)
