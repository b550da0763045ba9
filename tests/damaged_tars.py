"""Damage to whole tars and gzip streams, as the published files have it, and which members are lost by it.

A member is lost unless its header and all of its data stand in the damaged tar, byte for byte and in order; in a
damaged gzip stream, in what zlib inflates of it up to its first error. Where a lost member's header is still
there, a reader can tell: its data are cut off, or they are a JPEG that no strict decoder takes.

Memory: four times the tar.
"""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg

BLOCK = tarfile.BLOCKSIZE
GARBAGE_BYTES = 600  # of a member
GARBAGE_DEFLATE_BYTES = 64
MARGIN_BYTES = 512  # no member ends so close before a break: which byte is the last is up to the inflater
_CHUNK_BYTES = 2**16
_GZIP_MAGIC = b"\x1f\x8b"
_START_OF_SCAN = b"\xff\xda"


class Member(NamedTuple):
    """A regular file of the whole tar; offsets and sizes in bytes."""

    name: str
    header: int  # offset of its first header
    data: int  # offset of its content
    size: int


class DamagedTar(NamedTuple):
    content: bytes
    lost: dict[str, str]  # member -> "absent" (no header), "cut" (the tar ends in it) or "garbled" (other data)


def members_of(tar: bytes) -> list[Member]:
    """The regular files of a tar in its order, as Python's tarfile sees them."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [Member(m.name, m.offset, m.offset_data, m.size) for m in file if m.isfile()]


def damage(
    kind: str, tar: bytes, members: list[Member], rng: np.random.Generator, compress: bool = True
) -> DamagedTar:
    """A whole plain tar with one of KINDS: as a gzip stream, or plain where that kind is in PLAIN_KINDS.

    Draws until every lost member can be noticed, so that what is lost does not depend on the reader.
    """
    stream = gzipped(tar) if compress else b""
    for _ in range(200):
        if compress and kind in _OF_STREAM:
            content = _OF_STREAM[kind](stream, rng)
            broken = inflated(content)
        else:
            broken = _OF_TAR[kind](tar, members, rng)
            content = gzipped(broken) if compress else broken
        fates = _fates(tar, members, broken)
        if all(_is_certain(fate, member, broken) for fate, member in zip(fates, members, strict=True)):
            lost = {m.name: fate.why for fate, m in zip(fates, members, strict=True) if fate.why != "whole"}
            return DamagedTar(content, lost)
    raise ValueError(f"no place for {kind} in a tar of {len(members)} files")


# ------------------------------------------------------------------------------------------------------------ gzip


def gzipped(content: bytes) -> bytes:
    """A gzip stream without a name or a time: the same content gives the same bytes."""
    deflater = zlib.compressobj(6, wbits=31)
    return deflater.compress(content) + deflater.flush()


def write_gzip(source: Path, target: Path) -> None:
    """`gzipped`, from file to file, holding little of either in memory."""
    deflater = zlib.compressobj(6, wbits=31)
    with source.open("rb") as plain, target.open("wb") as packed:
        while chunk := plain.read(2**20):
            packed.write(deflater.compress(chunk))
        packed.write(deflater.flush())


def inflated(content: bytes) -> bytes:
    """All that zlib inflates of gzip streams, one after the other, up to the first error."""
    out, at = bytearray(), 0
    while content.startswith(_GZIP_MAGIC, at):
        inflater = zlib.decompressobj(wbits=31)
        while at < len(content) and not inflater.eof:
            chunk, before = content[at : at + _CHUNK_BYTES], inflater.copy()
            try:
                out += inflater.decompress(chunk)
            except zlib.error:  # the output of this call is lost: byte by byte, none is
                return bytes(out + _inflated_to_error(before, chunk))
            at += len(chunk) - len(inflater.unused_data)
    return bytes(out)


def _inflated_to_error(inflater, chunk: bytes) -> bytes:
    out = bytearray()
    try:
        for n in range(len(chunk)):
            out += inflater.decompress(chunk[n : n + 1])
    except zlib.error:
        pass
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- what is lost


class _Fate(NamedTuple):
    why: str  # "whole", or why it is lost
    start: int  # of the header in the damaged tar; -1 if it is absent


def _fates(tar: bytes, members: list[Member], broken: bytes) -> list[_Fate]:
    """What became of each member."""
    fates, at = [], 0
    for member in members:
        start = broken.find(tar[member.header : member.data + member.size], at)
        if start >= 0:
            fates.append(_Fate("whole", start))
            at = start + member.data + member.size - member.header
            continue
        start = broken.find(tar[member.header : member.data], at)
        end = start + member.data + member.size - member.header
        fates.append(_Fate("absent" if start < 0 else "cut" if end > len(broken) else "garbled", start))
    return fates


def _is_certain(fate: _Fate, member: Member, broken: bytes) -> bool:
    """Whether every reader must come to this fate."""
    data = fate.start + member.data - member.header
    if fate.why == "whole":
        return not len(broken) - MARGIN_BYTES < data + member.size <= len(broken)
    return fate.why != "garbled" or (_is_image(member) and not _decodes(broken[data : data + member.size]))


def _is_image(member: Member) -> bool:
    return member.name.lower().endswith((".jpg", ".jpeg"))


def _decodes(jpeg: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(jpeg, strict=True)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------- damage to the tar


def _cut_tar(tar: bytes, members: list[Member], rng: np.random.Generator) -> bytes:
    return tar[: _middle(len(tar), rng)]


def _garbage_member(tar: bytes, members: list[Member], rng: np.random.Generator) -> bytes:
    """Garbage in the entropy-coded data of an image."""
    images = [m for m in members if _is_image(m) and _scan_bytes(tar, m) > 300]
    image = images[rng.integers(len(images))]
    scan_bytes = _scan_bytes(tar, image)
    size = min(GARBAGE_BYTES, scan_bytes // 3)
    at = image.data + image.size - scan_bytes + (scan_bytes - size) // 2
    return _overwritten(tar, at, rng.bytes(size))


def _scan_bytes(tar: bytes, image: Member) -> int:
    """How many bytes of an image come after its first scan's header; 0 if it has none."""
    end = image.data + image.size
    at = tar.find(_START_OF_SCAN, image.data, end)
    return max(0, end - at - 16) if at >= 0 else 0


def _garbage_header(tar: bytes, members: list[Member], rng: np.random.Generator) -> bytes:
    """Not the first one: by that, a file is known to be a tar."""
    member = members[rng.integers(1, len(members))]
    return _overwritten(tar, member.data - BLOCK, rng.bytes(BLOCK))


def _spliced_out(tar: bytes, members: list[Member], rng: np.random.Generator, whole_blocks: bool = False) -> bytes:
    """Without the bytes from the middle of an image to the middle of one of the next."""
    images = [m for m in members if _is_image(m) and m.size > BLOCK]
    first = int(rng.integers(len(images) - 1))
    last = min(first + int(rng.integers(1, 5)), len(images) - 1)
    start, end = (images[n].data + _middle(images[n].size, rng) for n in (first, last))
    end -= (end - start) % BLOCK if whole_blocks else (end - start) % BLOCK == 0
    return tar[:start] + tar[end:]


def _blocks_spliced_out(tar: bytes, members: list[Member], rng: np.random.Generator) -> bytes:
    return _spliced_out(tar, members, rng, whole_blocks=True)


def _inserted(tar: bytes, members: list[Member], rng: np.random.Generator) -> bytes:
    """With garbage before a header, which is then at no multiple of 512."""
    at = members[rng.integers(1, len(members))].header
    return tar[:at] + rng.bytes(int(rng.integers(1, 6)) * BLOCK + int(rng.integers(1, BLOCK))) + tar[at:]


# -------------------------------------------------------------------------------------------- damage to the stream


def _wrong_checksum(stream: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(stream, len(stream) - 8 + int(rng.integers(4)), rng)


def _wrong_length(stream: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(stream, len(stream) - 4 + int(rng.integers(4)), rng)


def _cut_stream(stream: bytes, rng: np.random.Generator) -> bytes:
    return stream[: _middle(len(stream), rng)]


def _garbage_deflate(stream: bytes, rng: np.random.Generator) -> bytes:
    return _overwritten(stream, _middle(len(stream), rng), rng.bytes(GARBAGE_DEFLATE_BYTES))


def _three_streams(stream: bytes, rng: np.random.Generator) -> bytes:
    tar = inflated(stream)
    first, second = sorted(rng.integers(1, len(tar), 2).tolist())
    return gzipped(tar[:first]) + gzipped(tar[first:second]) + gzipped(tar[second:])


def _trailing_zeros(stream: bytes, rng: np.random.Generator) -> bytes:
    return stream + bytes(int(rng.integers(1, 20_000)))


def _trailing_garbage(stream: bytes, rng: np.random.Generator) -> bytes:
    return stream + b"\x07" + rng.bytes(int(rng.integers(1, 20_000)))  # not another stream's first byte


def _middle(size: int, rng: np.random.Generator) -> int:
    """A place in the middle third or so."""
    return int(size * rng.uniform(0.3, 0.7))


def _overwritten(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _flipped(content: bytes, at: int, rng: np.random.Generator) -> bytes:
    """With one bit of one byte flipped."""
    return _overwritten(content, at, bytes([content[at] ^ 1 << int(rng.integers(8))]))


_OF_TAR: dict[str, Callable[[bytes, list[Member], np.random.Generator], bytes]] = {
    "cut": _cut_tar,
    "garbage_member": _garbage_member,
    "garbage_header": _garbage_header,
    "spliced_out": _spliced_out,
    "blocks_spliced_out": _blocks_spliced_out,
    "inserted": _inserted,
}
_OF_STREAM: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "checksum": _wrong_checksum,
    "length": _wrong_length,
    "cut": _cut_stream,
    "garbage_deflate": _garbage_deflate,
    "three_streams": _three_streams,
    "trailing_zeros": _trailing_zeros,
    "trailing_garbage": _trailing_garbage,
}
PLAIN_KINDS = tuple(_OF_TAR)
KINDS = tuple(dict.fromkeys([*_OF_STREAM, *_OF_TAR]))
