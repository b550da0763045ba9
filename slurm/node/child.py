"""A stage as a child process of its job's task, which passes on the signal to stop."""

import subprocess

from common import cli


def run(command: list[str]) -> int:
    """Run a command, and stop it if a signal asks for that; its exit code, as a shell gives it."""
    process, is_told = subprocess.Popen(command), False
    while True:
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if cli.stop_requested() and not is_told:
                process.terminate()
                is_told = True
        else:
            return code if code >= 0 else 128 - code
