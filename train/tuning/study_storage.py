"""Where a study's trials are kept, and the lock of its workers: a journal on a shared disk, or PostgreSQL.

Either lock is released by the kernel, or by the server, with the worker that holds it. A database holds one study.
A password in the database's URL is never told or recorded; better still, it stands in ~/.pgpass.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import ArgumentError, OperationalError

from common import files
from common.errors import ConfigError, PipelineError
from common.parquet import first_line
from common.sections import Config

ADVISORY_LOCK = 0x656D62  # a number of our own among a database's advisory locks


def name_of(cfg: Config) -> Path | str:
    """The journal's path, or the database's URL without its password."""
    if cfg.tuning.study_storage == "journal":
        return cfg.paths.study_dir / "journal.log"
    return _url(cfg).render_as_string(hide_password=True)


def open_storage(cfg: Config) -> JournalStorage | RDBStorage:
    """What `tuning.study_storage` names, made where there is none. Call it with the lock."""
    if cfg.tuning.study_storage == "journal":
        path = cfg.paths.study_dir / "journal.log"
        lock = JournalLock(path)
        backend = JournalFileBackend(str(path), lock)  # type: ignore[arg-type] # a lock's base class is private
        try:
            return JournalStorage(backend)
        except ValueError as error:  # a line in the middle that is none of Optuna's
            raise PipelineError(
                f"{path} is damaged ({first_line(error)}): move it away, and the study begins anew"
            ) from None
    url = _url(cfg).render_as_string(hide_password=False)
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # a server may close what idles for an epoch


@contextlib.contextmanager
def locked(cfg: Config) -> Iterator[None]:
    """Hold the study's lock: of all workers, on whatever node, one at a time."""
    cfg.paths.study_dir.mkdir(parents=True, exist_ok=True)
    if cfg.tuning.study_storage == "journal":
        with open(cfg.paths.study_dir / "lock", "ab") as file:
            _lock(file)
            yield
        return
    with _connection(cfg) as connection:  # the lock is the session's, and ends with it
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(ADVISORY_LOCK)))
        yield


def _lock(file: BinaryIO) -> None:
    if not files.lock(file, wait=True):
        raise PipelineError(
            f"{file.name} cannot be locked: its file system has no locks, and the workers of a study need one\n"
            "set paths.study_dir to a folder of another disk, or tuning.study_storage to a PostgreSQL database"
        )


@contextlib.contextmanager
def loss_told(cfg: Config) -> Iterator[None]:
    """Name a database that goes away meanwhile. The trial in hand is tried again by another worker."""
    try:
        yield
    except (StorageInternalError, OperationalError) as error:
        cause = error.__cause__ or error
        raise PipelineError(
            f"{name_of(cfg)} answers no more: {first_line(getattr(cause, 'orig', cause))}"
        ) from None


@contextlib.contextmanager
def _connection(cfg: Config) -> Iterator[sqlalchemy.Connection]:
    try:
        engine = sqlalchemy.create_engine(
            _url(cfg), poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
        )
        connection = engine.connect()
    except ImportError:
        raise ConfigError(
            "tuning.study_storage: PostgreSQL needs its driver: pip install 'embedding-pipeline[postgres]'"
        ) from None
    except OperationalError as error:  # its first line names host, port and user, not the password
        raise PipelineError(f"{name_of(cfg)} does not answer: {first_line(error.orig or error)}") from None
    with connection:
        yield connection


def _url(cfg: Config) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(cfg.tuning.study_storage)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "postgresql":  # not told: there may be a password in it
        raise ConfigError('tuning.study_storage must be "journal" or a URL that begins with postgresql://')
    return url.set(drivername="postgresql+psycopg2")


class JournalLock:
    """The lock of a journal's writers. The kernel releases it with a writer that dies, where Optuna's own locks,
    files that are there or not, keep all others waiting for 30 s.

    It also cuts off half a line at the journal's end, which such a writer can leave: the next line would be
    appended to it, and the journal could not be read any more.
    """

    def __init__(self, journal: Path):
        self.journal = journal

    def acquire(self) -> bool:
        self.file = open(self.journal, "r+b")  # noqa: SIM115 - held until release
        _lock(self.file)
        size = self.file.seek(0, os.SEEK_END)
        if size and os.pread(self.file.fileno(), 1, size - 1) != b"\n":
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()
