"""A command on a terminal of its own, and what is then on its screen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

COLUMNS = 250  # so that no line wraps


def run(command: list[str], cwd: Path, timeout: float = 120) -> tuple[int, list[str], str]:
    """(exit code, the screen's lines at the end, everything that was written)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 65_536):
            written += block
    except OSError:  # EIO: the last process that had the terminal has ended
        pass
    finally:
        os.close(ours)
    text = written.decode()
    return process.wait(timeout), screen(text), text


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after this output, in which \\r and \\n alone move the cursor."""
    assert not re.search(r"\x1b\[[0-9;]*[^m0-9;]", text)
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).split("\n"):
        shown: list[str] = []
        for written in line.split("\r"):
            shown[: len(written)] = written
        lines.append("".join(shown).rstrip())
    return lines
