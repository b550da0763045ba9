"""Where a study's trials are kept, and the lock that its workers share: a journal on a shared disk, or PostgreSQL.

Either lock is released by the kernel, or by the server, when the worker that holds it dies. A database holds one
study. Its password, if it has one, is in ~/.pgpass or PGPASSWORD, where the driver looks by itself.
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
from sqlalchemy.exc import OperationalError

from common import files
from common.errors import ConfigError, PipelineError, first_line
from common.sections import Config

_ADVISORY_LOCK = 0x656D62  # this pipeline's number among a database's advisory locks


def name_of(cfg: Config) -> Path | str:
    """The journal's path, or the database's URL."""
    storage = cfg.tuning.study_storage
    return cfg.paths.study_dir / "journal.log" if storage == "journal" else storage


def open_storage(cfg: Config) -> JournalStorage | RDBStorage:
    """The storage that `tuning.study_storage` names, created if necessary. Requires the lock."""
    journal = name_of(cfg)
    if not isinstance(journal, Path):
        engine = {"pool_pre_ping": True}  # a server may close idle connections
        return RDBStorage(str(_url(cfg)), engine_kwargs=engine)
    files.open_shared(journal).close()
    try:  # the type of a lock is private
        return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError) as error:  # a line in the middle that is not Optuna's
        raise PipelineError(
            f"{journal} is damaged ({first_line(error)})\nmove it away to start a new study"
        ) from None


@contextlib.contextmanager
def locked(cfg: Config) -> Iterator[None]:
    """Hold the study's lock, which one worker at a time can have, on whatever node."""
    cfg.paths.study_dir.mkdir(parents=True, exist_ok=True)
    if cfg.tuning.study_storage == "journal":
        with files.open_shared(cfg.paths.study_dir / "lock") as file:
            _lock(file)
            yield
        return
    try:
        connection = sqlalchemy.create_engine(
            _url(cfg), poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
        ).connect()
    except ImportError:
        raise ConfigError(
            "tuning.study_storage: PostgreSQL needs its driver: pip install 'embedding-pipeline[postgres]'"
        ) from None
    except OperationalError as error:
        raise PipelineError(f"cannot connect to {name_of(cfg)}: {first_line(error.orig or error)}") from None
    with connection:  # the lock belongs to this session, and ends with it
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(_ADVISORY_LOCK)))
        yield


@contextlib.contextmanager
def reported_connection_errors(cfg: Config) -> Iterator[None]:
    """Turn the loss of the database into a PipelineError. Another worker retries the current trial."""
    try:
        yield
    except (StorageInternalError, OperationalError) as error:
        cause = error.__cause__ or error
        reason = first_line(getattr(cause, "orig", cause))
        raise PipelineError(f"connection to {name_of(cfg)} lost: {reason}") from None


def _lock(file: BinaryIO) -> None:
    if not files.lock(file, wait=True):
        raise PipelineError(
            f"{file.name} cannot be locked: its file system does not support locks, which tuning needs\n"
            "set paths.study_dir to a folder on another disk, or tuning.study_storage to a PostgreSQL database"
        )


def _url(cfg: Config) -> sqlalchemy.URL:
    return sqlalchemy.make_url(cfg.tuning.study_storage).set(drivername="postgresql+psycopg2")


class JournalLock:
    """The lock of a journal's writers: when one dies, Optuna's own lock file would block the others for 30 s.

    Acquiring it also removes an incomplete last line, which a dying writer can leave: the next line would be
    appended to it and make the journal unreadable.
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
