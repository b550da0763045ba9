"""Tars read in place: the names and byte ranges of their members, without extracting anything.

Plain tars and gzip streams, distinguished by their first bytes; all offsets are those of the inflated tar. A tar
is read front to back, eight times as fast as by `tarfile`, and everything that is left of a damaged one is found:
after an invalid header, reading goes on at the next one with a valid checksum, at any byte.

Memory: some chunks of CHUNK_BYTES, the largest member, of at most MAX_CONTENT_BYTES, and for gzip what
gzip_streams.py needs.
"""

import contextlib
import errno
import functools
import itertools
import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.archives import gzip_streams
from common.archives.restart_points import RestartPoint
from common.archives.tar_blocks import CHUNK_BYTES, Read, buffered, is_zeros, read_at
from common.archives.tar_headers import BLOCK, Member, NoMember, find_header, plain_file, unusual_member
from common.errors import PipelineError
from common.schemas import Reject

MAX_CONTENT_BYTES = 64 * 2**20  # a larger member is not an image or a label of the dataset
_INDEX_BYTES = 3 * BLOCK  # read at once without contents: a label's header, its content, and the next header
_ZEROS = bytes(BLOCK)
_UNFINISHED = (".aria2", ".part", ".crdownload")  # suffixes of a download in progress, or of the file beside it
_NAME = re.compile(r"(?P<stem>.*?)(?:\.tar|\.tar\.gz|\.tgz)", re.IGNORECASE | re.DOTALL)
_OTHER_NAME = re.compile(r".*\.(tar\.\w+|tbz2?|txz|tzst)", re.IGNORECASE | re.DOTALL)
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_COMPRESSED |= {b"\x1f\x9d": "compress", b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf": "7z"}


class Damage(NamedTuple):
    """Unusable bytes of a tar."""

    start: int  # bytes from the start of the tar, as it is when inflated
    end: int
    reason: Reject  # TAR_TRUNCATED, TAR_DAMAGED or GZIP_DAMAGED
    detail: str
    member: str = ""  # the file that they belong to, if that is known


class BadSector(PipelineError):
    """The disk cannot read some bytes of a tar; it may be able to read the others."""


def is_named_so(path: Path) -> bool:
    """Whether a file is a tar by its name, plain or gzip."""
    return _NAME.fullmatch(path.name) is not None


def stem(tar: Path) -> str:
    """A tar's name without its suffix: the name of the files made from it."""
    match = _NAME.fullmatch(tar.name)
    return match["stem"] if match else tar.stem


def of_shard(raw_dir: Path, shard: int, num_shards: int) -> list[Path]:
    """The tars whose rank in the sorted listing of `raw_dir` is `shard` modulo `num_shards`.

    Raises PipelineError if there are none, or if one is no file, not downloaded completely, or there twice.
    """
    listing = listed(raw_dir)
    if not listing:
        what = "holds no .tar, .tar.gz or .tgz file" if raw_dir.is_dir() else "is not a folder"
        # aria2c puts them into a folder of the set's name
        deeper = sorted({path.parent for path in raw_dir.glob("*/*") if is_named_so(path) and path.is_file()})
        advice = (
            "set paths.raw_dir"
            if deeper
            else "put the dataset's tars there, or set paths.raw_dir, or import photographs"
        )
        where = f", but there are some in {', '.join(map(str, deeper))}" if deeper else ""
        raise PipelineError(f"{raw_dir} {what}{where}\n{advice}")
    return listing[shard::num_shards]


def listed(raw_dir: Path) -> list[Path]:
    """The tars in `raw_dir`, sorted; [] if there are none. Raises PipelineError for bad ones, as `of_shard`."""
    return _listing(raw_dir, raw_dir.stat().st_mtime_ns if raw_dir.exists() else 0)


@functools.cache  # submit.py asks for each shard of three stages, and each tar costs a round trip to the disk
def _listing(raw_dir: Path, mtime_ns: int) -> list[Path]:
    paths = sorted(raw_dir.iterdir()) if raw_dir.is_dir() else []
    # macOS leaves "._0088.tar" beside what it copies
    listing = [path for path in paths if is_named_so(path) and not path.name.startswith(".")]
    for path in paths:
        if path.suffix.lower() in _UNFINISHED and is_named_so(path.with_suffix("")):
            raise PipelineError(
                f"{path.with_suffix('')} has not been downloaded completely: {path.name} is still there\n"
                "rerun the download, which resumes and removes that file when it is done"
            )
        if _OTHER_NAME.fullmatch(path.name) and path not in listing:
            raise PipelineError(
                f"{path} is neither a plain tar nor a gzip stream, by its name\n"
                "decompress it, or move it out of paths.raw_dir: other compressions cannot be read in place"
            )
        if path in listing and not path.is_file():
            what = "is a folder" if path.is_dir() else "links to a file that does not exist"
            raise PipelineError(f"{path} {what}\nrestore the tar, or move this out of paths.raw_dir")
    for one, other in itertools.pairwise(sorted(listing, key=stem)):
        if stem(one) == stem(other):
            raise PipelineError(f"{raw_dir} has one tar under two names, {one.name} and {other.name}\nkeep one")
    return listing


class Share(NamedTuple):
    """A task's share of a tar: one of `pieces` pieces."""

    tar: Path
    piece: int
    pieces: int

    def of(self, count: int) -> range:
        """The share's part of `count` things, divided evenly and in order; the first piece is never empty."""
        return range(-(-count * self.piece // self.pieces), -(-count * (self.piece + 1) // self.pieces))


def shares_of(listing: list[Path], shard: int, num_shards: int) -> list[Share]:
    """A task's shares of the tars in `listing`: whole tars, as `of_shard`, or with more tasks than tars a piece of
    the one whose rank is `shard` modulo the number of tars.
    """
    if num_shards <= len(listing):
        return [Share(tar, 0, 1) for tar in listing[shard::num_shards]]
    rank = shard % len(listing)
    return [Share(listing[rank], shard // len(listing), -(-(num_shards - rank) // len(listing)))]


def walk(
    path: Path, contents: bool = False, points: list[RestartPoint] | None = None
) -> Iterator[Member | Damage]:
    """The members of a tar, front to back, and the damages between them; with the members' bytes if `contents`.

    Each byte is read once, except for some beside a damage. The restart points of a gzip stream are appended to
    `points`. Raises PipelineError if the tar is compressed otherwise.
    """
    with opened(path) as file, ThreadPoolExecutor(1) as executor:
        read: Read = partial(read_at, file.fileno())
        tar_bytes, damages = os.fstat(file.fileno()).st_size, list[tuple[int, str]]()
        if is_gzip(path, file):
            stream = gzip_streams.Stream(read, [] if points is None else points, 4 * CHUNK_BYTES)
            read = buffered(stream.read, CHUNK_BYTES, executor)
            tar_bytes, damages = 0, stream.damages
        else:
            read = buffered(read, CHUNK_BYTES if contents else _INDEX_BYTES)
        yield from _members(read, contents, tar_bytes)
        for offset, what in damages:
            yield Damage(offset, offset, Reject.GZIP_DAMAGED, f"{what}, found at byte {offset:,} of the tar")


def _members(read: Read, contents: bool, tar_bytes: int) -> Iterator[Member | Damage]:
    """`walk` of a tar's bytes, of which there are `tar_bytes`, or 0 if that is not known.

    A member is given when a valid header, or the end, has been found behind it: if bytes are missing in it, the
    next header is within what would be its data.
    """
    before: Member | None = None
    at = 0
    while True:
        cut = None
        block = read(at, BLOCK)
        member = plain_file(block, at + BLOCK)
        try:
            if member is not None:
                stored = member.size
            elif block == _ZEROS:
                if is_zeros(read, at):
                    break
                raise NoMember("zeros with more data behind them")
            else:
                member, stored = unusual_member(read, at)
            end = member.offset + stored
            if contents and member.kind == "file" and stored <= MAX_CONTENT_BYTES:
                member = member._replace(content=read(member.offset, stored))
            if end > tar_bytes and not read(end - 1, 1):  # the header ends at end - 1 if there are no data
                cut = member
                raise NoMember("a size beyond the end of the tar", is_header=True)
        except NoMember as broken:
            after = yield from _damages(read, at, before, cut, broken)
            if after is None:
                return
            before, at = None, after
            continue
        if before is not None:
            yield before
        before, at = member, end + -stored % BLOCK
    if before is not None:
        yield before


def _damages(
    read: Read, at: int, before: Member | None, cut: Member | None, broken: NoMember
) -> Generator[Member | Damage, None, int | None]:
    """The damages around a place `at` which no member can be read, after the member `before` it if that is whole;
    returns where the next header begins (None: nowhere). `cut`: the member whose header is valid but not its data.
    """
    # if bytes of the member before are missing, the next header is within it; a tar has headers of its own
    is_within = before is not None and not broken.is_header and not is_named_so(Path(before.name))
    start = before.offset if before and is_within else at + BLOCK * broken.is_header
    after, end = find_header(read, start)
    gap = at + BLOCK if cut else at
    if before is not None and after is not None and is_within and not _is_whole(read, before, at, after):
        gap = before.offset
        detail = f"bytes missing or inserted: the next header begins at byte {after:,}, not {at:,}"
        yield Damage(before.offset, after, Reject.TAR_DAMAGED, detail, before.name)
    elif before is not None:
        yield before
    if cut is not None:
        present = max(0, min(end, cut.offset + cut.size) - cut.offset)
        reason = Reject.TAR_TRUNCATED if after is None else Reject.TAR_DAMAGED
        detail = f"only {present:,} of {cut.size:,} bytes present from byte {cut.offset:,} on"
        yield Damage(cut.offset, cut.offset + present, reason, detail, cut.name)
    if after is None and broken.is_cut:
        yield Damage(gap, end, Reject.TAR_TRUNCATED, f"{broken} at byte {at:,}")
    elif after is not None and after <= gap:
        detail = f"{broken} at byte {at:,}: bytes are missing, the next header begins at byte {after:,}"
        yield Damage(after, after, Reject.TAR_DAMAGED, detail)
    elif after is not None or cut is None:
        end = end if after is None else after
        detail = f"{broken} at byte {at:,}: {end - gap:,} bytes lost from byte {gap:,} on"
        yield Damage(gap, end, Reject.TAR_DAMAGED, detail)
    return after


def _is_whole(read: Read, member: Member, at: int, after: int) -> bool:
    """Whether a member's data can be complete, and nothing else, although the next header begins at byte `after`
    instead of `at`, where its size puts it.

    Bytes missing in the data draw zeros of the padding into them, or data of others; bytes inserted there push
    some of them out, to where the padding begins.
    """
    end = min(member.offset + member.size, at)
    if after < end:
        return False
    if after < at:
        return read(end - 1, 1) != b"\0"
    return read(end, min(1, at - end)) in (b"", b"\0")


@contextlib.contextmanager
def opened(path: Path, remedy: str = "") -> Iterator[BinaryIO]:
    """The tar, unbuffered. Raises PipelineError that names it if it cannot be opened, or read in the block
    (BadSector if that concerns some of its bytes).
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise PipelineError(
            f"{path} does not exist: {remedy or 'restore the tar, or set paths.raw_dir'}"
        ) from None
    except OSError as error:
        kind = BadSector if error.errno == errno.EIO else PipelineError
        raise kind(f"{path} cannot be read: {error.strerror}") from None


def is_gzip(path: Path, file: BinaryIO) -> bool:
    """Whether an open tar is a gzip stream. Raises PipelineError if it is compressed otherwise."""
    start = os.pread(file.fileno(), BLOCK, 0)
    if start[257:262] == b"ustar":
        return False
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise PipelineError(
                f"{path} is compressed ({method})\n"
                "decompress it first: only plain tars and gzip streams can be read in place"
            )
    return start.startswith(gzip_streams.MAGIC)


def printable(name: str) -> str:
    """A member's name as text that can be stored: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
