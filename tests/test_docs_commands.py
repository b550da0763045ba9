"""Every command and Python example of README.md, CONTRIBUTING.md and docs/*.md, as written, in a fresh copy of the
repository.

`make demo` makes the data, with fewer streets; its settings then become the defaults of the copy's config.toml,
and everything else runs on that, page by page, in order. Left out: what needs a cluster, a GPU or a network, and
what runs these tests. The changes that CONTRIBUTING.md shows are made in a copy of their own, and tested there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documented_changes
import pytest
from conftest import ROOT
from generated_docs import DOCUMENTS

from common import parquet
from common.imagery import tar_images

pytestmark = pytest.mark.timeout(900)  # the demo, on a busy machine
STREETS = 4
LEFT_OUT = {
    "make test": "it runs this",
    "make unit": "it runs this",
    "make lint": "`make test` runs it",
    "make bench": "it takes 20 minutes",
    "make install": "a network",
    "make PYTHON=": "a network",
    "PIP_NO_INDEX=1": "a wheelhouse",
    "python -m pip": "a network",
    "python -m venv": "it goes before what needs a network",
    "uv ": "a network",
    "conda ": "conda",
    "module ": "modules",
    "apptainer ": "containers",
    "make demo BACKBONE=": "a network",
    "hf download": "a network",
    "git clone": "a network",
    "aria2c": "a network",
    "embedding-atlas ": "a network, and 7 GB",
    "sbatch": "a cluster",
    "srun": "a cluster",
    "python slurm/submit.py": "a cluster",
    "python slurm/status.py": "a cluster",
    "chgrp ": "a project folder",
    "chmod ": "a project folder",
    "find ": "a project folder",
    "source .venv/bin/activate": "done by the environment here",
}
RUNS_ANYWHERE = ("--dry-run", "--local", "--help")


def examples(text: str) -> list[tuple[str, str]]:
    """("bash", a command) and ("python", a program), as they follow one another in a document."""
    found = []
    for kind, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        commands = [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
        found += [("python", block)] if kind == "python" else [("bash", command) for command in commands]
    return found


EXAMPLES = {path.name: examples(path.read_text()) for path in DOCUMENTS}
COMMANDS = [text for page in EXAMPLES.values() for kind, text in page if kind == "bash"]


def left_out(command: str) -> bool:
    return not any(flag in command for flag in RUNS_ANYWHERE) and any(
        command.startswith(name) for name in LEFT_OUT
    )


class Checkout:
    """A copy of the files that git would give a user, with the environment that these tests run in."""

    def __init__(self, folder: Path):
        self.folder = folder
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in listing.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)  # which make leaves as it is
        by_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the one that runs these tests
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in by_make},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STREETS": str(STREETS),
        }

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )

    def make_the_demos_settings_the_defaults(self) -> None:
        told = self.run("make", "-n", "demo").stdout
        settings = dict(re.findall(r"--set (\S+?)=(\S+)", told.split("submit.py")[1].splitlines()[0]))
        assert len(settings) > 10
        lines, section = [], ""
        for line in (self.folder / "config.toml").read_text().splitlines():
            section = line.strip("[]") if line.startswith("[") else section
            value = settings.get(f"{section}.{line.split(' =')[0]}")
            if value is not None:
                value = value if re.fullmatch(r"[\d.]+", value) else f'"{value}"'
                line = f"{line.split(' =')[0]} = {value}"
            lines.append(line)
        (self.folder / "config.toml").write_text("\n".join(lines))

    def put_a_users_own_files_there(self) -> None:
        """The names that the pages use for a user's own files: PHOTOS, BUILDINGS, TABLES, survey.csv, a.jpg,
        b.jpg, facade.jpg."""
        data = self.folder / "demo" / f"{STREETS}-streets" / "data" / "backbone"
        rows = parquet.read(
            data / "merged" / "test.parquet", ["tar_file", "image_offset", "image_size"]
        ).to_pylist()
        names = ["a.jpg", "b.jpg", "PHOTOS/c.jpg", "PHOTOS/d.jpg", "BUILDINGS/inn/e.jpg", "BUILDINGS/inn/f.jpg"]
        (self.folder / "survey.csv").write_text("path,building\na.jpg,mill\nb.jpg,mill\n")
        for name, row in zip(names, rows, strict=False):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            tar = tar_images.Tar(self.folder / "demo" / f"{STREETS}-streets" / "raw" / row["tar_file"])
            (self.folder / name).write_bytes(tar.read([row["image_offset"]], [row["image_size"]])[0])
        for folder in (self.folder, data.parents[1]):
            shutil.copy(self.folder / "a.jpg", folder / "facade.jpg")
        shutil.copytree(data / "merged", self.folder / "TABLES", ignore=shutil.ignore_patterns("*.json", "*.png"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    copy = Checkout(tmp_path_factory.mktemp("checkout"))
    demo = copy.run("make", "demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    copy.make_the_demos_settings_the_defaults()
    copy.put_a_users_own_files_there()
    return copy


def test_the_pages_have_examples_of_each_kind():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(command.startswith("python train/") for command in COMMANDS)
    assert sum(kind == "python" for page in EXAMPLES.values() for kind, _ in page) >= 5


def to_run() -> dict[tuple[str, str], str]:
    """(kind, text) of what can run here -> its name, with the first page that shows it."""
    names: dict[tuple[str, str], str] = {}
    for page, found in EXAMPLES.items():
        for number, (kind, text) in enumerate(found):
            if kind == "python" or not left_out(text):
                names.setdefault((kind, text), f"{page}, {f'program {number}' if kind == 'python' else text}")
    return names


@pytest.mark.parametrize(("kind", "text"), to_run(), ids=to_run().values())
def test_the_example_works(checkout, kind, text):
    text = text.replace("80-streets", f"{STREETS}-streets").replace("dinov2-base-cls-1-0.5", "backbone")
    if kind == "bash":
        done = checkout.run("bash", "-euc", text)
    else:  # its paths: a user's own and the demo's from the repository's root, the pipeline's from the data's
        from_root = "demo/" in text or "PHOTOS" in text
        place = checkout.folder if from_root else checkout.folder / "demo" / f"{STREETS}-streets"
        done = checkout.run(sys.executable, "-c", text, cwd=place)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_changes_that_contributing_shows_pass_the_tests_that_they_add(tmp_path):
    copy, document = Checkout(tmp_path), (ROOT / "CONTRIBUTING.md").read_text()
    documented_changes.apply_all(document, copy.folder)
    tests = "choices bandit loss backbone docs structure settings stage_sbatch count_views".split()
    chosen = "choices or take_turns or circle or gem or vit or views or wrappers or settings"
    for command in (
        *documented_changes.commands(document),
        "python tests/generated_docs.py",
        "ruff check . && ruff format --check .",
        "python preprocess/count_views.py --help",
        "python slurm/submit.py --only count_views --dry-run",
        f"python -m pytest -q -n 0 -k '({chosen} or up_to_date) and not shown' "
        + " ".join(f"tests/test_{name}.py" for name in tests),
    ):
        done = copy.run("bash", "-euc", command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert '`"circle"`' in (copy.folder / "docs" / "reference.md").read_text()
