"""Tars read in place: who their members are and where their bytes lie, without extracting anything.

Plain tars and gzip streams, told apart by their first bytes; of a gzip stream all offsets are those of the tar in
it.
A tar is read front to back, eight times as fast as by `tarfile`, and a damaged one gives everything that can be
had: where no header is valid, reading goes on at the next one whose checksum holds, at whatever byte it lies.

Memory: two blocks of CHUNK_BYTES, and the largest member, of at most MAX_CONTENT_BYTES; for gzip what
gzip_streams.py needs, too. The contents of members are views of the blocks that they were read in, or copies where
they lie in several; views keep theirs in memory.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.archives import gzip_streams
from common.archives.restart_points import RestartPoint
from common.archives.tar_blocks import CHUNK_BYTES, Blocks, read_block, window
from common.archives.tar_headers import (
    BLOCK,
    Member,
    NoMember,
    Read,
    find_header,
    plain_file,
    unusual_member,
)
from common.errors import PipelineError
from common.schemas import Reject

MAX_CONTENT_BYTES = 64 * 2**20  # a larger member is not an image or a label of the dataset
_INDEX_BYTES = 3 * BLOCK  # of one read when they are not: a label's header, its content, and the next header
_ZEROS = bytes(BLOCK)
_NAME = re.compile(r"(?P<stem>.*?)(?:\.tar|\.tar\.gz|\.tgz)", re.IGNORECASE | re.DOTALL)
_OTHER_NAMES = re.compile(r".*\.(tar\.\w+|tbz2?|txz|tzst)", re.IGNORECASE | re.DOTALL)
_UNFINISHED = (".aria2", ".part", ".crdownload")  # of what is beside a download, or is one, until it is finished
_COMPRESSED = {
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}
_new = tuple.__new__  # takes half the time of a NamedTuple's own constructor


class Damage(NamedTuple):
    """Bytes of a tar that are of no use."""

    start: int  # bytes from the start of the tar, as it is when inflated
    end: int
    reason: Reject  # TAR_TRUNCATED, TAR_DAMAGED or GZIP_DAMAGED
    detail: str
    member: str = ""  # the file that they belong to, if that is known


class BadSector(PipelineError):
    """The disk does not give some bytes of a tar; it may give the others."""


def is_named_so(path: Path) -> bool:
    """Whether a file is a tar by its name, plain or gzip."""
    return _NAME.fullmatch(path.name) is not None


def stem(tar: Path) -> str:
    """A tar's name without its suffix: what files made from it are called."""
    match = _NAME.fullmatch(tar.name)
    return match["stem"] if match else tar.stem


def of_shard(raw_dir: Path, shard: int, num_shards: int) -> list[Path]:
    """The tars whose rank in the sorted listing of `raw_dir` is `shard` modulo `num_shards`."""
    there = sorted(raw_dir.iterdir()) if raw_dir.is_dir() else []
    # macOS leaves "._0088.tar" beside what it copies
    named = [path for path in there if _NAME.fullmatch(path.name) and not path.name.startswith(".")]
    listing = [path for path in named if path.is_file()]
    compressed = [path for path in there if _OTHER_NAMES.fullmatch(path.name) and path not in named]
    lost = [path for path in named if not path.is_file()]
    if lost:
        what = "is a folder" if lost[0].is_dir() else "links to a file that does not exist"
        raise PipelineError(f"{lost[0]} {what}\nput the tar back, or take this out of paths.raw_dir")
    stems = [stem(path) for path in listing]
    twice = [path.name for path in listing if stems.count(stem(path)) > 1]
    if twice:
        raise PipelineError(f"{raw_dir} has one tar under two names, {twice[0]} and {twice[1]}\nkeep one of them")
    unfinished = [path for path in there if path.suffix in _UNFINISHED and is_named_so(path.with_suffix(""))]
    if unfinished:
        raise PipelineError(
            f"{unfinished[0].with_suffix('')} has not been downloaded completely: {unfinished[0].name} says so\n"
            "run the download again, which resumes; that file goes when the tar is whole"
        )
    if compressed:
        raise PipelineError(
            f"{compressed[0]} is neither a plain tar nor a gzip stream, by its name"
            f"{f' ({len(compressed):,} such files)' if len(compressed) > 1 else ''}\n"
            "decompress it, or take it out of paths.raw_dir: other compressions cannot be read in place"
        )
    if not listing:
        raise PipelineError(_without_tars(raw_dir))
    return listing[shard::num_shards]


def _without_tars(raw_dir: Path) -> str:
    """What to tell of a place without tars."""
    if not raw_dir.is_dir():
        what = "is a file" if raw_dir.exists() else "does not exist"
        return f"{raw_dir} {what}\nput the dataset's tars there, or set paths.raw_dir"
    deeper = {path.parent for path in raw_dir.glob("*/*") if is_named_so(path) and path.is_file()}
    if deeper:  # aria2c puts them into a folder of the set's name
        folders = ", ".join(map(str, sorted(deeper)))
        return f"{raw_dir} holds no tars, but there are some in {folders}\nset paths.raw_dir to one of these"
    return f"{raw_dir} holds no .tar, .tar.gz or .tgz file\nput the dataset's tars there, or set paths.raw_dir"


class Share(NamedTuple):
    """What a task does of a tar: one of `pieces` pieces of it."""

    tar: Path
    piece: int
    pieces: int

    def of(self, count: int) -> range:
        """The share's part of `count` things, which the pieces divide evenly between them, in order; the first has
        some wherever there are any.
        """
        return range(-(-count * self.piece // self.pieces), -(-count * (self.piece + 1) // self.pieces))


def shares(raw_dir: Path, shard: int, num_shards: int) -> list[Share]:
    """What a task does where work divides further than by tars: whole tars, as `of_shard`, or where there are more
    tasks than tars a piece of the one that is `shard` modulo the number of tars.
    """
    return shares_of(of_shard(raw_dir, 0, 1), shard, num_shards)


def shares_of(listing: list[Path], shard: int, num_shards: int) -> list[Share]:
    """`shares` of the tars in `listing`."""
    if num_shards <= len(listing):
        return [Share(tar, 0, 1) for tar in listing[shard::num_shards]]
    rank = shard % len(listing)
    return [Share(listing[rank], shard // len(listing), -(-(num_shards - rank) // len(listing)))]


def walk(
    path: Path, contents: bool = False, points: list[RestartPoint] | None = None
) -> Iterator[Member | Damage]:
    """The members of a tar, front to back, and the damages between them; with the members' bytes if `contents`.

    Each byte is read once, but for some beside a damage. `points`: gets the restart points of a gzip stream.
    Raises PipelineError if the tar is compressed otherwise.
    """
    with opened(path) as file, ThreadPoolExecutor(1) as ahead:
        descriptor = file.fileno()
        if is_gzip(path, file):
            stream = gzip_streams.Stream(
                lambda offset, size: os.pread(descriptor, size, offset), [] if points is None else points
            )
            blocks = Blocks(lambda start: memoryview(stream.read(start, CHUNK_BYTES)), ahead)
            yield from _members(blocks.read, blocks.view if contents else None, None)
            for offset, what in stream.damages:
                yield Damage(offset, offset, Reject.GZIP_DAMAGED, f"{what}, found at byte {offset:,} of the tar")
            return
        file_bytes = os.fstat(descriptor).st_size
        if contents:
            blocks = Blocks(lambda start: read_block(descriptor, start), ahead)
            yield from _members(blocks.read, blocks.view, file_bytes)
        else:
            yield from _members(window(descriptor, _INDEX_BYTES), None, file_bytes)


def _members(
    read: Read, view: Callable[[int, int], memoryview] | None, tar_bytes: int | None
) -> Iterator[Member | Damage]:
    """`walk` of a tar's bytes. `view`: gives contents, if they are wanted; `tar_bytes`: None if not known.

    A member is given when a valid header, or the end, has been found behind it: bytes may be missing in it, and
    then the next header lies inside of what would be its data.
    """
    before: Member | None = None
    shared: dict[str, bytes] = {}  # pax records that hold for all members
    at, whole_to = 0, -1 if tar_bytes is None else tar_bytes  # data that end up to there are all there
    while True:
        block = read(at, BLOCK)
        member = None if shared else plain_file(block, at + BLOCK)
        broken = None
        if member is not None:
            data = at + BLOCK
            end = data + member[2]  # not by its fields' names, which take longer
        else:
            try:
                if block == _ZEROS:
                    if gzip_streams.is_zeros(read, at):
                        break
                    raise NoMember("there are zeros, with more data behind them,")
                member, stored = unusual_member(read, at, shared)
                data = member.offset
                end = data + stored
            except NoMember as error:
                broken = error
        if broken is None:
            content = None
            if view and member and member.kind == "file" and member.size <= MAX_CONTENT_BYTES:
                content = view(data, end - data)
                member = _new(Member, (*member[:4], content))
            if end <= whole_to or (tar_bytes is None and _is_there(read, content, data, end)):
                if before is not None:
                    yield before
                before, at = member, end + (data - end) % BLOCK
                continue
            broken = NoMember("there is a size beyond the end of the tar", is_header=True)

        after, given = _beyond(read, at, before, member if broken.is_header else None, broken)
        yield from given
        if after is None:
            return
        before, at = None, after
    if before is not None:
        yield before


def _is_there(read: Read, content: memoryview | None, start: int, end: int) -> bool:
    """Whether the data of a gzip stream's tar from `start` to `end` are all there. If they have been read, that
    shows it: to look at their end first would be to go back and forth.
    """
    return start == end or (len(content) == end - start if content is not None else read(end - 1, 1) != b"")


def _beyond(
    read: Read, at: int, before: Member | None, cut: Member | None, broken: NoMember
) -> tuple[int | None, list[Member | Damage]]:
    """What to give where no member can be read `at` a place, and where the next header lies (None: nowhere).

    `before`: the member before it; `cut`: the one whose header is there, and whose data are not.
    """
    # the next header lies within the member before where bytes of that are missing; a tar has headers of its own
    is_within = before is not None and not broken.is_header and not is_named_so(Path(before.name))
    start = before.offset if before and is_within else at + BLOCK * broken.is_header
    after, end = find_header(read, start)
    given: list[Member | Damage] = []
    gap = at + BLOCK if cut else at
    if before is not None and after is not None and is_within and not _is_whole(read, before, at, after):
        gap = before.offset
        detail = f"bytes are missing in it or too many: the next header begins at byte {after:,}, not {at:,}"
        given.append(Damage(before.offset, after, Reject.TAR_DAMAGED, detail, before.name))
    elif before is not None:
        given.append(before)
    if cut is not None:
        there = max(0, min(end, cut.offset + cut.size) - cut.offset)
        reason = Reject.TAR_TRUNCATED if after is None else Reject.TAR_DAMAGED
        detail = f"{there:,} of {cut.size:,} bytes are there of a member that begins at byte {cut.offset:,}"
        given.append(Damage(cut.offset, cut.offset + there, reason, detail, cut.name))
    if after is not None or cut is None:
        given.append(_gap(gap, at, after, end, broken))
    return after, given


def _gap(start: int, at: int, after: int | None, end: int, broken: NoMember) -> Damage:
    """The bytes from `start` to the next header, at `after`, or to the tar's end, since nothing is valid `at` a
    place.
    """
    if after is None:
        rest = "" if broken.is_cut else f": the {end - start:,} bytes from there on are lost"
        reason = Reject.TAR_TRUNCATED if broken.is_cut else Reject.TAR_DAMAGED
        return Damage(start, end, reason, f"{broken} at byte {at:,}{rest}")
    if after <= start:
        detail = f"{broken} at byte {at:,}: bytes are missing, and the next header begins at byte {after:,}"
        return Damage(after, after, Reject.TAR_DAMAGED, detail)
    lost = f"the {after - start:,} bytes from byte {start:,} on are lost"
    return Damage(start, after, Reject.TAR_DAMAGED, f"{broken} at byte {at:,}: {lost}")


def _is_whole(read: Read, member: Member, at: int, after: int) -> bool:
    """Whether a member's data can be all there, and nothing else, though the next header begins at byte `after`
    instead of `at`, as its size says.

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
def opened(path: Path) -> Iterator[BinaryIO]:
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
