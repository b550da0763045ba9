"""train/tuning/study_storage.py and what study.py keeps in it: a journal whose writers may die, or a PostgreSQL of
our own.
No trial is lost and none counted twice.

Training is a stand-in here, see small_study.py.
"""

import errno
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import small_study
import sqlalchemy
from conftest import ROOT
from optuna.trial import TrialState
from small_study import flags, load, numbers, open_study, stand_in, work

from common import files
from common.errors import ConfigError, PipelineError, StaleArtefact
from train import optuna_worker
from train.tuning import shared_study, study_trials


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A root with a merge and its difficulty; not to be changed."""
    return small_study.write_merge(tmp_path_factory.mktemp("tuning"))


@pytest.fixture
def cfg(merged, tmp_path):
    """Settings whose study lies in tmp_path."""
    return load(merged, tmp_path)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(study_trials, "fit", stand_in())
    monkeypatch.setattr(study_trials, "load_data", lambda cfg: None)


# -------------------------------------------------------------------------------------------- both, and PostgreSQL


def worker_process(merged, tmp_path, seconds, storage):
    """A worker in a process of its own."""
    study_trials.fit, study_trials.load_data = stand_in(seconds), lambda cfg: None
    cfg = load(merged, tmp_path, "tuning.num_trials=20", f"tuning.study_storage={storage}")
    work(cfg, open_study(cfg))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a database of a PostgreSQL of our own: an ordinary user's, on a socket in a short directory."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        assert os.environ.get("CI") != "true", "PostgreSQL is not installed (.ci/system-packages)"
        pytest.skip("PostgreSQL is not installed (.ci/system-packages)")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path has at most 107 bytes
    ordinary = {}
    if os.getuid() == 0:  # initdb refuses root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        ordinary = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def call(program, *arguments):
        command = [found[-1].parent / program, "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60, **ordinary)

    try:
        call("initdb", "-U", "tuner", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "start", "-w", "-l", folder / "log", "-o", options)
        yield f"postgresql://tuner@/postgres?host={folder}"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            call("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["journal", "postgres"])
def test_three_workers_at_once_one_killed_lose_no_trial_and_count_none_twice(
    merged, tmp_path, monkeypatch, kind, request
):
    name = "journal" if kind == "journal" else request.getfixturevalue("postgres")
    asked = ("tuning.num_trials=20", f"tuning.study_storage={name}")
    monkeypatch.setattr(shared_study, "STALE_MIN_S", 1.5)  # the workers are forked: it holds for them too
    monkeypatch.setattr(shared_study, "STALE_UNKNOWN_S", 1.5)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker_process, args=(merged, tmp_path, 0.05, name)) for _ in range(3)]
    for worker in workers:
        worker.start()
    tuning, deadline = open_study(load(merged, tmp_path, *asked)), time.monotonic() + 60
    while sum("longest_epoch_s" in trial.user_attrs for trial in tuning.trials) < 4:
        assert time.monotonic() < deadline, "the workers do not work"
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join(timeout=60)
    deadline = time.time() + shared_study.stale_after_s(tuning.trials)
    while time.time() <= deadline:  # until the killed worker's heartbeat is stale
        time.sleep(0.1)
    last = context.Process(target=worker_process, args=(merged, tmp_path, 0.05, name))
    last.start()
    last.join(timeout=60)
    assert [worker.exitcode for worker in (*workers, last)] == [-signal.SIGKILL, 0, 0, 0]
    tuning = open_study(load(merged, tmp_path, *asked))
    assert not numbers(tuning, TrialState.RUNNING, TrialState.WAITING)
    done = numbers(tuning, TrialState.COMPLETE, TrialState.PRUNED)
    failed = numbers(tuning, TrialState.FAIL)
    assert len(done) == 20
    assert set(failed) == shared_study.retried(tuning.trials)
    assert len({tuning.trials[number].user_attrs["worker"] for number in done}) >= 2  # 3, but for an early kill
    assert len({tuning.trials[number].params["learning_rate"] for number in done}) == 20


def test_a_study_in_postgresql_as_the_commands_see_it(merged, tmp_path, postgres, quick):
    database = sqlalchemy.create_engine(postgres.replace("://", "+psycopg2://"), isolation_level="AUTOCOMMIT")
    with database.connect() as connection:
        connection.execute(sqlalchemy.text("create database another"))
    url = postgres.replace("/postgres?", "/another?")
    asked = (f"tuning.study_storage={url}", f"paths.study_dir={tmp_path / 'study'}")
    with pytest.raises(PipelineError, match=r"tuner@.* holds no study"):
        shared_study.open_study(load(merged, tmp_path, *asked), made_of(merged, tmp_path), create=False)
    assert optuna_worker.main(flags(merged, *asked)) == 0
    tuning = shared_study.open_study(load(merged, tmp_path, *asked), made_of(merged, tmp_path), create=False)
    assert shared_study.num_counted(tuning.trials) == 6
    assert not (tmp_path / "study" / "journal.log").exists()
    with pytest.raises(StaleArtefact, match="steps_per_epoch"):
        open_study(load(merged, tmp_path, *asked, "training.steps_per_epoch=9"))
    assert (tmp_path / "study" / "study.html").exists()


def test_a_database_that_goes_away_is_told(merged, tmp_path, postgres, monkeypatch, quick):
    database = sqlalchemy.create_engine(postgres.replace("://", "+psycopg2://"), isolation_level="AUTOCOMMIT")

    def gone(cfg, data, *, on_epoch):
        with database.connect() as connection:  # no more of our connections, old or new
            for statement in (
                "alter database leaving allow_connections false",
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = 'leaving'",
            ):
                connection.execute(sqlalchemy.text(statement))
        on_epoch(0, 0.5)

    with database.connect() as connection:
        connection.execute(sqlalchemy.text("create database leaving"))
    monkeypatch.setattr(study_trials, "fit", gone)
    url = postgres.replace("/postgres?", "/leaving?")
    with pytest.raises(PipelineError, match=r"connection to .*tuner@.* lost: "):
        optuna_worker.main(flags(merged, f"tuning.study_storage={url}", f"paths.study_dir={tmp_path}"))


def made_of(merged, tmp_path):
    return shared_study.record(load(merged, tmp_path))


def test_a_database_that_cannot_be_reached_is_told(merged, tmp_path):
    url = "postgresql://u@/postgres?host=/nowhere"
    with pytest.raises(PipelineError, match=r"cannot connect to postgresql://u@/postgres"):
        open_study(load(merged, tmp_path, f"tuning.study_storage={url}"))


def test_without_its_driver_postgresql_is_told(merged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # importing it is an ImportError then
    with pytest.raises(ConfigError, match=r"pip install 'embedding-pipeline\[postgres\]'"):
        open_study(load(merged, tmp_path, "tuning.study_storage=postgresql://u@host/x"))


# ----------------------------------------------------------------------------------------------------- the journal


@pytest.mark.timeout(25)  # Optuna's own lock waits for 30 s
def test_a_writer_that_dies_with_the_journals_lock_keeps_nobody_waiting(cfg, quick):
    tuning = open_study(cfg)
    journal = cfg.paths.study_dir / "journal.log"
    code = "import os, signal; from train.tuning.study_storage import JournalLock; "
    code += f"JournalLock({str(journal)!r}).acquire()"
    killed = subprocess.run([sys.executable, "-c", code + "; os.kill(os.getpid(), signal.SIGKILL)"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert work(cfg, tuning, max_trials=1).rows_in == 1


def test_half_a_line_at_the_journals_end_is_dropped(cfg, quick):
    work(cfg, open_study(cfg), max_trials=2)
    journal = cfg.paths.study_dir / "journal.log"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 8, "worker_')  # its writer was killed; the next line would be appended to it
    tuning = open_study(cfg)
    assert work(cfg, tuning).rows_in == 4
    assert len(numbers(open_study(cfg), TrialState.COMPLETE, TrialState.PRUNED)) == 6


def test_a_journal_on_a_disk_without_locks_is_refused_with_the_way_out(cfg, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre without -o flock says

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with pytest.raises(PipelineError, match=r"(?s)study/lock cannot be locked.*paths\.study_dir.*PostgreSQL"):
        open_study(cfg)


@pytest.mark.parametrize("line", ['{"op_code', "[]", "{}", "7"])
def test_a_damaged_journal_is_named(cfg, quick, line):
    work(cfg, open_study(cfg), max_trials=1)
    journal = cfg.paths.study_dir / "journal.log"
    first, *others = journal.read_text().splitlines()
    journal.write_text("\n".join([first, line, *others, ""]))
    with pytest.raises(PipelineError, match=r"(?s)journal\.log is damaged .*move it away"):
        open_study(cfg)


def test_the_journal_is_lines_of_json(cfg, quick):
    work(cfg, open_study(cfg), max_trials=1)
    lines = (cfg.paths.study_dir / "journal.log").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
