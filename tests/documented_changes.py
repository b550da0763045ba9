"""The changes that CONTRIBUTING.md shows: read, and made in a copy of the repository.

A ```diff block names its file in a line `--- path`. Its hunks are separated by lines `@@`; in a hunk, lines begin
with a blank (context), with + or with -, as in any diff. The old lines of a hunk must occur in the file once.
A ```py block is a new file, named after `py`. A ```bash block inside a list is a command of the recipe.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    """One hunk."""

    path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}: {self.new.splitlines()[0].strip()}"


def changes(document: str) -> list[Change]:
    """The changes that a document shows, in its order."""
    found = []
    for block in re.findall(r"^ *```diff\n(.*?)^ *```", document, re.MULTILINE | re.DOTALL):
        head, *lines = textwrap.dedent(re.sub(r"^\s*\n", "", block)).splitlines()
        assert head.startswith("--- "), f"a diff must begin with its file, not with: {head}"
        for hunk in "\n".join(lines).split("\n@@\n"):
            old = [line[1:] for line in hunk.splitlines() if line[0] in " -"]
            new = [line[1:] for line in hunk.splitlines() if line[0] in " +"]
            found.append(Change(head.removeprefix("--- "), "\n".join(old) + "\n", "\n".join(new) + "\n"))
    return found


def apply(change: Change, text: str) -> str:
    """The text of the file with the change made. Raises ValueError if its old lines are not there exactly once."""
    places = [match.start() for match in re.finditer(rf"^{re.escape(change.old)}", text, re.MULTILINE)]
    if len(places) != 1:
        raise ValueError(f"{change.path} has these lines {len(places)} times, not once:\n{change.old}")
    return text[: places[0]] + change.new + text[places[0] + len(change.old) :]


def new_files(document: str) -> dict[str, str]:
    """Path -> content of the files that a document adds."""
    blocks = re.findall(r"^ *```py (\S+)\n(.*?)^ *```", document, re.MULTILINE | re.DOTALL)
    return {path: textwrap.dedent(content) for path, content in blocks}


def commands(document: str) -> list[str]:
    """The command lines of its recipes."""
    blocks = re.findall(r"^ +```bash\n(.*?)^ +```", document, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def apply_all(document: str, root: Path) -> None:
    """Make all changes of a document in the files below `root`, and add its new files."""
    for path, content in new_files(document).items():
        (root / path).write_text(content)
    for change in changes(document):
        path = root / change.path
        path.write_text(apply(change, path.read_text()))
