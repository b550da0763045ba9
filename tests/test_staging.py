"""slurm/node/staging.py: a shard's tars on the node's own disk, and what happens if they do not fit there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from same_artefacts import assert_same_artefacts
from synthetic import write_dataset

from common import cli, config
from common.errors import Stopped
from slurm import chain
from slurm.node import staging

LISTS = """
import sys
from pathlib import Path
for path in sorted(Path(sys.argv[-1].removeprefix("paths.raw_dir=")).iterdir()):
    print(path.name, "is a", "link" if path.is_symlink() else "copy")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two processed gzip tars, and the fingerprints of the first."""
    root = tmp_path_factory.mktemp("staging")
    write_dataset(root / "data" / "raw", streets=2, cities=2, image_px=64, facades_per_street=2)
    flags = ["--set", f"paths.root={root}"]
    for script, shards in [("process_tar", []), ("compute_fingerprints", ["--num-shards", "2", "--shard", "0"])]:
        command = [sys.executable, ROOT / "preprocess" / f"{script}.py", *shards, *flags]
        subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture
def task(place, tmp_path):
    """Run a script as slurm/node/task.py does for shard 1 of 2, with a node's disk below tmp_path."""

    def run(script: Path, root: Path, stage_to: str = "$NODE_DISK") -> str:
        flags = ["--num-shards", "2", "--set", f"paths.root={root}", "--set", f"slurm.stage_to={stage_to}"]
        job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "NODE_DISK": str(tmp_path / "disk")}
        command = [sys.executable, ROOT / "slurm" / "node" / "task.py", script, *flags]
        told = subprocess.run(command, env=os.environ | job, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout + told.stderr

    return run


def test_the_tars_with_work_are_copied_and_the_others_linked(place, task, tmp_path):
    (tmp_path / "compute_fingerprints.py").write_text(LISTS)
    stale = tmp_path / "disk" / "staged-7-1"
    stale.mkdir(parents=True)
    (stale / "0001.tar").touch()  # of the same job, which was killed and is queued again
    told = task(tmp_path / "compute_fingerprints.py", place)
    assert told.splitlines()[-3:] == [f"1 of 1 tars copied to {stale}", "0088.tar is a link", "0089.tar is a copy"]
    assert not list((tmp_path / "disk").iterdir())


def test_a_stage_makes_the_same_of_copies_and_reads_the_index_of_a_gzip_tar(place, task, tmp_path):
    def indices(root: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in root.glob("data/intermediates_index/*")}

    assert len(indices(place)) == 2
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for root in (ours, theirs):
        shutil.copytree(place, root)
    told = task(ROOT / "preprocess" / "compute_fingerprints.py", ours)
    assert "1 of 1 tars copied" in told
    task(ROOT / "preprocess" / "compute_fingerprints.py", theirs, stage_to="")
    assert_same_artefacts(ours, theirs)
    assert indices(ours) == indices(place)  # not made anew
    assert not list((tmp_path / "disk").iterdir())
    assert "copied" not in task(ROOT / "preprocess" / "compute_fingerprints.py", ours)  # nothing is left to do


@pytest.mark.parametrize("stage_to", ["$NO_SUCH_VARIABLE/tars", "relative"])
def test_a_folder_that_is_none_on_the_node_is_told_and_the_tars_are_read_where_they_are(
    place, tmp_path, task, stage_to
):
    root = tmp_path / "root"
    shutil.copytree(place, root)
    told = task(ROOT / "preprocess" / "compute_fingerprints.py", root, stage_to)
    assert f"no copies: slurm.stage_to is {stage_to} on this node, not an absolute path" in told
    assert len(list(root.glob("data/fingerprints/*"))) == 2


def test_what_does_not_fit_stays_a_link(place, tmp_path, monkeypatch, full_disk, capsys):
    tars = sorted((place / "data" / "raw").iterdir())
    folder = tmp_path / "disk" / "staged"
    assert staging.link(folder, place / "data" / "raw")
    monkeypatch.setattr(staging, "SPARE_BYTES", 2**60)
    assert staging.copy(folder, tars) == 0
    assert capsys.readouterr().out.count("GB free") == 2
    monkeypatch.setattr(staging, "SPARE_BYTES", 0)
    with full_disk(min(tar.stat().st_size for tar in tars)):  # by another job meanwhile, in the larger one
        assert staging.copy(folder, tars) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["0088.tar", "0089.tar"]
    assert sorted(path.is_symlink() for path in folder.iterdir()) == [False, True]
    assert all((folder / tar.name).read_bytes() == tar.read_bytes() for tar in tars)


def test_a_signal_ends_the_copying_and_the_stage(place, tmp_path, monkeypatch):
    cfg = config.load(None, [f"paths.root={place}", f"slurm.stage_to={tmp_path}"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert staging.read_by(chain.steps_of(cfg)[1], cfg, 1, 2) == [place / "data" / "raw" / "0089.tar"]
    monkeypatch.setattr(cli, "_stop_signal", signal.SIGUSR2)
    with pytest.raises(Stopped):
        staging.run_on_copies(["true"], cfg, "compute_fingerprints", 1, 2)
    assert not list(tmp_path.iterdir())
    began = time.monotonic()
    assert staging.run(["sleep", "60"]) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert staging.run(["sh", "-c", "trap 'exit 85' TERM; while :; do sleep 0.05; done"]) == 85
