"""Running the chain on this machine (`submit.py --local`), and fetching the backbone on a login node."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from common.errors import Stopped
from slurm import runs
from slurm.runs import ROOT


def local_command(step, shared: list[str]) -> list[str]:
    """The command line that does all of a step's work here: the job's without its shards."""
    return [sys.executable, str(ROOT / step.script), *shared]


def commands(steps: list, todo: dict[str, list[int]], shared: list[str], jobs: int) -> list[tuple]:
    """(step, command line) of everything that is left; steps that divide are cut into `jobs` commands."""
    commands = []
    for step in steps:
        whole = local_command(step, shared)
        if not todo[step.name]:
            continue
        if step.arguments and jobs > 1:  # by tars
            commands += [(step, [*whole, "--num-shards", str(jobs), "--shard", str(i)]) for i in range(jobs)]
        else:  # more than one task: Optuna's workers
            commands += [(step, whole)] * min(step.tasks if not step.arguments else 1, jobs)
    return commands


def run_chain(steps: list, commands: list[tuple], cfg, jobs: int) -> int:
    """Run the commands, and print where the results are if the chain is complete."""
    if not commands:
        print(f"nothing to do: {', '.join(step.name for step in steps)} done")
    code = run(commands, jobs)
    if code == 0 and steps[-1].name == "convert_to_hf":
        print_results(cfg)
    return code


def run(commands: list[tuple], jobs: int) -> int:
    """Run the commands here, `jobs` at once, each after those it needs; stops when one fails, with its exit code.

    One at a time they write to the terminal; several at once have their output printed when they end. SIGTERM is
    passed on to running commands and ends the chain with exit code 85.
    """
    running: list[RunningCommand] = []
    waiting, code = list(enumerate(commands, 1)), 0
    with _passed_on(running) as stopped:
        while (waiting and not code and not stopped) or running:
            unfinished = {step.name for _, (step, _) in waiting} | {task.step for task in running}
            ready = [item for item in waiting if not unfinished & set(item[1][0].needs)]
            for item in ready[: jobs - len(running)] if not code and not stopped else ():
                number, (step, command) = item
                print(f"[{number}/{len(commands)}] {step.name}", flush=True)
                running.append(_start(f"[{number}/{len(commands)}]", step, command, jobs))
                waiting.remove(item)
            time.sleep(0.02)
            for task in [task for task in running if task.process.poll() is not None]:
                running.remove(task)
                _print_output(task)
                if task.process.returncode and not code and not stopped:
                    code = task.process.returncode
                    stop = f"the chain stopped at {task.step} (exit code {code})"
                    print(f"{stop}: fix this and rerun the same command, which continues there", file=sys.stderr)
                    print(f"to rerun that stage alone: {shlex.join(task.command)}", file=sys.stderr)
    if stopped:
        raise Stopped
    return code if code >= 0 else 1


class RunningCommand(NamedTuple):
    """A running command."""

    title: str
    step: str  # its name
    command: list[str]
    process: subprocess.Popen
    output: BinaryIO | None  # captured if several run at once


def _start(title: str, step, command: list[str], jobs: int) -> RunningCommand:
    if jobs == 1:
        return RunningCommand(title, step.name, command, subprocess.Popen(command, cwd=ROOT), None)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `_print_output`
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return RunningCommand(title, step.name, command, process, output)


def _print_output(task: RunningCommand) -> None:
    if task.output is not None:
        with task.output:
            task.output.seek(0)
            output = task.output.read().decode(errors="replace")
            print(f"{task.title} {task.step}:\n{output}", end="", flush=True)


@contextlib.contextmanager
def _passed_on(running: list[RunningCommand]) -> Iterator[list[int]]:
    """Pass SIGTERM on to the running commands; yields a list that holds it once it has arrived."""
    received: list[int] = []

    def pass_on(number, _frame) -> None:
        received.append(number)
        for task in running:
            task.process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def print_results(cfg) -> None:
    """Print where the results of a finished chain are."""
    results = {
        "report": cfg.paths.evaluation_dir / "report.html",
        "figures": cfg.paths.evaluation_dir / "metrics.json",
        "model": cfg.paths.published_dir,
    }
    for name, path in results.items():
        if path.exists():
            print(f"{name:8} {path}")


def prefetch(cfg, shared: list[str]) -> int:
    """Fetch the backbone into the jobs' cache; then check that it is found there without a network, here and, if
    there is Slurm, on a compute node."""
    stage = cfg.slurm.generate_embeddings
    in_environment = ["bash", "-c", 'root=$0; source "$root/slurm/env.sh"; "$@"', str(ROOT)]
    look = ["python", f"{ROOT}/slurm/prefetch.py", *shared]
    node = ["srun", "--job-name=prefetch", "--ntasks=1", "--time=10", *cfg.slurm.sbatch, *stage.sbatch]
    attempts = [
        ("fetching the backbone", [*in_environment, "env", "HF_HUB_OFFLINE=0", *look]),
        ("checking that it is found without a network, as jobs do", [*in_environment, *look]),
        ("checking from a compute node, as soon as one is free", [*node, *in_environment, *look]),
    ]
    for what, command in attempts if shutil.which("srun") else attempts[:2]:
        print(f"{what}:", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=runs.environment()).returncode
        if code:
            advice = "HF_HOME in slurm/env.sh must name a folder that compute nodes can see"
            print(f"the jobs would not find the backbone; {advice}", file=sys.stderr)
            return code if code > 0 else 1
    return 0
