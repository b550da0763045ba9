"""The Makefile's care for environments that it did not make, slurm/sites/, and what is said where something lacks.

Interpreters, `module`, conda and apptainer are stand-ins that note how they are called: nothing is installed.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from conftest import ROOT

from common import config
from common.errors import ConfigError

PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
FAKE_PYTHON = """\
#!/bin/sh
echo "$(basename "$0") $@" >> {calls}
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/has-pip ;;
    "-m pip --version") test -e "$(dirname "$0")/has-pip" ;;
    "-m pip install"*) test ! -e no-network ;;
esac
"""


class Checkout:
    """A folder with a Makefile and its inputs, in which `python` and `python3` only note how they are called."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        for name in ("python", "python3"):
            self.write_python(folder / "bin" / name)
        by_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CONSTRAINTS", "PYTHON")  # of the one that runs these tests
        self.environment = {name: value for name, value in os.environ.items() if name not in by_make}
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

    def write_python(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.format(calls=self.calls))
        path.chmod(0o755)

    def make(self, *words: str, code: int = 0) -> str:
        """What `make` prints, after which `called` are the interpreters' calls."""
        self.calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", *words], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    @property
    def called(self) -> list[str]:
        """The calls that create an environment, install into it or run something of the pipeline's."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in calls if not re.search("--version|compileall|sys.exit", call)]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_make_creates_an_environment_once_and_updates_it_when_its_inputs_change(checkout):
    install = "python -m pip install --quiet --disable-pip-version-check"
    install = f"{install} -c constraints.txt --no-compile -e .[dev]"
    checkout.make("style")
    assert checkout.called[:2] == ["python3 -m venv .venv", install]
    checkout.make("install")
    assert checkout.called == []
    os.utime(checkout.folder / "pyproject.toml")
    checkout.make("install")
    assert checkout.called == [install]  # the environment is not created again


@pytest.mark.parametrize("interrupted", ["created", "before pip"])
def test_an_installation_that_broke_off_is_continued(checkout, interrupted):
    (checkout.folder / "no-network").touch()
    checkout.make("install", code=2)
    (checkout.folder / "no-network").unlink()
    if interrupted == "before pip":
        (checkout.folder / ".venv" / "bin" / "has-pip").unlink()
    checkout.make("install")
    created = ["python3 -m venv .venv"] if interrupted == "before pip" else []
    assert [call for call in checkout.called if "install" not in call] == created
    checkout.make("install")
    assert checkout.called == []


@pytest.mark.parametrize("kind", ["uv", "link"])
def test_an_environment_that_make_did_not_create_is_used_as_it_is(checkout, kind):
    own = checkout.folder / (".venv" if kind == "uv" else "elsewhere")
    checkout.write_python(own / "bin" / "python")
    settings = "include-system-site-packages = true\n"
    (own / "pyvenv.cfg").write_text(settings)
    if kind == "link":  # to the environment of another checkout
        (own / ".installed").touch()
        (checkout.folder / ".venv").symlink_to(own)
    os.utime(checkout.folder / "pyproject.toml")
    assert ".venv/bin/python is used as it is" in checkout.make("install")
    assert checkout.called == []
    checkout.make("style")
    assert checkout.called == ["python -m ruff check .", "python -m ruff format --check ."]
    assert (own / "pyvenv.cfg").read_text() == settings


def test_make_takes_the_active_python_and_installs_nothing_there(checkout):
    assert "python is used as it is" in checkout.make("install", "RUN=python")
    checkout.make("style", "RUN=python")
    assert checkout.called == ["python -m ruff check .", "python -m ruff format --check ."]
    assert not (checkout.folder / ".venv").exists()


def test_a_copy_in_site_packages_says_that_a_checkout_is_needed(tmp_path, monkeypatch):
    copy = tmp_path / "site-packages"
    shutil.copytree(ROOT / "common", copy / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "preprocess", copy / "preprocess", ignore=shutil.ignore_patterns("__pycache__"))
    script = copy / "preprocess" / "process_tar.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "is not a checkout of the repository" in result.stderr
    assert "pip install -e ." in result.stderr
    assert len(result.stderr.splitlines()) == 2
    with pytest.raises(ConfigError, match="cannot read the configuration"):  # another file that is not there
        config.load(tmp_path / "config.toml")


# ------------------------------------------------------------------------------------------------- slurm/sites/


@pytest.fixture
def sourced(tmp_path):
    """Source an environment of slurm/sites/ as a job does, with stand-ins; what `python` is then called with."""

    def run(name: str) -> str:
        root, fakes = tmp_path / "repository", tmp_path / "fakes"
        shutil.copytree(ROOT / "slurm" / "sites", root / "slurm" / "sites")
        activate = root / ".venv" / "bin" / "activate"
        conda = tmp_path / "miniforge3" / "etc" / "profile.d" / "conda.sh"
        for path in (activate, conda, fakes / "apptainer"):
            path.parent.mkdir(parents=True, exist_ok=True)
        activate.write_text('echo ".venv is active"')
        conda.write_text('conda() { echo "conda $@"; }')
        (fakes / "apptainer").write_text('#!/bin/sh\necho "apptainer $@; binds $APPTAINER_BIND"')
        (fakes / "apptainer").chmod(0o755)
        (fakes / "python").write_text('#!/bin/sh\necho "python $@"')
        (fakes / "python").chmod(0o755)
        script = 'module() { echo "module $@"; }; source "$root/slurm/sites/$0.sh"; python a.py --b "c d"; env'
        environment = {"PATH": f"{fakes}:{os.environ['PATH']}", "HOME": str(tmp_path), "root": str(root)}
        environment |= {"SLURM_CPUS_PER_TASK": "3", "USER": "me"}
        done = subprocess.run(["bash", "-c", script, name], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert {"OMP_NUM_THREADS=3", "HF_HUB_OFFLINE=1"} <= set(lines)
        assert [line for line in lines if re.fullmatch(r"HF_HOME=/\w+/(\w+/)?me/huggingface", line)]
        return done.stdout

    return run


def test_a_site_with_modules_loads_them_before_the_environment(sourced):
    told = sourced("modules").splitlines()
    assert re.fullmatch(r"module load python/3\.1\d gcc arrow/\S+", told[0])
    assert told[1:3] == [".venv is active", "python a.py --b c d"]


def test_a_site_with_conda_activates_its_environment(sourced):
    assert sourced("conda").splitlines()[:2] == ["conda activate embeddings", "python a.py --b c d"]


def test_a_site_with_containers_runs_python_in_the_image(sourced, tmp_path):
    first = sourced("apptainer").splitlines()[0]
    image, folders = "/project/abc/embeddings.sif", f"{tmp_path}/repository,/scratch/me"
    assert first == f"apptainer exec --nv {image} python a.py --b c d; binds {folders}"


def test_submit_and_status_need_only_the_packages_that_the_login_node_gets(tmp_path):
    page = (ROOT / "docs" / "slurm.md").read_text()
    named = set(re.search(r"pip install (huggingface_hub isal[\w ]*?) +#", page)[1].split())
    required = {re.split("[>=]", line)[0].lower() for line in PROJECT["dependencies"]}
    assert named < required
    lines = [line for name in named for line in importlib.metadata.requires(name) or [] if "extra ==" not in line]
    brought = {re.split(r"[^\w-]", line)[0].lower() for line in lines}
    modules = {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if (required - brought) & {package.lower() for package in packages} and not named & set(packages)
    }
    assert {"torch", "PIL", "sklearn"} <= modules
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
from common import config
from slurm import chain, status, submit
settings = ["paths.root={tmp_path}"]
for step in chain.steps_of(config.load(None, settings)):  # as if all that it needs were done
    step.stage.outputs_of(config.load(None, settings))
sys.exit(submit.main(["--dry-run", "--set", *settings]))
"""
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "0001.tar").touch()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
