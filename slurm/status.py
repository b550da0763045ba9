"""How a submitted run goes: what is done, runs, waits and why, has failed and why, and what continues it.

Three sources: the record of the run (its jobs), the queue of Slurm (what lives), the artefacts (what is done).
Slurm forgets a job minutes after its end; then its log tells what became of it. Exit code 1: something has failed,
or was cancelled, or was never submitted.

Reads    logs/runs/<time>/{run.json,config.toml,*.log}, squeue, the artefacts' records
Command  python slurm/status.py [RUN] [--watch] [--json]       RUN: the newest in logs/runs

--json: run, folder; steps, in the order of the chain, each with name, job, state ("failed", "running", "waiting",
"not submitted", "cancelled" or "done"), why, tasks (state -> how many) and progress (done, total, unit; per_hour,
seconds_left while it runs); failures, each with step, task, job, why, log and last_lines; live: something waits or
runs; failed: something has failed, was cancelled or was not submitted; continue, continue_submission and cancel:
command lines.
"""

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import PipelineError

WATCH_EVERY_S = 10
SHOWN_FAILURES, SHOWN_LINES = 3, 12
TAIL_BYTES = 16_384
STATES = ("failed", "running", "waiting", "not submitted", "cancelled", "done")  # a step is what is first of these
UNFINISHED = ("failed", "cancelled", "not submitted")
HELD_STATES = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
NOT_STARTED = ("PENDING", "REQUEUED", "REQUEUE_FED", *HELD_STATES)
BUSY = {
    "SUSPENDED": "suspended",
    "STOPPED": "suspended",
    "CONFIGURING": "its node boots",
    "COMPLETING": "is ending",
}
WAITS = {
    "None": "",  # nobody has looked at it yet
    "Resources": "for free resources",
    "Priority": "for the jobs before it",
    "JobArrayTaskLimit": "for others of its array (throttle)",
    "BeginTime": "was queued again, starts shortly",
    "PartitionTimeLimit": "for ever: its time is more than the partition's",
    "PartitionNodeLimit": "for ever: it wants more than the partition has",
    "BadConstraints": "for ever: no node is as it wants it",
}
ENDS = {
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "TIMEOUT": "time limit",
}
STOPPED = "stopped with all saved, and not queued again (slurm.max_requeues)"
HELD = re.compile("JobHeld|JobHold|held")  # JobHeldUser, JobHoldMaxRequeue, launch failed requeued held, ...
OUT_OF_MEMORY = re.compile(
    "oom.kill", re.IGNORECASE
)  # slurmstepd's word in a log, where Slurm has forgotten the job
KILLED = re.compile(r"CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")  # slurmstepd's word in a log


@dataclass(frozen=True)
class Log:
    """What the log of a task says, from its last start on."""

    path: Path
    first_start_s: float | None = None  # seconds since 1970, of the first start; None: it has not started
    exit_code: int | None = None  # None: it has not ended, or was killed
    killed: str = ""  # what slurmstepd says of that, in lower case
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array."""

    number: int
    job: str
    state: str  # one of STATES
    why: str
    log: Log


def read_log(path: Path) -> Log:
    """The beginning and the end of a log; long ones are not read whole."""
    try:
        with path.open("rb") as file:
            head = file.read(TAIL_BYTES).decode(errors="replace")
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return Log(path)
    started = re.search(r"^-- (\d+) job \S+ starts on", head, re.MULTILINE)
    last = re.split(r"^-- \d+ job \S+ starts on .*\n", tail, flags=re.MULTILINE)[-1]
    ended, killed = (
        re.search(r"^-- \d+ job \S+ ends with exit code (\d+)", last, re.MULTILINE),
        KILLED.search(last),
    )
    return Log(
        path,
        float(started[1]) if started else None,
        int(ended[1]) if ended else None,
        (killed[1] or "cancelled").lower() if killed else "",
        tuple(
            line for line in last.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("-- ")
        ),
    )


def fate(step, number: int, job, log: Log, cfg) -> tuple[str, str]:
    """State and reason of a task that was submitted. `job`: what the queue knows of it, or None."""
    from slurm import artefacts

    if job and job.is_live:
        return wait_of(job) if job.state in NOT_STARTED else ("running", BUSY.get(job.state, ""))
    is_worker = step.name == "optuna_worker"  # which leaves no file of its own
    if artefacts.is_done(step, number, cfg) or (is_worker and log.exit_code == 0):
        return "done", ""
    if job and job.state in ENDS:
        return "failed", remedy(ENDS[job.state], step)
    if log.first_start_s is None:
        if job and job.state == "FAILED":
            return "failed", f"before it could write its log ({job.reason}): do compute nodes see the folder?"
        failed_before = job and job.reason == "DependencyNeverSatisfied"
        return "cancelled", "what it needs has failed" if failed_before else "before it started"
    if any(OUT_OF_MEMORY.search(line) for line in log.lines):
        return "failed", remedy("out of memory", step)
    if log.killed:
        return ("cancelled", "while it ran") if log.killed == "cancelled" else ("failed", remedy(log.killed, step))
    if job and job.state == "CANCELLED":
        return "cancelled", "while it ran"
    if log.exit_code is None:
        return "failed", "killed"
    if log.exit_code == 0:
        return "failed", "it ended well, but its files are gone or of other settings"
    return "failed", STOPPED if log.exit_code == cli.EXIT_STOPPED else f"exit code {log.exit_code}"


def remedy(end: str, step) -> str:
    """What has ended a job, and the setting that gives it more of that."""
    settings = {"time limit": "time", "out of memory": "sbatch (--mem)"}
    return f"{end}: raise slurm.{step.resources}.{settings[end]}" if end in settings else end


def wait_of(job) -> tuple[str, str]:
    """State and reason of a job that has not started, or that is to start again."""
    if HELD.search(job.reason) or job.state in HELD_STATES:
        return "waiting", f"held ({job.reason}): scontrol release {job.id.partition('_')[0]}"
    return "waiting", WAITS.get(job.reason, job.reason)


def tasks_of(step, entry: dict, jobs: dict, cfg) -> list[Task]:
    """The tasks of a step of the record. `jobs`: see `runs.queue`."""
    tasks = []
    for number in entry["tasks"]:
        log = read_log(Path(entry["log"].replace("%a", str(number))))
        if not entry["job"]:
            tasks.append(Task(number, "", "not submitted", "", log))
            continue
        job = f"{entry['job']}_{number}" if entry["of"] > 1 else entry["job"]
        tasks.append(Task(number, job, *fate(step, number, jobs.get(job), log, cfg), log))
    return tasks


def progress_of(step, tasks: list[Task], cfg, now_s: float) -> dict:
    """How far a step is: done, total, unit, and per_hour and seconds_left where it runs and has got somewhere."""
    from slurm import artefacts

    if step.name in ("train", "optuna_worker"):
        done, total = artefacts.epochs(cfg) if step.name == "train" else artefacts.trials(cfg)
        return {"done": done, "total": total, "unit": "epochs" if step.name == "train" else "trials"}
    made = [artefacts.of_task(step, number, cfg) for number in range(step.tasks)]
    every = [artefact for files in made if files is not None for artefact in files]
    done = [artefact.path for artefact in every if artefact.is_done(cfg)]
    progress = {"done": len(done), "total": None if None in made else len(every), "unit": "files"}
    starts = [task.log.first_start_s for task in tasks if task.log.first_start_s]
    if not starts or not any(task.state == "running" for task in tasks):
        return progress
    began = min(starts)
    per_s = sum(path.stat().st_mtime >= began for path in done) / max(now_s - began, 1)
    if per_s and progress["total"]:
        progress |= {"per_hour": 3600 * per_s, "seconds_left": (progress["total"] - len(done)) / per_s}
    return progress


def report(folder: Path) -> dict:
    """All that is known of a run, as --json prints it."""
    from common import config
    from slurm import runs, submit

    record = runs.load(folder)
    jobs, cfg = runs.queue(record["owner"]), config.load(folder / "config.toml")
    steps = {step.name: step for step in submit.chain(cfg, record["tune"])}
    told: list[dict] = [
        {"name": name, "job": None, "state": "done", "why": "before this run", "tasks": {}, "progress": {}}
        for name in record["done_before"]
    ]
    failures, states = [], dict.fromkeys(record["done_before"], "done")
    for name, entry in record["steps"].items():
        step = replace(steps[name], tasks=entry["of"])
        tasks = tasks_of(step, entry, jobs, cfg)
        counts = {state: sum(task.state == state for task in tasks) for state in STATES}
        states[name] = state = next(state for state in STATES if counts[state])
        counts["done"] += entry["of"] - len(tasks)
        told.append(
            {
                "name": name,
                "job": entry["job"],
                "state": state,
                "why": why(state, tasks, [need for need in entry["needs"] if states.get(need, "done") != "done"]),
                "tasks": {state: count for state, count in counts.items() if count},
                "progress": progress_of(step, tasks, cfg, time.time()),
            }
        )
        failures += [
            {
                "step": name,
                "task": task.number if entry["of"] > 1 else None,
                "job": task.job,
                "why": task.why,
                "log": str(task.log.path),
                "last_lines": task.log.lines[-SHOWN_LINES:],
            }
            for task in tasks
            if task.state == "failed"
        ]
    order = list(steps)
    told.sort(key=lambda step: order.index(step["name"]))
    program = runs.ROOT / "slurm" / "submit.py"
    return {
        "run": folder.name,
        "folder": str(folder),
        "steps": told,
        "failures": failures,
        "live": any(step["tasks"].get(state) for step in told for state in ("running", "waiting")),
        "failed": any(step["tasks"].get(state) for step in told for state in UNFINISHED),
        "continue": shlex.join(runs.command_line(program, record["continue_with"])),
        "continue_submission": shlex.join(runs.command_line(program, ["--continue", folder.name])),
        "cancel": shlex.join(runs.command_line(program, ["--cancel", folder.name])),
    }


def why(state: str, tasks: list[Task], unfinished: list[str]) -> str:
    """Why a step is in its state: of its first task in it; what the latest line of its log says, while it runs."""
    first = next(task for task in tasks if task.state == state)
    if state == "waiting" and first.why == "Dependency":
        return f"for {', '.join(unfinished)}"
    if state == "running" and len(tasks) == 1 and not first.why:
        return first.log.lines[-1] if first.log.lines else ""
    return first.why


def row_of(step: dict) -> tuple[str, ...]:
    """A line of the table; what matters least stands last, where a narrow terminal cuts it off."""
    counts, progress = step["tasks"], step["progress"]
    total = sum(counts.values())
    tasks, notes = "", [step["why"]]
    if total > 1:
        tasks = f"{counts.get('done', 0)} of {total}"
        told = [f"{counts[state]} {state}" for state in ("failed", "running", "waiting") if state in counts]
        notes = [", ".join(told) if len(told) > 1 or step["state"] == "running" else "", step["why"]]
    files = ""
    if progress:
        of = f" of {progress['total']:,}" if progress["total"] is not None else ""
        files = f"{progress['done']:,}{of} {progress['unit']}"
    left = cli.duration(progress["seconds_left"]) if "seconds_left" in progress else ""
    rate = f"{progress['per_hour']:,.0f}/h" if "per_hour" in progress else ""
    return step["name"], step["state"], tasks, files, left, rate, "; ".join(filter(None, notes))


def as_text(run: dict, width: int | None = None) -> str:
    """The report as a person reads it; lines of the table are cut off at `width` characters."""
    rows = [("stage", "state", "tasks", "progress", "left", "rate", ""), *map(row_of, run["steps"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()[:width]
        for row in rows
    ]
    done = sum(step["state"] == "done" for step in run["steps"])
    lines = [f"run {run['run']}: {done} of {len(run['steps'])} stages done", run["folder"], *lines]
    for failure in run["failures"][:SHOWN_FAILURES]:
        shard = f", shard {failure['task']}" if failure["task"] is not None else ""
        lines += ["", f"{failure['step']}{shard} (job {failure['job']}) failed: {failure['why']}"]
        lines += [*(f"  | {line}" for line in failure["last_lines"]), f"  log: {failure['log']}"]
    if len(run["failures"]) > SHOWN_FAILURES:
        lines += ["", f"and {len(run['failures']) - SHOWN_FAILURES} more tasks have failed: see --json"]
    return "\n".join([*lines, *advice(run)])


def advice(run: dict) -> list[str]:
    """What to do now, as command lines; nothing where all goes well."""
    if not run["failed"]:
        return []
    halted = any(step["tasks"].get("not submitted") for step in run["steps"])
    if halted and not run["failures"]:
        return ["", f"the submission broke off; submit the rest:  {run['continue_submission']}"]
    if run["live"]:
        wait = f"when what still runs has ended, or after  {run['cancel']}"
        return ["", wait, f"continue with:  {run['continue']}"]
    return ["", f"when that is mended, continue with:  {run['continue']}"]


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("run", nargs="?", metavar="RUN", help="its name or folder (the newest)")
    arguments.add_argument("--watch", action="store_true", help="again and again, until nothing is in the queue")
    arguments.add_argument("--json", action="store_true", help="for programs; with --watch a line each time")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from slurm import runs

    folder = runs.find(cfg.paths.logs_dir, args.run)
    if not args.watch:
        run = report(folder)
        print(json.dumps(run, indent=2) if args.json else as_text(run, terminal()[0]))
        return int(run["failed"])
    try:
        return watch(folder, args.json)
    except KeyboardInterrupt:  # the way to leave it: the jobs go on
        return 130


def watch(folder: Path, as_json: bool) -> int:
    """Print the report again and again, on a terminal in place of the last; until nothing is in the queue."""
    while True:
        try:
            run = report(folder)
        except PipelineError as error:
            print(f"{error}; trying again", file=sys.stderr)  # the controller restarts, for instance
        else:
            print(json.dumps(run) if as_json else on_screen(run, *terminal()), flush=True)
            if not run["live"]:
                return int(run["failed"])
        time.sleep(WATCH_EVERY_S)


def on_screen(run: dict, width: int | None, height: int) -> str:
    """The report as --watch shows it: on a terminal from its top, no higher than it while anything lives."""
    if width is None:
        return f"{time.strftime('%H:%M:%S')} {as_text(run)}\n"
    lines = [
        f"{time.strftime('%H:%M:%S')}, every {WATCH_EVERY_S} s, Ctrl-C ends it",
        *as_text(run, width).splitlines(),
    ]
    if run["live"]:  # the last one stays whole
        more = ["... (more without --watch)"] if len(lines) >= height else []
        lines = [line[:width] for line in lines[: height - 1 - len(more)]] + more
    return "\n".join(["\033[H\033[J" + lines[0], *lines[1:]])


def terminal() -> tuple[int | None, int]:
    """Columns and lines of the terminal; (None, 0) where the output goes elsewhere."""
    return tuple(shutil.get_terminal_size()) if sys.stdout.isatty() else (None, 0)


if __name__ == "__main__":
    cli.run(main)
