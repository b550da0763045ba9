"""The chain on this machine, as `submit.py --local` runs it, and the fetching of the backbone on a login node."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from common import cli
from slurm import submit


def commands(steps: list, todo: dict[str, list[int]], shared: list[str], jobs: int) -> list[tuple]:
    """(step, its command line) of all that is left; steps that can be cut are cut into `jobs` commands."""
    found = []
    for step in steps:
        whole = submit.local_command(step, shared)
        if not todo[step.name]:
            continue
        if step.arguments and jobs > 1:  # by tars
            found += [(step, [*whole, "--num-shards", str(jobs), "--shard", str(i)]) for i in range(jobs)]
        else:  # more than one task: Optuna's workers
            found += [(step, whole)] * min(step.tasks if not step.arguments else 1, jobs)
    return found


def run(commands: list[tuple], jobs: int) -> int:
    """Run the commands here, `jobs` at once, each after what it needs; stops where one fails, with its exit code.

    One at a time they talk to the terminal; otherwise what each has said is printed at its end.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    options: dict = {"cwd": submit.ROOT, "text": True}
    if jobs > 1:
        options |= {"env": {"OMP_NUM_THREADS": threads, **os.environ}}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    waiting, running, code = list(enumerate(commands, 1)), {}, 0
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            unfinished = {step.name for _, (step, _) in waiting} | {step.name for _, step in running.values()}
            ready = [item for item in waiting if not unfinished & set(item[1][0].needs)]
            for item in ready[: jobs - len(running)]:
                number, (step, command) = item
                print(f"[{number}/{len(commands)}] {step.name}", flush=True)
                running[pool.submit(subprocess.run, command, **options)] = number, step
                waiting.remove(item)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, step = running.pop(future)
                ended = future.result()
                if jobs > 1:
                    print(f"[{number}/{len(commands)}] {step.name}:\n{ended.stdout}", end="", flush=True)
                if ended.returncode and not code:
                    code, waiting = ended.returncode, []
                    stop = f"the chain stopped at {step.name} (exit code {code})"
                    print(f"{stop}; the same command continues there", file=sys.stderr)
            cli.check_stop()
    return code if code >= 0 else 1


def print_results(cfg) -> None:
    """Where the results of a finished chain lie."""
    results = {
        "report": cfg.paths.evaluation_dir / "report.html",
        "figures": cfg.paths.evaluation_dir / "metrics.json",
        "model": cfg.paths.published_dir,
    }
    for name, path in results.items():
        if path.exists():
            print(f"{name:8} {path}")


def prefetch(cfg, shared: list[str]) -> int:
    """Fetch the backbone into the cache of the jobs; then look whether it is found there without a network, here
    and, where there is Slurm, on a compute node."""
    stage = cfg.slurm.generate_embeddings
    in_environment = ["bash", "-c", 'root=$0; source "$root/slurm/env.sh"; "$@"', str(submit.ROOT)]
    look = ["python", f"{submit.ROOT}/slurm/prefetch.py", *shared]
    node = ["srun", "--job-name=prefetch", "--ntasks=1", "--time=10", *cfg.slurm.sbatch, *stage.sbatch]
    attempts = [
        ("fetching, with the network", [*in_environment, "env", "HF_HUB_OFFLINE=0", *look]),
        ("looking, as the jobs do, without it", [*in_environment, *look]),
        ("looking from a compute node, as soon as one is free", [*node, *in_environment, *look]),
    ]
    for what, command in attempts if shutil.which("srun") else attempts[:2]:
        print(f"{what}:", flush=True)
        code = subprocess.run(command, cwd=submit.ROOT).returncode
        if code:
            advice = "HF_HOME in slurm/env.sh must name a folder that compute nodes see, too"
            print(f"the jobs would not find the backbone; {advice}", file=sys.stderr)
            return code if code > 0 else 1
    return 0
