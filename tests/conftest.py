"""What all tests share: the repository on the path, synthetic tars, tiny models, and running a script."""

import contextlib
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may look for a network
os.environ.setdefault("MPLBACKEND", "agg")
# tests share the cores, and threads of one that wait for one another while others compute wait for long
os.environ["OMP_NUM_THREADS"] = "1"

from common import cli

cli.collect_seldom()

SLOWEST = (  # half a minute to minutes each
    *("test_slurm", "test_slurm_sites", "test_pipeline", "test_docs_commands"),
    *("test_optuna_storage", "test_optuna_worker"),
)


def pytest_collection_modifyitems(items):
    """The slowest files first: begun last, each would keep one core busy when all others are done."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_collection_finish():
    """What the tests have imported stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


def paths_below(root: Path):
    """Where the pipeline has its files if nothing but paths.root is set."""
    from common import config

    return config.load(None, [f"paths.root={root}"]).paths


@pytest.fixture
def run_script():
    """Run a script of the repository as a user does: `run_script("train/train.py", "--help")`."""

    def run(script: str, *arguments, cwd: Path | None = None, timeout: float = 120):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout)

    return run


@pytest.fixture
def full_disk():
    """`with full_disk(50_000):` no file can grow beyond so many bytes, as if there were no room for more; with
    pytest -s nor can the one that its output goes to.
    """

    @contextlib.contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def cuda():
    """A simulated CUDA device of 80 GB. A test on it fails if it finds a race."""
    import simulated_cuda

    with simulated_cuda.installed() as device:
        yield device
    assert not device.races


@pytest.fixture
def racing_cuda():
    """The same, for a test that provokes races."""
    import simulated_cuda

    with simulated_cuda.installed() as device:
        yield device


@pytest.fixture
def no_curves(monkeypatch):
    """Runs leave an empty curves.png: drawing it takes longer than a small training."""
    from train.fitting import history

    monkeypatch.setattr(history, "draw", lambda path, table: path.touch())


@pytest.fixture
def no_figures(monkeypatch):
    """Reports have the texts of their figures alone: drawing them takes longer than a small evaluation."""
    from common import pages

    monkeypatch.setattr(pages, "svg", lambda figure, alt: alt)


@pytest.fixture
def cfg(tmp_path):
    """The settings of a chain of four shards below tmp_path."""
    from common import config

    return config.load(None, [f"paths.root={tmp_path}", "slurm.num_shards=4", 'slurm.sbatch=["--account=abc"]'])


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Fake clients of Slurm: `clients(squeue="echo hello")` puts shell scripts before the PATH."""
    folder = tmp_path / "clients"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(**scripts) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write


@pytest.fixture
def submitted(cfg, clients, tmp_path):
    """Submit the whole chain of `cfg` to a fake sbatch, which notes its environment; the folder of the run."""
    from slurm import chain, jobs, runs, submit

    def submit_all() -> Path:
        clients(
            sbatch=f"echo >> {tmp_path}/calls; env > {tmp_path}/environment; wc -l < {tmp_path}/calls",
            squeue="true",
            scontrol="echo 'MaxArraySize = 1001'",
        )
        steps = chain.steps_of(cfg)
        todo = {step.name: list(range(step.tasks)) for step in steps}
        assert jobs.submit(steps, todo, cfg, submit.parse([])) == 0
        return runs.find(cfg.paths.logs_dir, None)

    return submit_all
