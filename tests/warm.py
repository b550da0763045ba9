"""Scripts as processes of their own that find torch and transformers imported: on little data most of their time.

Each is forked from a process that has imported libraries and done nothing else, and then runs the script as
`python SCRIPT` does. Where the command itself is tested (documentation, Slurm), that is started instead.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "torch._dynamo", "transformers.modeling_utils", "transformers.models.dinov2.modeling_dinov2"]
LIBRARIES += ["pandas", "pyarrow.parquet", "pydantic", "scipy.stats", "matplotlib.pyplot", "jinja2", "simplejpeg"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


class Warm:
    """A script that runs. `lingers`: it does not end by itself, so that one can kill it at any time."""

    def __init__(self, script: str, *arguments, lingers: bool = False):
        self._folder = tempfile.TemporaryDirectory()
        words = [str(ROOT / script), *map(str, arguments)]
        self.process = _context.Process(target=_run, args=(words, Path(self._folder.name), lingers))
        self.process.start()

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for its end; its exit code (of a signal: less than 0) and what it has said."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.process} has not ended after {timeout} s"
        texts = [self.told_so_far(name) for name in ("stdout", "stderr")]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *texts)

    def told_so_far(self, name: str) -> str:
        """What it has written to "stdout" or "stderr"."""
        path = Path(self._folder.name) / name
        return path.read_text() if path.exists() else ""


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    return Warm(script, *arguments).finish()


def _run(words: list[str], folder: Path, lingers: bool) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))  # as Python does; the script replaces it
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if lingers:
            signal.pause()
