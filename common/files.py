"""Files that are there when they are whole, and not before: atomic writes that clean up after dead runs."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import shlex
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import PipelineError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, some network disks
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEAD_AFTER_S = 3 * 24 * 3600.0  # without locks: nobody writes for so long without a row group in between
_TEMPORARY = re.compile(r"^\.(?P<target>.+)\.tmp-[0-9a-f]{12}$")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    The data is written to a temporary file in the same directory, forced to disk, and renamed over `path`.
    The temporary file is locked while it is written: one that nobody locks was left by a dead run, and the
    next run that writes the same `path` removes it. Two runs at once do not disturb each other; the last wins.
    Where the file system has no locks, only what has not been written to for three days is taken for dead.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # in spite of `parents`: below /proc, for instance
        raise PipelineError(f"the folder {path.parent} cannot be made: look at paths.root and [paths]") from None
    remove_dead_temporaries(path)
    file, temporary = _open_locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # still locked: nobody takes it for a dead run's
        fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(path)  # to be told: which disk is full
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def remove_dead_temporaries(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are gone."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        match = _TEMPORARY.match(other.name)
        if match is None or match["target"] != path.name:
            continue
        # opened for writing, without which NFS gives no lock; gone meanwhile, or locked: in use
        with contextlib.suppress(OSError), open(other, "r+b") as file:
            if lock(file, wait=False) or time.time() - os.fstat(file.fileno()).st_mtime > _DEAD_AFTER_S:
                other.unlink()


def beside(folder: Path, what: str) -> Path:
    """The folder for `what` is about the files in `folder` but is not one of them: data/merged_report, say.

    An artefact's folder holds Parquet files of one schema and nothing else. Readers of whole folders (pandas,
    polars, DuckDB, Hugging Face's datasets) look into subfolders too, and stop at, or misread, any other file.
    """
    return Path(f"{os.path.abspath(folder)}_{what}")  # absolute: "." has no name to add to


def refuse_leftovers(folder: Path, what: str, *patterns: str) -> None:
    """Raise PipelineError if `folder` holds files that older versions wrote there, and now go `beside` it."""
    old = [pattern for pattern in patterns if any(folder.glob(pattern))]
    if old:
        target = shlex.quote(str(beside(folder, what)))
        paths = " ".join(f"{shlex.quote(str(folder))}/{pattern}" for pattern in old)
        raise PipelineError(
            f"{folder} holds files of an older version that make it unreadable as one table: {', '.join(old)}\n"
            f"move them out:  mkdir -p {target} && mv {paths} {target}"
        )


def fsync(path: Path) -> None:
    """Force a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: BinaryIO | int, wait: bool) -> bool:
    """Lock a file, or what a descriptor has open; False where the file system has no locks.

    Raises BlockingIOError if another holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _open_locked(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file for `path` that this process holds the lock of."""
    while True:
        temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        file = open(temporary, "xb")  # noqa: SIM115 - closed by `atomic`
        lock(file, wait=True)
        # between its creation and its locking, another run may have taken it for a dead run's and removed it
        if temporary.exists():
            return file, temporary
        file.close()
