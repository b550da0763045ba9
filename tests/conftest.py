"""What all tests share: the repository on the path, synthetic tars, tiny models, and running a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may look for a network
os.environ.setdefault("MPLBACKEND", "agg")


SLOWEST = ("test_slurm", "test_pipeline", "test_readme_commands", "test_optuna_worker")  # minutes each


def pytest_collection_modifyitems(items):
    """The slowest files first: begun last, each would keep one core busy when all others are done."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture
def run_script():
    """Run a script of the repository as a user does: `run_script("train/train.py", "--help")`."""

    def run(script: str, *arguments, cwd: Path | None = None, timeout: float = 120):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout)

    return run


@pytest.fixture(autouse=True)
def _few_threads():
    """Tests share the cores: one thread each for torch, when it is loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
