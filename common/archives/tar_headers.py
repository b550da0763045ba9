"""Headers of tars: ustar, GNU (long names, sizes in base 256) and pax (path, size), with their checksums.

Nearly all members are plain files with a short name, whose header `plain_file` reads; all others go through
`unusual_member`. Where a tar is damaged, `find_header` looks for the next header.
"""

import re
from functools import lru_cache
from struct import Struct
from typing import NamedTuple
from zlib import adler32

from common.archives.tar_blocks import Read

BLOCK = 512
_SEARCHED_BYTES = 2**20  # at a time, for a header
_MAX_EXTENDED_BYTES = 2**20  # of a long name or a pax header
# of a header: name, digits of the size and the byte after them, checksum, type, first byte of the name's prefix
_FIELDS = Struct("100s 24x 11s B 12x 8s B 188x B 166x")
_PLAIN = ord("0")
_new = tuple.__new__  # half the time of a NamedTuple's own constructor: a tenth of reading a header
_REGULAR = (b"0", b"\0", b"7")
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")  # they describe the member that follows, or all of them
_WITHOUT_DATA = (
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)  # links, devices, directories, pipes: whatever their size says
_TYPES = (*_REGULAR, *_EXTENDED, *_WITHOUT_DATA, b"S", b"D", b"M", b"N", b"V", b"A", b"I")
_CHECKSUM_AT = 148
_CHECKSUM = re.compile(rb"(?=[ 0-7]{6}[ \0]{2})")  # that field, as programs write it


class Member(NamedTuple):
    """A file, link or directory of a tar."""

    name: str
    offset: int  # bytes from the start of the tar, as it is when inflated, to its data
    size: int  # bytes
    kind: str  # "file", "directory" or "other" (links, devices, sparse files)
    content: bytes | None = None  # on request: of a file of at most MAX_CONTENT_BYTES


class NoMember(Exception):
    """There is no readable member at a place in a tar. `is_header`: although its header is valid; `is_cut`:
    because the tar ends.
    """

    def __init__(self, what: str, is_header: bool = False, is_cut: bool = False):
        super().__init__(what)
        self.is_header, self.is_cut = is_header, is_cut


def plain_file(block: bytes, data: int) -> Member | None:
    """The file whose header is `block` and whose data begins at `data`; None if it is not a plain file."""
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
    return (1 + checksum - 8 * ord(" ") + sum(field)) % 65_521 if checksum >= 0 else -1


def unusual_member(read: Read, start: int) -> tuple[Member, int]:
    """The member whose first header is at `start`, and how many bytes it stores. Raises NoMember."""
    at = start
    records: dict[bytes, bytes] = {}
    while True:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            what = "the tar is cut off" if block or at > start else "the tar ends without its end marker"
            raise NoMember(what, is_header=at > start, is_cut=True)
        if not _has_valid_checksum(block):
            raise NoMember("no valid header", is_header=at > start)
        kind, size = block[156:157], _number(block[124:136])
        if size < 0:
            raise NoMember("a header without a valid size", is_header=True)
        at += BLOCK
        if kind not in _EXTENDED:
            break
        records = _extended(read, at, size, kind) | records  # the first of two headers with one key counts
        at += -(-size // BLOCK) * BLOCK

    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    text = records.get(b"path", name).decode("utf-8", "surrogateescape")
    size = int(records.get(b"size", size))
    is_directory = kind == b"5" or (kind == b"\0" and name.endswith(b"/"))  # as tars before ustar mark them
    what = "directory" if is_directory else "file" if kind in _REGULAR else "other"
    return Member(text, at, size, what), 0 if is_directory or kind in _WITHOUT_DATA else size


def find_header(read: Read, start: int) -> tuple[int | None, int]:
    """Where the next header begins, at or after `start`, at any byte: one with a valid checksum, a name and a
    known type; None if there is none. Also the end of the bytes searched.
    """
    while len(chunk := read(start, _SEARCHED_BYTES + BLOCK - 1)) >= BLOCK:
        last = len(chunk) - BLOCK + _CHECKSUM_AT  # where the last header's checksum may begin
        for match in _CHECKSUM.finditer(chunk, _CHECKSUM_AT, last + 8):
            at = match.start() - _CHECKSUM_AT
            block = chunk[at : at + BLOCK]
            is_plausible = block[0] != 0 and block[156:157] in _TYPES and _number(block[124:136]) >= 0
            if is_plausible and _has_valid_checksum(block):
                return start + at, start + at
        start += last + 1 - _CHECKSUM_AT
    return None, start + len(chunk)


def _has_valid_checksum(block: bytes) -> bool:
    return adler32(block) & 0xFFFF == _adler_of(block[_CHECKSUM_AT : _CHECKSUM_AT + 8])


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or in base 256 after a byte 0x80; negative if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _extended(read: Read, at: int, size: int, kind: bytes) -> dict[bytes, bytes]:
    """The path and size that an extended header states for the member that follows, as far as it does.

    A pax header holds records "LENGTH key=value\\n", each with the length of all of it.
    """
    if size > _MAX_EXTENDED_BYTES:
        raise NoMember(f"an extended header of {size:,} bytes", is_header=True)
    content = read(at, size)
    if len(content) < size:
        raise NoMember("the tar is cut off in an extended header", is_header=True, is_cut=True)
    if kind == b"L":
        return {b"path": content.partition(b"\0")[0]}
    records, begin = {}, 0
    while kind in (b"x", b"X") and begin < len(content) and content[begin]:
        digits, _, _ = content[begin : begin + 20].partition(b" ")
        end = begin + (int(digits) if digits.isdigit() else 0)
        key, equals, value = content[begin + len(digits) + 1 : end].partition(b"=")
        is_size = value[:-1].isdigit() and len(value) < 20
        if end > len(content) or not equals or not value.endswith(b"\n") or (key == b"size" and not is_size):
            raise NoMember("an unreadable pax header", is_header=True)
        if key in (b"path", b"size"):
            records[key] = value[:-1]
        begin = end
    return records
