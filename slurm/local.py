"""Running the chain on this machine (`submit.py --local`), and fetching the backbone on a login node."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import BinaryIO, NamedTuple

from common.config import vector_files
from common.errors import Stopped
from slurm import runs
from slurm.node.task import gpu_of


class RunningCommand(NamedTuple):
    """A running command."""

    title: str  # such as "[3/9] train"
    step: str
    command: list[str]
    process: subprocess.Popen
    output: BinaryIO | None  # captured if several run at once
    place: int  # among those that run at once: it decides the GPU


def commands(steps: list, todo: dict[str, list[int]], shared: list[str], jobs: int) -> list[tuple]:
    """(step, command line) of everything that is left; steps that divide are cut into `jobs` commands."""
    commands = []
    for step in steps:
        whole = [sys.executable, str(runs.ROOT / step.script), *step.operands, *shared]
        if not todo[step.name]:
            continue
        if step.arguments and jobs > 1:  # by tars, or by parts of new data
            commands += [(step, [*whole, "--num-shards", str(jobs), "--shard", str(i)]) for i in range(jobs)]
        else:  # more than one task: Optuna's workers
            commands += [(step, whole)] * min(step.tasks, jobs)
    return commands


def run_chain(steps: list, commands: list[tuple], cfg, jobs: int) -> int:
    """Run the commands, and print where the results are if the chain is complete."""
    if not commands:
        print(f"nothing to do: {', '.join(step.name for step in steps)} done")
    code = run(commands, jobs)
    if code == 0 and steps[-1].name == "convert_to_hf":
        results = {
            "report": cfg.paths.evaluation_dir / "report.html",
            "figures": cfg.paths.evaluation_dir / "metrics.json",
            "model": cfg.paths.published_dir,
        }
        for name, path in results.items():
            if path.exists():
                print(f"{name:8} {path}")
    return code


def run(commands: list[tuple], jobs: int) -> int:
    """Run the commands here, `jobs` at once, each after those it needs; stops when one fails, with its exit code.

    One at a time they write to the terminal; several at once have their output printed when they end, and take one
    GPU each, in turn. SIGTERM is passed on to running commands and ends the chain with exit code 85.
    """
    running: list[RunningCommand] = []
    stopped: list[int] = []  # SIGTERM, once it has arrived

    def pass_on(number, _frame) -> None:
        stopped.append(number)
        for task in running:
            task.process.send_signal(number)

    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    waiting, code = list(enumerate(commands, 1)), 0
    before = signal.signal(signal.SIGTERM, pass_on)
    while waiting or running:
        if code or stopped:
            waiting.clear()
        unfinished = {step.name for _, (step, _) in waiting} | {task.step for task in running}
        ready = [item for item in waiting if not unfinished & set(item[1][0].needs)]
        for item in ready[: jobs - len(running)]:
            waiting.remove(item)
            number, (step, command) = item
            title = f"[{number}/{len(commands)}] {step.name}"
            print(title, flush=True)
            output = tempfile.TemporaryFile() if jobs > 1 else None  # noqa: SIM115 - closed with its RunningCommand
            place = min(set(range(jobs)) - {task.place for task in running})
            own = environment | (gpu_of(place) if jobs > 1 else {})
            process = subprocess.Popen(command, cwd=runs.ROOT, env=own, stdout=output, stderr=output)
            running.append(RunningCommand(title, step.name, command, process, output, place))
        time.sleep(0.02)
        for task in [task for task in running if task.process.poll() is not None]:
            running.remove(task)
            if task.output:
                task.output.seek(0)
                print(f"{task.title}:\n{task.output.read().decode(errors='replace')}", end="", flush=True)
            if task.process.returncode and not code and not stopped:
                code = task.process.returncode
                stop = f"the chain stopped at {task.step} (exit code {code})"
                print(f"{stop}: fix this and rerun the same command, which continues there", file=sys.stderr)
                print(f"to rerun that stage alone: {shlex.join(task.command)}", file=sys.stderr)
    signal.signal(signal.SIGTERM, before)
    if stopped:
        raise Stopped
    return code if code >= 0 else 1


def prefetch(cfg, shared: list[str]) -> int:
    """Fetch the backbone into the jobs' cache; then check that it is found there without a network, here and, if
    there is Slurm, on a compute node."""
    if vector_files(cfg.embedding_model.name):
        print(f"nothing to fetch: {cfg.embedding_model.name} holds vectors that another network has made")
        return 0
    in_environment = ["bash", "-c", 'root=$0; source "$root/slurm/env.sh"; "$@"', str(runs.ROOT)]
    look = ["python", f"{runs.ROOT}/slurm/prefetch.py", *shared]
    log, name = cfg.paths.logs_dir / "prefetch.log", f"prefetch-{os.getpid()}"
    job = ["sbatch", "--wait", "--time=10", *cfg.slurm.sbatch, *cfg.slurm.generate_embeddings.sbatch]
    job += ["--ntasks=1", f"--job-name={name}", f"--chdir={runs.ROOT}", f"--output={log}", "--open-mode=truncate"]
    job += [f"{runs.ROOT}/slurm/stage.sbatch", str(runs.ROOT), "0", "slurm/prefetch.py", *shared]
    attempts = [
        ("fetching the backbone", [*in_environment, "env", "HF_HUB_OFFLINE=0", *look]),
        ("checking that it is found without a network, as jobs do", [*in_environment, *look]),
        ("checking from a compute node, in a job, as soon as one is free", job),
    ]
    log.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    for what, command in attempts if shutil.which("sbatch") else attempts[:2]:
        print(f"{what}:", flush=True)
        try:
            code = subprocess.run(command, cwd=runs.ROOT, env=runs.environment()).returncode
        except KeyboardInterrupt:  # which ends sbatch's waiting, not the job
            if command is job:
                runs.ask("scancel", f"--name={name}")
            raise
        told = log.read_text(errors="replace") if log.exists() else ""
        print(told, end="", flush=True)
        if code:
            advice = "HF_HOME in slurm/env.sh must name a folder that compute nodes can see"
            if command is job and not told:
                advice = "the job left no log: see above, and slurm.sbatch, slurm.generate_embeddings.sbatch"
            print(f"the jobs would not find the backbone; {advice}", file=sys.stderr)
            return code if code > 0 else 1
    return 0
