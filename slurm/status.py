"""Report on a submitted run: what is done, running or waiting, what failed and why, and how to continue.

Slurm forgets a job minutes after it ends, and not every cluster has accounting: from then on its log and its files
say how it ended. Exit code 1: some task failed, was cancelled, was never submitted, or will never start.

Reads    logs/runs/<time>/{run.json,config.toml,*.log}, squeue, the records in the artefacts
Command  python slurm/status.py [RUN] [--watch] [--json]       RUN: by default the newest in logs/runs

--json: run, folder; steps, in the order of the chain, each with name, job, state ("failed", "stuck", "running",
"waiting", "unknown" (another user's, and hidden), "not submitted", "cancelled" or "done"), why, tasks (state ->
count) and progress (done, total, unit; per_hour and seconds_left while it runs); failures, each with step, task,
job, why, log and last_lines; live: some job is or may be running, or waits for what can come; failed: some task
failed, was cancelled, was not submitted or is stuck; continue, continue_submission and cancel: command lines.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import PipelineError

WATCH_EVERY_S = 10
SHOWN_FAILURES, SHOWN_LINES = 3, 12
# a step is in the first of these states that any of its tasks is in
STATES = ("failed", "stuck", "running", "waiting", "unknown", "not submitted", "cancelled", "done")


def report(folder: Path) -> dict:
    """Everything about a run, as --json prints it."""
    from common import config
    from slurm import chain, fates, runs

    record = runs.load(folder)
    jobs, cfg = runs.queue(record["owner"]), config.load(folder / "config.toml")
    steps = {step.name: step for step in chain.steps_of_record(record, cfg)}
    summaries: dict[str, dict] = {
        name: {"name": name, "job": None, "state": "done", "why": "before this run", "tasks": {}, "progress": {}}
        for name in record["done_before"]
    }
    failures: list[dict] = []
    live, stuck = False, set[str]()
    for name, entry in record["steps"].items():
        step = steps[name]
        tasks = fates.tasks_of(step, entry, jobs, cfg)
        counts = {state: sum(task.state == state for task in tasks) for state in STATES}
        state = next(state for state in STATES if counts[state])
        if state == "stuck" or (state == "waiting" and stuck.intersection(step.needs)):
            stuck.add(name)
        live |= counts["running"] + counts["unknown"] > 0 or (counts["waiting"] > 0 and name not in stuck)
        counts["done"] += step.tasks - len(tasks)
        unfinished = [need for need in step.needs if need in summaries and summaries[need]["state"] != "done"]
        summaries[name] = {
            "name": name,
            "job": entry["job"],
            "state": state,
            "why": why(state, tasks, unfinished),
            "tasks": {state: count for state, count in counts.items() if count},
            "progress": fates.progress_of(step, tasks, cfg),
        }
        failures += failures_of(step, tasks)
    program, run = runs.ROOT / "slurm" / "submit.py", runs.handle(folder, record)
    here = os.path.relpath(program)
    submit = ["python", str(program) if here.startswith("..") else here]
    present = {state for step in summaries.values() for state in step["tasks"]}
    return {
        "run": folder.name,
        "folder": str(folder),
        "steps": [summaries[name] for name in steps if name in summaries],
        "failures": failures,
        "live": live,
        "failed": not present.isdisjoint(("failed", "stuck", "cancelled", "not submitted")),
        "continue": shlex.join([*submit, *record["continue_with"]]),
        "continue_submission": shlex.join([*submit, "--continue", run]),
        "cancel": shlex.join([*submit, "--cancel", run]),
    }


def failures_of(step, tasks: list) -> list[dict]:
    return [
        {
            "step": step.name,
            "task": task.number if step.tasks > 1 else None,
            "job": task.job,
            "why": task.why,
            "log": str(task.log.path),
            "last_lines": task.log.lines[-SHOWN_LINES:],
        }
        for task in tasks
        if task.state == "failed"
    ]


def why(state: str, tasks: list, unfinished: list[str]) -> str:
    """Why a step is in its state, by its first task in that state; while it runs, the last line of its log."""
    first = next(task for task in tasks if task.state == state)
    if state == "waiting" and first.why == "Dependency":
        return f"for {', '.join(unfinished)}"
    if state == "running" and len(tasks) == 1 and not first.why:
        return first.log.lines[-1] if first.log.lines else ""
    return first.why


def row_of(step: dict) -> tuple[str, ...]:
    """A line of the table, the least important column last, where a narrow terminal cuts it off."""
    counts, progress = step["tasks"], step["progress"]
    total = sum(counts.values())
    tasks, notes = "", [step["why"]]
    if total > 1:
        tasks = f"{counts.get('done', 0)} of {total}"
        live = [f"{counts[state]} {state}" for state in STATES[:5] if state in counts]
        notes = [", ".join(live) if len(live) > 1 or step["state"] == "running" else "", step["why"]]
    files = ""
    if progress:
        of = f" of {progress['total']:,}" if progress["total"] is not None else ""
        files = f"{progress['done']:,}{of} {progress['unit']}"
    left = cli.duration(progress["seconds_left"]) if "seconds_left" in progress else ""
    rate = f"{progress['per_hour']:,.0f}/h" if "per_hour" in progress else ""
    return step["name"], step["state"], tasks, files, left, rate, "; ".join(filter(None, notes))


def as_text(run: dict, width: int | None = None) -> str:
    """The report as text, the lines of its table cut off at `width` characters."""
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
        lines += ["", f"and {len(run['failures']) - SHOWN_FAILURES} more tasks failed: see --json"]
    if not run["failed"]:
        return "\n".join(lines)
    halted, stuck = (
        any(step["tasks"].get(state) for step in run["steps"]) for state in ("not submitted", "stuck")
    )
    if halted and not run["failures"]:
        advice = [f"the submission was interrupted; submit the rest:  {run['continue_submission']}"]
    elif run["live"] or stuck:
        when = "once that is fixed, and after" if stuck else "once the running jobs have ended, or after"
        advice = [f"{when}  {run['cancel']}", f"continue with:  {run['continue']}"]
    else:
        advice = [f"once that is fixed, continue with:  {run['continue']}"]
    return "\n".join([*lines, "", *advice])


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("run", nargs="?", metavar="RUN", help="its name or folder (default: the newest)")
    arguments.add_argument("--watch", action="store_true", help="refresh until no job is left in the queue")
    arguments.add_argument("--json", action="store_true", help="for programs; with --watch one line per refresh")
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
    except KeyboardInterrupt:  # this only ends the watching: the jobs go on
        return 130


def watch(folder: Path, as_json: bool) -> int:
    """Print the report every WATCH_EVERY_S, on a terminal in place, until no job is left in the queue."""
    while True:
        try:
            run = report(folder)
        except PipelineError as error:
            print(f"{error}; retrying", file=sys.stderr)  # the controller is restarting, for instance
        else:
            print(json.dumps(run) if as_json else on_screen(run, *terminal()), flush=True)
            if not run["live"]:
                return int(run["failed"])
        time.sleep(WATCH_EVERY_S)


def on_screen(run: dict, width: int | None, height: int) -> str:
    """The report as --watch shows it: on a terminal from the top, no taller than it while any job is live."""
    if width is None:
        return f"{time.strftime('%H:%M:%S')} {as_text(run)}\n"
    header = f"{time.strftime('%H:%M:%S')}, refreshed every {WATCH_EVERY_S} s, Ctrl-C to leave"
    lines = [header, *as_text(run, width).splitlines()]
    if run["live"]:  # the final report stays whole
        more = ["... (run without --watch to see the rest)"] if len(lines) >= height else []
        lines = [line[:width] for line in lines[: height - 1 - len(more)]] + more
    return "\n".join(["\033[H\033[J" + lines[0], *lines[1:]])


def terminal() -> tuple[int | None, int]:
    """Columns and lines of the terminal; (None, 0) if the output is not one."""
    columns, lines = shutil.get_terminal_size()
    return (columns, lines) if sys.stdout.isatty() else (None, 0)


if __name__ == "__main__":
    cli.run(main)
