"""The state of each task of a run, from its job in Slurm's queue, its log and its files."""

import functools
import math
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

from common import cli

TAIL_BYTES = 16_384
HELD_STATES = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
NOT_STARTED = ("PENDING", "REQUEUED", "REQUEUE_FED", *HELD_STATES)
BUSY = {
    "SUSPENDED": "suspended",
    "STOPPED": "suspended",
    "CONFIGURING": "its node is booting",
    "COMPLETING": "is ending",
}
WAITS = {
    "None": "",  # not considered yet
    "Resources": "for free resources",
    "Priority": "for the jobs before it",
    "JobArrayTaskLimit": "for other tasks of its array (throttle)",
    "BeginTime": "requeued, starts shortly",
}
FOREVER = {
    "PartitionTimeLimit": "its time limit exceeds the partition's",
    "PartitionNodeLimit": "it needs more nodes than the partition has",
    "BadConstraints": "no node satisfies its constraints",
    **dict.fromkeys(("InvalidAccount", "AccountNotAllowed"), "its account may not run jobs there"),
    **dict.fromkeys(("InvalidQOS", "QOSNotAllowed"), "its QOS may not be used there"),
}
LIMIT_OF_ONE_JOB = re.compile(r"^(QOS|Assoc)(Min\w+|Max\w+PerJob(Limit)?)$")  # a limit on all together passes
ENDS = {
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "deadline reached",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "TIMEOUT": "time limit",
}
HELD = re.compile("JobHeld|JobHold|held")  # JobHeldUser, JobHoldMaxRequeue, launch failed requeued held, ...
# what slurmstepd writes to a log, for jobs that Slurm has forgotten
OUT_OF_MEMORY = re.compile("oom.kill", re.IGNORECASE)
KILLED = re.compile(r"CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")
REFUSED = re.compile(r"^-- \d+ job \S+ (?:cannot be queued again \((.*)\)|was queued again)", re.MULTILINE)


class Log(NamedTuple):
    """The log of a task, from its last start on."""

    path: Path
    first_start_s: float | None = None  # Unix time of the first start; None: not started
    exit_code: int | None = None  # None: still running, or killed
    killed: str = ""  # the reason that slurmstepd gives, in lower case
    refusal: str = ""  # why it could not be queued again
    lines: tuple[str, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether it says that the job has ended, and will not start again."""
        if self.refusal or self.killed in ("cancelled", "time limit"):
            return True
        return self.exit_code not in (None, cli.EXIT_STOPPED, 128 + signal.SIGTERM)


class JobTask(NamedTuple):
    """One task of a step, and the job that runs it, maybe with others."""

    number: int
    job: str
    state: str  # one of status.STATES
    why: str
    log: Log


def read_log(path: Path) -> Log:
    """Read a log; of a long one the beginning and the end."""
    try:
        with path.open("rb") as file:
            head = file.read(TAIL_BYTES).decode(errors="replace")
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return Log(path)
    started = re.search(r"^-- (\d+) job \S+ starts on", head, re.MULTILINE)
    last = re.split(r"^-- \d+ job \S+ starts on .*\n", tail, flags=re.MULTILINE)[-1]
    ended = re.search(r"^-- \d+ job \S+ ends with exit code (\d+)", last, re.MULTILINE)
    killed = KILLED.search(last)
    refused = REFUSED.search(last)
    lines = [line for line in last.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("-- ")]
    return Log(
        path,
        float(started[1]) if started else None,
        int(ended[1]) if ended else None,
        (killed[1] or "cancelled").lower() if killed else "",
        (refused[1] or "slurm.max_requeues") if refused else "",
        tuple(lines),
    )


def fate(step, number: int, job, log: Log, cfg) -> tuple[str, str]:
    """State and reason of a submitted task. `job`: its entry in the queue, or None."""
    if job and job.is_live:
        if job.state not in NOT_STARTED:
            return "running", BUSY.get(job.state, "")
        if HELD.search(job.reason) or job.state in HELD_STATES:
            return "waiting", f"held ({job.reason}): scontrol release {job.id.partition('_')[0]}"
        if job.reason in FOREVER or LIMIT_OF_ONE_JOB.match(job.reason):
            return "stuck", f"forever: {FOREVER.get(job.reason, f'a limit on single jobs ({job.reason})')}"
        if job.reason == "BeginTime" and log.first_start_s is None:
            return "waiting", "for its start time (--begin)"
        return "waiting", WAITS.get(job.reason, job.reason)
    if step.is_done(cfg, number) or (log.exit_code == 0 and step.stage.existing):  # an Optuna worker
        if log.exit_code and not made_after(log, step, number, cfg):
            return "failed", f"exit code {log.exit_code}, although its files are complete"
        return "done", ""
    if log.exit_code == 0 and step.stage.outputs_of(cfg, number, step.tasks) is None:
        return "done", "its inputs have been removed or changed since"
    if log.refusal:  # it may have reached its time limit afterwards
        return "failed", f"stopped with everything saved, and could not be requeued: {log.refusal}"
    if job and job.state in ENDS:
        return "failed", remedy(ENDS[job.state], step)
    if log.first_start_s is None:
        if job and job.state == "FAILED":
            return "failed", f"before it could write its log ({job.reason}): can compute nodes see the folder?"
        failed_before = job and job.reason == "DependencyNeverSatisfied"
        return "cancelled", "a step that it needs failed" if failed_before else "before it started"
    if any(OUT_OF_MEMORY.search(line) for line in log.lines):
        return "failed", remedy("out of memory", step)
    if log.killed == "job requeue":
        return "cancelled", "before it restarted"
    if log.killed == "cancelled" or (job and job.state == "CANCELLED"):
        return "cancelled", "while running"
    if log.killed:
        return "failed", remedy(log.killed, step)
    ends = {
        None: "killed",
        0: "it succeeded, but its files are missing or have other settings",
        cli.EXIT_STOPPED: "stopped with everything saved, and not requeued (slurm.max_requeues)",
    }
    return "failed", ends.get(log.exit_code, f"exit code {log.exit_code}")


def made_after(log: Log, step, number: int, cfg) -> bool:
    """Whether some file of a finished task is newer than its log, so made by a later run."""
    outputs = step.stage.outputs_of(cfg, number, step.tasks) or ()
    newest = max((output.path.stat().st_mtime for output in outputs), default=math.inf)
    return newest > log.path.stat().st_mtime


def remedy(end: str, step) -> str:
    """Why a job ended, and the setting that raises that limit."""
    settings = {"time limit": "time", "out of memory": "sbatch (--mem)"}
    return f"{end}: raise slurm.{step.resources}.{settings[end]}" if end in settings else end


def of_place(log: Log, place: int) -> Log:
    """The log of one task of a job in which each line begins with its task's place: without the others' lines, and
    with its own exit code."""
    labelled = [(re.match(r" *(\d+): ", line), line) for line in log.lines]
    own = [line[m.end() if m else 0 :] for m, line in labelled if m is None or int(m[1]) == place]
    codes = [int(m[1]) for line in own if (m := re.fullmatch(r"-- task ends with exit code (\d+)", line))]
    lines = tuple(line for line in own if not line.startswith("-- "))
    return log._replace(lines=lines, exit_code=codes[-1] if codes else None)


def tasks_per_job(entry: dict) -> int:
    """How many tasks of a step of the record one job runs; 1 in records of older versions."""
    return entry.get("tasks_per_job", 1)


def log_of_job(entry: dict, index: int) -> Path:
    return Path(entry["log"].replace("%a", str(index)))


def tasks_of(step, entry: dict, jobs: dict | None, cfg) -> list[JobTask]:
    """The tasks of a step of the record. `jobs`: see `runs.queue`."""
    tasks, per_job = [], tasks_per_job(entry)
    logs = functools.cache(read_log)
    for number in entry["tasks"]:
        index, place = divmod(number, per_job)
        log = logs(log_of_job(entry, index))
        if not entry["job"]:
            tasks.append(JobTask(number, "", "not submitted", "", log))
            continue
        job_id = f"{entry['job']}_{index}" if step.tasks > 1 else entry["job"]
        job = jobs.get(job_id) if jobs else None
        if job and job.name != step.name:  # a reinstalled cluster counts from 1 again
            job = None
        own = of_place(log, place) if per_job > 1 else log
        state, why = fate(step, number, job, own, cfg)
        if jobs is None and state != "done" and not log.has_ended:
            state, why = "unknown", "its owner alone may see it in the queue (PrivateData)"
        tasks.append(JobTask(number, job_id, state, why, own))
    return tasks


def progress_of(step, tasks: list[JobTask], cfg) -> dict:
    """Progress of a step: done, total, unit; and per_hour and seconds_left once it has finished something."""
    stage = step.stage
    if stage.progress:
        done, total, unit = stage.progress(cfg)
        return {"done": done, "total": total, "unit": unit}
    by_task = [stage.outputs_of(cfg, number, step.tasks) for number in range(step.tasks)]
    outputs = [output for outputs in by_task for output in outputs or ()]
    finished = [output.path for output in outputs if stage.is_current(output)]
    total = None if None in by_task else len(outputs)
    progress = {"done": len(finished), "total": total, "unit": "files"}
    starts = [task.log.first_start_s for task in tasks if task.log.first_start_s]
    if total is not None and starts and any(task.state == "running" for task in tasks):
        began = min(starts)
        per_s = sum(path.stat().st_mtime >= began for path in finished) / max(time.time() - began, 1)
        if per_s:
            progress |= {"per_hour": 3600 * per_s, "seconds_left": (total - len(finished)) / per_s}
    return progress
