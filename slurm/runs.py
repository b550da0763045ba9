"""Runs that were submitted: their records, logs/runs/<time>/run.json, and what Slurm's queue says of their jobs.

A record holds every step of the run from the start, with its job's id as soon as there is one, so that a submit
that dies half-way can be continued or cancelled; and whose jobs they are, since others may share the folder. Slurm
forgets a job minutes after its end, and accounting is not everywhere: what became of it then is told by its log
and its files (see status.py).
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import files
from common.errors import PipelineError

ROOT = Path(__file__).resolve().parents[1]
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
WITHOUT_CLUSTER = "run this on a login node,\nor run the chain here with slurm/submit.py --local"
LOG_WIDTH = 4096  # characters of a path, as squeue is asked for it


@dataclass(frozen=True)
class SlurmJob:
    """A job, or a task of an array, as squeue tells of it."""

    id: str  # "12", or "12_3" for task 3 of an array
    name: str
    state: str  # such as "PENDING"
    reason: str  # why it waits, or why it ended

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED


def environment() -> dict[str, str]:
    """The environment for Slurm's clients: without what describes the job that this runs in, if it runs in one.

    sbatch hands the variables of an interactive job on to the jobs that it makes, where srun takes them for its
    options: another job's number of tasks, its memory per core, the number of its array's task.
    """
    inside_a_job = "SLURM_JOB_ID" in os.environ
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not (inside_a_job and name.startswith(("SLURM_", "SRUN_", "SLURMD_")))
    }


def ask(*command: str, show_warnings: bool = False) -> str:
    """What a client of Slurm answers. Raises PipelineError if it does not."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env=environment())
    except FileNotFoundError:
        raise PipelineError(f"there is no {command[0]} here: {WITHOUT_CLUSTER}") from None
    if answer.returncode:
        told = answer.stderr.strip() or answer.stdout.strip()
        if "configuration source" in told:  # Slurm's programs are installed, but belong to no cluster
            raise PipelineError(f"{command[0]} finds no cluster: {WITHOUT_CLUSTER}")
        raise PipelineError(f"{command[0]} says: {told}")
    if show_warnings:
        sys.stderr.write(answer.stderr)
    return answer.stdout


def queue(owner: int) -> dict[str, SlurmJob]:
    """Job id -> job, of all jobs of a user (by number) that Slurm still knows, a task of an array each."""
    flags = [f"--user={owner}", "--array", "--noheader", "--states=all", "--format=%i|%j|%T|%r"]
    lines = ask("squeue", *flags).splitlines()
    return {job.id: job for job in (SlurmJob(*line.strip().split("|", 3)) for line in lines)}


def live_steps(record: dict, jobs: dict[str, SlurmJob]) -> dict[str, str]:
    """Step -> job id, of a run's steps that wait or run. By name, too: a cluster may begin its ids anew."""
    live = {(job.id.partition("_")[0], job.name) for job in jobs.values() if job.is_live}
    return {name: job for name, job in job_ids(record).items() if (job, name) in live}


@contextlib.contextmanager
def lock(logs_dir: Path) -> Iterator[None]:
    """Only one submit at a time: two would find the same things missing, and both submit them. (Where the file
    system has no locks nothing holds them apart.)"""
    logs_dir.mkdir(parents=True, exist_ok=True)
    with open(logs_dir / ".submit.lock", "ab") as file:
        try:
            files.lock(file, wait=False)
        except BlockingIOError:
            raise PipelineError(
                f"another slurm/submit.py is at work in {logs_dir / 'runs'}: wait until it has ended"
            ) from None
        yield


def create(logs_dir: Path) -> Path:
    """A new run's folder. It must be there before its jobs start, or they fail without a log."""
    while True:
        folder = logs_dir / "runs" / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another submit in this second
            time.sleep(0.2)


def save(folder: Path, record: dict) -> None:
    files.write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def load(folder: Path) -> dict:
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{folder / 'run.json'} cannot be read: {error}") from None


def find(logs_dir: Path, name: str | None) -> Path:
    """The folder of a run, by its name or path; the newest one without a name. Raises PipelineError."""
    known = folders(logs_dir)
    if name is None:
        if not known:
            raise PipelineError(f"{logs_dir / 'runs'} holds no run: submit one with slurm/submit.py")
        return known[-1]
    for folder in (logs_dir / "runs" / name, Path(name)):
        if (folder / "run.json").exists():
            return folder.resolve()
    newest = f"; the newest is {known[-1].name}" if known else ""
    raise PipelineError(f"there is no run {name} in {logs_dir / 'runs'}{newest}")


def handle(folder: Path, record: dict) -> str:
    """What names a run on the command line: its path where the logs may lie elsewhere than by config.toml."""
    return str(folder) if record["config"] or record["set"] else folder.name


def folders(logs_dir: Path) -> list[Path]:
    """All runs, the oldest first."""
    return sorted(path.parent for path in logs_dir.glob("runs/*/run.json"))


def job_ids(record: dict) -> dict[str, str]:
    """Step -> job id, of what was submitted."""
    return {name: entry["job"] for name, entry in record["steps"].items() if entry["job"]}


def adopt(folder: Path, record: dict) -> None:
    """Enter jobs of this run that are in the queue but not in its record: submit died between the two.

    They are known by their names and by the folder of their logs, whose names Slurm may write out or not.
    """
    flags = [f"--user={record['owner']}", "--noheader", f"--Format=ArrayJobID:20,Name:40,STDOUT:{LOG_WIDTH}"]
    for line in ask("squeue", *flags).splitlines():
        job, name, log = line[:20].strip(), line[20:60].strip(), Path(line[60:].strip())
        entry = record["steps"].get(name)
        if entry and not entry["job"] and log.parent == Path(entry["log"]).parent:
            entry["job"] = job
    save(folder, record)


def refuse_busy(logs_dir: Path, reads: set[str], writes: set[str], but: Path | None = None) -> None:
    """Raise PipelineError if a job of another run than `but`, waiting or running, is in the way of these folders:
    if it writes one of them, or reads one that is to be written."""
    queues: dict[int, dict[str, SlurmJob]] = {}
    for folder in folders(logs_dir):
        if but is not None and folder.resolve() == but.resolve():
            continue
        record = load(folder)
        owner = record["owner"]
        queues[owner] = queues[owner] if owner in queues else queue(owner)
        live = {name: record["steps"][name] for name in live_steps(record, queues[owner])}
        busy = [
            name
            for name, entry in live.items()
            if entry["target"] in reads | writes or writes.intersection(entry["reads"])
        ]
        if busy:
            halted = len(job_ids(record)) < len(record["steps"])
            run = handle(folder, record)
            advice = f"submit the rest of it with --continue {run}, or" if halted else "wait for it, or"
            raise PipelineError(
                f"run {folder.name} is still at it: {', '.join(busy)} in the queue\n"
                f"{advice} end it with slurm/submit.py --cancel {run}"
            )


def cancel(folder: Path) -> int:
    """Cancel what is left of a run in the queue; how many jobs that were."""
    record = load(folder)
    adopt(folder, record)
    live = live_steps(record, queue(record["owner"]))
    if live:
        ask("scancel", *live.values())
    return len(live)


def max_array_size() -> int:
    """The cluster's MaxArraySize: the largest index of an array is one less."""
    for line in ask("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize":
            return int(value)
    raise PipelineError("scontrol show config names no MaxArraySize")


def command_line(program: Path, arguments: list[str]) -> list[str]:
    """The words that start `program` from here, by the shortest path to it."""
    here = Path(os.path.relpath(program))
    return ["python", str(program if here.parts[0] == ".." else here), *arguments]
