"""Submitted runs: their records, logs/runs/<time>/run.json, and the state of their jobs in Slurm's queue.

A record lists every step from the start and gets each job's id as soon as it is submitted, so that an interrupted
submission can be continued or cancelled; it names the owner, since several users may share the folder.
"""

import contextlib
import functools
import json
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from common import files
from common.errors import PipelineError
from slurm import fates

ROOT = Path(__file__).resolve().parents[1]
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
OPTIONS = ("SBATCH_", "SCANCEL_", "SINFO_", "SQUEUE_")  # of Slurm's clients: prefixes of variables
KEPT = ["SLURM_CONF", "SLURM_CLUSTERS"]
KEPT += [f"SBATCH_{name}" for name in "ACCOUNT CONSTRAINT EXPORT PARTITION QOS RESERVATION WCKEY".split()]
HIDDEN = "this cluster hides the jobs of {} (PrivateData)"
MOVE = "if none of its jobs is left in the queue, move that folder away"
_OF_RUN = {"owner", "config", "set", "tune", "continue_with", "done_before", "steps"}  # see jobs.submit
_OF_STEP = {"job", "tasks", "reads", "target", "log"}
WITHOUT_CLUSTER = "run this on a login node,\nor run the chain here with slurm/submit.py --local"


class SlurmJob(NamedTuple):
    """A job, or a task of an array, as squeue lists it."""

    id: str  # "12", or "12_3" for task 3 of an array
    name: str
    state: str  # such as "PENDING"
    reason: str  # why it is waiting, or why it ended

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED


def environment() -> dict[str, str]:
    """The environment for Slurm's clients: without the variables of the job that this process may itself run in,
    and without a profile's options, but for those that say where and on whose account jobs run.

    sbatch passes those of an interactive job on to new jobs, where srun takes them as options: another job's
    number of tasks, memory per core or array index. With SQUEUE_PARTITION, squeue would hide jobs; SBATCH_WAIT or
    SBATCH_ARRAY_INX would change what a submission is. Resources are those of [slurm].
    """
    hidden = OPTIONS if "SLURM_JOB_ID" not in os.environ else (*OPTIONS, "SLURM_", "SRUN_", "SLURMD_")
    return {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(hidden)}


def ask(*command: str, show_warnings: bool = False) -> str:
    """The output of one of Slurm's clients. Raises PipelineError if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment())
    except FileNotFoundError:
        raise PipelineError(f"there is no {command[0]} here: {WITHOUT_CLUSTER}") from None
    if result.returncode:
        message = result.stderr.strip() or result.stdout.strip()
        if "configuration source" in message:  # Slurm is installed, but not part of a cluster
            raise PipelineError(f"{command[0]} finds no cluster: {WITHOUT_CLUSTER}")
        raise PipelineError(f"{command[0]} failed: {message}")
    if show_warnings:
        sys.stderr.write(result.stderr)
    return result.stdout


def queue(owner: int) -> dict[str, SlurmJob] | None:
    """Job id -> job, of all jobs and array tasks of a user (by uid) that Slurm still knows; None if this user may
    not see them."""
    flags = [f"--user={owner}", "--array", "--noheader", "--states=all", "--format=%i|%j|%T|%r"]
    lines = ask("squeue", *flags).splitlines()
    if not lines and owner != os.getuid() and re.search(r"^PrivateData\s*=.*\bjobs\b", settings(), re.MULTILINE):
        return None
    return {job.id: job for job in (SlurmJob(*line.strip().split("|", 3)) for line in lines)}


def settings() -> str:
    """The cluster's settings, a line each."""
    return ask("scontrol", "show", "config")


def live_steps(record: dict, jobs: dict[str, SlurmJob] | None) -> dict[str, str]:
    """Step -> job id, of a run's live steps. Names must match, too: a cluster may restart its ids.

    Where the jobs cannot be seen (None), those are live whose logs do not all say that they have ended.
    """
    if jobs is None:
        return {
            name: job
            for name, job in job_ids(record).items()
            if not all(fates.read_log(path).has_ended for path in logs_of(record["steps"][name]))
        }
    live = {(job.id.partition("_")[0], job.name) for job in jobs.values() if job.is_live}
    return {name: job for name, job in job_ids(record).items() if (job, name) in live}


def logs_of(entry: dict) -> list[Path]:
    """The logs of a step's jobs, each of which runs one or more of its tasks."""
    indices = sorted({number // fates.tasks_per_job(entry) for number in entry["tasks"]})
    return [fates.log_of_job(entry, index) for index in indices]


def name_of(owner: int) -> str:
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"


@contextlib.contextmanager
def lock(logs_dir: Path) -> Iterator[None]:
    """Allow one submission at a time: two would find the same work missing, and both submit it. (A file system
    without locks cannot prevent that.)"""
    logs_dir.mkdir(parents=True, exist_ok=True)
    with files.open_shared(logs_dir / ".submit.lock") as file:
        try:
            files.lock(file, wait=False)
        except BlockingIOError:
            raise PipelineError(
                f"another slurm/submit.py is running in {logs_dir / 'runs'}: wait until it has finished"
            ) from None
        yield


def create(logs_dir: Path) -> Path:
    """A new run's folder. It must exist before its jobs start, or they fail without a log."""
    while True:
        folder = logs_dir / "runs" / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another submission in this second
            time.sleep(0.2)


def save(folder: Path, record: dict) -> None:
    files.write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def load(folder: Path) -> dict:
    """The record of a run. Raises PipelineError if it cannot be read, or is of another version."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{folder / 'run.json'} cannot be read: {error}\n{MOVE}") from None
    steps = record.get("steps") if isinstance(record, dict) and record.keys() >= _OF_RUN else None
    if not isinstance(steps, dict) or not all(
        isinstance(s, dict) and s.keys() >= _OF_STEP for s in steps.values()
    ):
        raise PipelineError(f"{folder / 'run.json'} is not the record of a run of this version\n{MOVE}")
    return record


def find(logs_dir: Path, name: str | None) -> Path:
    """The folder of a run, by its name or path; the newest one without a name. Raises PipelineError."""
    runs = folders(logs_dir)
    if name is None:
        if not runs:
            raise PipelineError(f"there are no runs in {logs_dir / 'runs'}: submit one with slurm/submit.py")
        return runs[-1]
    for folder in (logs_dir / "runs" / name, Path(name)):
        if (folder / "run.json").exists():
            return folder.resolve()
    newest = f"; the newest is {runs[-1].name}" if runs else ""
    raise PipelineError(f"there is no run {name} in {logs_dir / 'runs'}{newest}")


def handle(folder: Path, record: dict) -> str:
    """What names a run on the command line: its path if config.toml alone may not lead to its logs."""
    return str(folder) if record["config"] or record["set"] else folder.name


def folders(logs_dir: Path) -> list[Path]:
    """All runs, oldest first."""
    return sorted(path.parent for path in logs_dir.glob("runs/*/run.json"))


def job_ids(record: dict) -> dict[str, str]:
    """Step -> job id, of the submitted steps."""
    return {name: entry["job"] for name, entry in record["steps"].items() if entry["job"]}


def adopt(folder: Path, record: dict) -> None:
    """Record jobs of this run that are queued but not in its record, because the submission died in between.

    They are recognised by their names and by the folder of their logs, in whose names Slurm may expand %a or not.
    """
    if record["owner"] != os.getuid() and queue(record["owner"]) is None:
        raise PipelineError(
            f"{HIDDEN.format(name_of(record['owner']))}: only they can continue or cancel this run"
        )
    flags = [f"--user={record['owner']}", "--noheader", "--Format=ArrayJobID:20,Name:40,STDOUT:4096"]
    for line in ask("squeue", *flags).splitlines():
        job, name, log = line[:20].strip(), line[20:60].strip(), Path(line[60:].strip())
        entry = record["steps"].get(name)
        if entry and not entry["job"] and log.parent == Path(entry["log"]).parent:
            entry["job"] = job
    save(folder, record)


def refuse_busy(logs_dir: Path, entries: Collection[dict], but: Path | None = None) -> None:
    """Raise PipelineError if a live job of another run than `but` writes a folder that these steps read or write,
    or reads one that they write."""
    writes = {entry["target"] for entry in entries}
    touches = writes.union(*(entry["reads"] for entry in entries))
    queue_of = functools.cache(queue)
    for folder in folders(logs_dir):
        if but and folder.samefile(but):
            continue
        record = load(folder)
        jobs = queue_of(record["owner"])
        live = {name: record["steps"][name] for name in live_steps(record, jobs)}
        busy = [n for n, entry in live.items() if entry["target"] in touches or writes & set(entry["reads"])]
        if busy and jobs is None:
            hidden = HIDDEN.format(name_of(record["owner"]))
            raise PipelineError(
                f"run {folder.name} may still be running: {', '.join(busy)}. {hidden}\n"
                f"ask that user to run slurm/status.py {folder}\n"
                "if nothing of it is left in the queue, move that folder"
            )
        if busy:
            halted = len(job_ids(record)) < len(record["steps"])
            run = handle(folder, record)
            advice = f"submit the rest of it with --continue {run}, or" if halted else "wait for it, or"
            raise PipelineError(
                f"run {folder.name} is still running: {', '.join(busy)} in the queue\n"
                f"{advice} end it with slurm/submit.py --cancel {run}"
            )


def cancel(folder: Path) -> int:
    """Cancel a run's jobs that are still in the queue; returns how many."""
    record = load(folder)
    adopt(folder, record)
    live = live_steps(record, queue(record["owner"]))
    if live:
        ask("scancel", *live.values())
    return len(live)


def max_array_size() -> int:
    """The cluster's MaxArraySize, one more than the largest array index."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", settings(), re.MULTILINE)
    if match is None:
        raise PipelineError("scontrol show config does not list MaxArraySize")
    return int(match[1])
