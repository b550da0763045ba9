"""common/files.py: a file is there when it is whole, whatever happens to its writer."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

from common import config, files
from common.errors import PipelineError
from slurm import runs
from train.tuning import study_storage


def in_another_process(code: str, *arguments) -> subprocess.Popen:
    prologue = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common import files\nfrom pathlib import Path\n"
    )
    command = [sys.executable, "-c", prologue + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_is_told_by_the_file_that_it_is_wanted_for(tmp_path, full_disk):
    path = tmp_path / "folder" / "a.txt"
    with full_disk(100), pytest.raises(OSError, match="File too large") as caught:
        files.write_bytes(path, bytes(1_000))
    assert caught.value.filename == str(path)
    assert os.listdir(path.parent) == []


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(PipelineError, match=r"cannot create the directory /proc/nowhere/data: check paths\.root"):
        files.write_text(Path("/proc/nowhere/data/a.txt"), "")


def test_a_killed_writers_temporary_is_removed_by_the_next_but_a_living_ones_is_not(tmp_path):
    path = tmp_path / "a.txt"
    code = """
        with files.atomic(Path(sys.argv[1])) as file:
            print("writing", flush=True)
            __import__("time").sleep(60)
    """
    living, dying = (in_another_process(code, path) for _ in range(2))
    try:
        for process in (living, dying):
            assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        dying.send_signal(signal.SIGKILL)
        dying.wait()
        files.write_text(path, "new")
        assert len(list(tmp_path.glob(".a.txt.tmp-*"))) == 1  # a removal by name alone would leave 0
        assert path.read_text() == "new"
    finally:
        for process in (living, dying):
            process.kill()
            process.wait()
            process.stdout.close()


def test_two_writers_at_once_both_end_well_and_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    code = """
        for _ in range(200):
            files.write_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 5000)
    """
    writers = [in_another_process(code, path, letter) for letter in "xy"]
    for writer in writers:
        assert writer.wait(timeout=60) == 0
        writer.stdout.close()
    assert path.read_bytes() in (b"x" * 5000, b"y" * 5000)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_of_another_file_with_a_longer_name_is_left_alone(tmp_path):
    other = tmp_path / ".a.txt.tmp-1.tmp-0123456789ab"
    other.write_bytes(b"")
    files.write_text(tmp_path / "a.txt", "x")
    assert other.exists()


def test_a_dead_runs_temporary_is_removed_where_locks_need_a_file_opened_for_writing(tmp_path, monkeypatch):
    real = fcntl.flock

    def of_nfs(file, how):  # which makes a lock of bytes out of it, see flock(2)
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", of_nfs)
    (tmp_path / f".a.txt.tmp-{'a' * 12}").write_bytes(b"half")
    files.write_text(tmp_path / "a.txt", "whole")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_with_brackets_is_taken_as_it_stands(tmp_path):
    name = "0088 [copy].txt"
    (tmp_path / f".{name}.tmp-{'a' * 12}").write_bytes(b"half")
    files.write_text(tmp_path / name, "whole")
    assert os.listdir(tmp_path) == [name]  # as a pattern, the name would not match its own temporaries


def test_without_locks_files_are_written_and_only_old_temporaries_removed(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre without -o flock says

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    old, new = (tmp_path / f".a.txt.tmp-{letter * 12}" for letter in "ab")
    for temporary, age_s in ((old, 4 * 24 * 3600), (new, 3600)):
        temporary.write_bytes(b"half")
        os.utime(temporary, (0, time.time() - age_s))
    files.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert new.exists()  # it may have a writer
    assert not old.exists()


def test_a_folder_beside_has_the_folders_name_and_more_whatever_the_folder_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "v1.0"
    folder.mkdir()
    assert files.beside(folder, "rejects") == tmp_path / "v1.0_rejects"  # with_suffix would make v1_rejects
    monkeypatch.chdir(folder)
    assert files.beside(Path("."), "rejects") == tmp_path / "v1.0_rejects"  # with_name has no name to change
    assert files.beside(Path("out/"), "rejects") == folder / "out_rejects"


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("folder_mode", "expected"), [(0o2775, 0o664), (0o755, 0o644)])
def test_a_lock_is_as_writable_as_its_folder(tmp_path, umask, folder_mode, expected):
    """Whatever the umask of who came first."""
    tmp_path.chmod(folder_mode)
    for _ in range(2):
        with files.open_shared(tmp_path / "lock") as file:
            assert files.lock(file, wait=False)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_of_a_project_share_submit_py_s_and_a_study_s_lock(umask):
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which other users may not enter
        folder, group = Path(name), 54321
        os.chown(folder, -1, group)
        folder.chmod(0o2775)
        cfg = config.load(None, [f"paths.root={folder}", f"paths.study_dir={folder}"])
        with runs.lock(folder), study_storage.locked(cfg):
            study_storage.open_storage(cfg)
        for path in (".submit.lock", "lock", "journal.log"):
            colleague = {"user": 65534, "group": 65534, "extra_groups": [group]}
            assert subprocess.run(["sh", "-c", f": >> {folder / path}"], **colleague).returncode == 0


@pytest.mark.parametrize("cut", [0, 1, 3, 50, 90, 200, 10_000])
def test_weights_that_are_cut_off_are_told_as_safetensors_tells_them(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones(7, np.float32), "b": np.ones((2, 3))}, path, {"format": "pt"})
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - cut)])
    try:
        safetensors.safe_open(path, "np")
        assert files.is_whole(path)
    except safetensors.SafetensorError:
        assert not files.is_whole(path)
    assert not files.is_whole(tmp_path / "absent.safetensors")
