"""Atomic writes: a file, or a folder, appears only once it is complete, and leftovers of dead runs are removed."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shlex
import shutil
import stat
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import PipelineError

_NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
)  # Lustre mounted without flock, some network file systems
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORMER = "former"  # a folder for what is being replaced, until that has succeeded
_NEW = "new"  # in a temporary folder: what replaces FORMER
_DEAD_AFTER_S = 3 * 24 * 3600.0  # without locks: no live run is silent for this long


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` if the block succeeds, and is removed if it fails.

    The data goes to a temporary file in the same directory, which is synced to disk and renamed to `path`. It is
    locked meanwhile: an unlocked one was left by a dead run, and the next run that writes `path` removes it (where
    there are no locks, after three days). Concurrent writers do not disturb each other; the last one wins.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # despite `parents`: below /proc, for instance
        raise PipelineError(f"cannot create the directory {path.parent}: check paths.root and [paths]") from None
    remove_dead_temporaries(path)
    file, temporary = _open_locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # still locked: no other run removes it
        fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(path)  # for the message: which disk is full
        raise


def is_whole(path: Path) -> bool:
    """Whether a file exists and, if it holds weights, is not cut off. Reads its ends only."""
    if path.suffix == ".pt":
        return zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            header.pop("__metadata__", None)
            return path.stat().st_size == 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
        except (OSError, ValueError):
            return False
    return path.exists()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def remove_dead_temporaries(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are gone."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.tmp-{'[0-9a-f]' * 12}"):
        # opened for writing: NFS gives no lock otherwise. An OSError: it is locked, or already gone
        with contextlib.suppress(OSError), open(temporary, "r+b") as file:
            if lock(file, wait=False) or time.time() - os.fstat(file.fileno()).st_mtime > _DEAD_AFTER_S:
                temporary.unlink()


def beside(folder: Path, what: str) -> Path:
    """The folder for files about those in `folder` that are not among them: data/<backbone>/merged_report, say.

    An artefact's folder holds only Parquet files of one schema: readers of whole folders (pandas, polars, DuckDB,
    Hugging Face's datasets) also descend into subfolders, and fail on or misread any other file.
    """
    return Path(f"{os.path.abspath(folder)}_{what}")  # absolute: "." has no name to add to


def refuse_leftovers(folder: Path, what: str, *patterns: str) -> None:
    """Raise PipelineError if `folder` holds files that older versions wrote there; they now go `beside` it."""
    old = [pattern for pattern in patterns if any(folder.glob(pattern))]
    if old:
        target = shlex.quote(str(beside(folder, what)))
        paths = " ".join(f"{shlex.quote(str(folder))}/{pattern}" for pattern in old)
        raise PipelineError(
            f"{folder} contains files of an older version that prevent reading it as one table: {', '.join(old)}\n"
            f"move them out:  mkdir -p {target} && mv {paths} {target}"
        )


def remove_dead_folders(path: Path) -> None:
    """Remove what dead runs of `new_folder` left beside `path`: folders that no process locks. If one died between
    moving the former `path` away and the new one into place, the former is put back."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(other) as is_locked:
            _put_back(other, path)
            if is_locked:
                shutil.rmtree(other)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder, inside a locked one beside `path`, that replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    with _locked(place):
        try:
            folder = place / _NEW
            folder.mkdir()
            yield folder
            for written in (*folder.iterdir(), folder):
                fsync(written)
            if path.exists():
                path.rename(place / FORMER)
            folder.rename(path)
            fsync(path.parent)
        finally:
            _put_back(place, path)  # first: what is interrupted here, `remove_dead_folders` completes
            shutil.rmtree(place, ignore_errors=True)


def _put_back(place: Path, path: Path) -> None:
    """Move the former `path` out of a temporary folder of `new_folder`, unless there is a new one."""
    former = place / FORMER
    if former.exists() and not path.exists():
        former.rename(path)
        fsync(path.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False if the file system has none. Raises BlockingIOError if it is taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor, wait=False)
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Sync a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: BinaryIO | int, wait: bool) -> bool:
    """Lock a file, or an open descriptor; False if the file system has no locks.

    Raises BlockingIOError if it is locked elsewhere.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def open_shared(path: Path) -> BinaryIO:
    """Open a file for appending, writable for all who may write its folder: for the group, if that is."""
    file = open(path, "ab")  # noqa: SIM115 - the caller's
    own, folder = os.fstat(file.fileno()), path.parent.stat()
    if folder.st_mode & stat.S_IWGRP and own.st_gid == folder.st_gid and not own.st_mode & stat.S_IWGRP:
        with contextlib.suppress(PermissionError):  # another user's, who has to
            os.fchmod(file.fileno(), own.st_mode & 0o777 | stat.S_IRGRP | stat.S_IWGRP)
    return file


def _open_locked(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file for `path`, locked by this process."""
    while True:
        temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        file = open(temporary, "xb")  # noqa: SIM115 - closed by `atomic`
        lock(file, wait=True)
        # another run may have removed it as dead before it was locked
        if temporary.exists():
            return file, temporary
        file.close()


def require_all(paths: dict[Path, str]) -> None:
    """Raise PipelineError, naming all scripts to run, if some of the files (path -> the script that writes it) are
    missing."""
    missing: dict[str, list[Path]] = {}
    for path, script in paths.items():
        if not path.exists():
            missing.setdefault(script, []).append(path)
    lines = []
    for script, absent in missing.items():
        more = f" (and {len(absent) - 1:,} more)" if len(absent) > 1 else ""
        lines.append(f"{absent[0]}{more} does not exist: run {script} first")
    if lines:
        raise PipelineError("\n".join(lines))
