"""A place for the chain on a real Slurm: a cluster, a finished run to compare with, and the commands of a user."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import ROOT
from local_backbone import write_local_backbone
from one_node_slurm import OneNodeSlurm
from synthetic import write_dataset

from common import config, sections

PATIENCE_S = 240  # for what should take seconds on an idle machine
SETTINGS = [
    "embedding_model.pooling=mean",
    "data.rows_per_part=20",
    "data.split_cell_m=300",
    "data.train_ratio=0.5",
    "data.val_ratio=0.25",
    "data.test_ratio=0.25",
    "data.neighbors=40",
    "training_model.output_dim=64",
    "training_model.hidden_dim=64",
    "training.epochs=12",
    "training.patience=12",
    "training.steps_per_epoch=5",
    "training.batch_size=64",
    "training.warmup_steps=2",
    "tuning.num_trials=4",
    "tuning.trial_epochs=2",
    "evaluation.bootstrap_samples=100",
    "infrastructure.embedding_batch_size=16",
    "infrastructure.workers=1",
    "slurm.num_shards=2",  # three tars: the first shard takes two
    "slurm.difficulty_shards=2",
    "slurm.signal_before_s=60",  # Slurm sends it up to 30 s earlier; a busy machine needs some to end
]
GPU_STAGES = ("generate_embeddings", "compute_visual_neighbors", "optuna_worker", "fetch_best_and_train", "train")
over = threading.Event()  # the tests are at their end: nobody needs to wait any more


def wait_for(condition, what: str, every_s: float = 0.05):
    """The first true value of `condition()`, which is asked again after `every_s` seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert not over.is_set(), f"no {what} until the end"
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s"
        time.sleep(every_s)
    return value


class Place:
    """A cluster, a finished run of the chain to compare with, and the commands of a user."""

    def __init__(self, folder: Path, cluster: OneNodeSlurm):
        self.folder, self.cluster = folder, cluster
        self.whole = self.limited = Path()  # roots of what is under way
        self.frozen: list[threading.Thread] = []
        self.environment = dict(cluster.environment)
        # the Python of the tests is the jobs', also where it is not in .venv
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), self.environment["PATH"]])
        write_dataset(folder / "raw", streets=12, cities=3, image_px=112, facades_per_street=5)
        write_local_backbone(folder / "backbone")
        names = [name for name, value in config.load().slurm if isinstance(value, sections.SlurmStage)]
        stages = [f'slurm.{name}.sbatch=["--mem=1G"]' for name in names]
        stages += [f'slurm.{stage}.sbatch=["--mem=1G", "--gres=gpu:1"]' for stage in GPU_STAGES]
        paths = [f"paths.root={folder / 'local'}", f"paths.raw_dir={folder / 'raw'}"]
        cfg = config.load(None, [*SETTINGS, *stages, *paths, f"embedding_model.name={folder / 'backbone'}"])
        self.config = folder / "config.toml"
        self.local = folder / "local"
        self.config.write_text(config.to_toml(cfg).replace(f"{self.local}/", ""))  # relative to paths.root

    def run(self, *command, code: int = 0, **options) -> str:
        """Run a command, which must end with `code`; what it printed."""
        command = [str(word) for word in command]
        options = {"cwd": self.folder, "env": self.environment, **options}
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=PATIENCE_S, **options,
        )  # fmt: skip
        assert result.returncode == code, f"{shlex.join(command)}\n{result.stdout}"
        assert "Traceback" not in result.stdout, result.stdout
        return result.stdout

    def submit(self, root: Path, *arguments, **options) -> str:
        flags = ["--config", self.config, "--set", f"paths.root={root}"]
        return self.run(sys.executable, ROOT / "slurm" / "submit.py", *flags, *arguments, **options)

    def status(self, root: Path, *arguments, **options) -> str:
        flags = ["--config", self.config, "--set", f"paths.root={root}"]
        return self.run(sys.executable, ROOT / "slurm" / "status.py", *flags, *arguments, **options)

    def told(self, root: Path, code: int = 0) -> dict:
        """The status of the newest run as a dict, and its steps by name."""
        report = json.loads(self.status(root, "--json", code=code))
        return {**report, "steps": {step["name"]: step for step in report["steps"]}}

    def wait(self, root: Path) -> None:
        """Until nothing of the runs of this root is in the queue."""
        ids = {job for run in (root / "logs" / "runs").iterdir() for job in self.jobs(root, run).values()}
        self.wait_for_jobs(*ids)

    def wait_for_jobs(self, *ids: str) -> None:
        wait_for(lambda: not self.live() & set(ids), f"end of {ids}", every_s=0.5)  # squeue takes the jobs' time

    def live(self) -> set[str]:
        return set(self.cluster.ask("squeue", "--noheader", "--format=%F").split())

    def jobs(self, root: Path, run: Path | None = None) -> dict[str, str]:
        """Step -> job id, of a run, or of the newest."""
        run = run or max((root / "logs" / "runs").iterdir())
        return {name: entry["job"] for name, entry in json.loads((run / "run.json").read_text())["steps"].items()}

    def copy(self, name: str, *without: str) -> Path:
        """A copy of the finished run, without the files that match."""
        root = self.folder / name
        shutil.copytree(self.local, root)
        for pattern in without:
            for path in list(root.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return root

    def python_of(self, script: str, root: Path) -> list[int]:
        """The Python processes of a stage's tasks."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdecimal() else []
                if (
                    len(words) > 2
                    and "python" in words[0]
                    and words[1].endswith(script)
                    and any(word.startswith(f"{root}/") for word in words)  # the run's config.toml
                ):
                    found.append(int(entry.name))
        return found
