"""Every command of README.md, as it stands there, in a fresh copy of the repository.

`make demo` makes the data, of fewer streets; its settings then become the defaults of the copy's config.toml, and
all other commands run on that. Left out: what needs a cluster, a GPU or a network, and what runs these tests.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common import parquet
from common.imagery import tar_images

pytestmark = pytest.mark.timeout(900)  # the demo, on a busy machine
STREETS = 4
LEFT_OUT = {
    "make test": "it runs this",
    "make bench": "it takes 20 minutes",
    "make install": "a network",
    "make demo BACKBONE=": "a network",
    "hf download": "a network",
    "git clone": "a network",
    "aria2c": "a network",
    "sbatch": "a cluster",
    "python slurm/submit.py": "a cluster",
    "python slurm/status.py": "a cluster",
    "source .venv/bin/activate": "done by the environment here",
}
RUNS_ANYWHERE = ("--dry-run", "--local", "--help")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line.strip() and not line.startswith("#")
]
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]


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
        # the environment is another checkout's, and not to be made again: its inputs are older than it
        if not (Path(sys.prefix) / ".installed").exists():
            pytest.skip("this environment was not made by `make install`")
        (folder / ".venv").symlink_to(sys.prefix)
        for name in ("pyproject.toml", "constraints.txt"):
            os.utime(folder / name, (0, 0))
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
        """The names that the README uses for what a user has: PHOTOS, TABLES, a.jpg, b.jpg."""
        data = self.folder / "demo" / f"{STREETS}-streets" / "backbone" / "data"
        rows = parquet.read(
            data / "merged" / "test.parquet", ["tar_file", "image_offset", "image_size"]
        ).to_pylist()
        (self.folder / "PHOTOS").mkdir()
        for name, row in zip(("a.jpg", "b.jpg", "PHOTOS/c.jpg", "PHOTOS/d.jpg"), rows, strict=False):
            tar = tar_images.Tar(self.folder / "demo" / f"{STREETS}-streets" / "raw" / row["tar_file"])
            (self.folder / name).write_bytes(tar.read([row["image_offset"]], [row["image_size"]])[0])
        shutil.copytree(data / "merged", self.folder / "TABLES", ignore=shutil.ignore_patterns("*.json", "*.png"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    copy = Checkout(tmp_path_factory.mktemp("checkout"))
    demo = copy.run("make", "demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    copy.make_the_demos_settings_the_defaults()
    copy.put_a_users_own_files_there()
    return copy


def test_the_readme_has_commands_of_each_kind():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(command.startswith("python train/") for command in COMMANDS)
    assert len(PROGRAMS) >= 2


@pytest.mark.parametrize("command", [command for command in COMMANDS if not left_out(command)])
def test_the_command_works(checkout, command):
    done = checkout.run("bash", "-euc", command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_python_example_works(checkout, number):
    # the paths of the examples: the demo's from the repository's root, a user's own from where the data lies
    program = PROGRAMS[number].replace("80-streets", f"{STREETS}-streets")
    place = checkout.folder if "demo/" in program else checkout.folder / "demo" / f"{STREETS}-streets" / "backbone"
    if "facade.jpg" in program:
        shutil.copy(checkout.folder / "a.jpg", place / "facade.jpg")
    done = checkout.run(sys.executable, "-c", program, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
