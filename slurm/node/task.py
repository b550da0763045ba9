"""Start a stage as one task of a job step: with its shard, and with one of the GPUs that its job's tasks share.

A job of n tasks takes n shards: task p of array index i takes shard i * n + p. stage.sbatch has srun start this.
Where Slurm has bound each task to a GPU of its own, the task keeps that one.

With slurm.stage_to, a stage that reads images finds its shard's tars on the node's own disk; see staging.py.

Reads    SLURM_ARRAY_TASK_ID, SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_LOCALID, SLURM_JOB_GPUS,
         CUDA_VISIBLE_DEVICES
Writes   nothing itself
Command  python slurm/node/task.py SCRIPT [the script's arguments]
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common import cli, errors
from slurm.node.child import run

DEVICES = Path("/dev")
DIVIDED_ON_GPUS = ("generate_embeddings", "compute_visual_neighbors", "optuna_worker")  # begin the scripts' names
STAGED = ("compute_fingerprints", "generate_embeddings")  # what slurm.stage_to applies to


def gpu_of(place: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the process at `place` (0, 1, ...) of several on this machine: one of the GPUs that
    are visible here, in turn. Empty if there are fewer than two."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]
    else:
        gpus = visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if len(gpus) > 1 else {}


def note_on_gpus(script: str, words: list[str], num_tasks: int) -> str:
    """What to do about the job's GPUs on this node that a stage has no tasks for; empty if there are none.

    SLURM_JOB_GPUS lists what the job holds, also where the step was given less: a site may hand out whole nodes.
    """
    held = len(os.environ.get("SLURM_JOB_GPUS", "").split(","))
    if held <= num_tasks or not Path(script).stem.startswith(DIVIDED_ON_GPUS) or "--finish" in words:
        return ""
    advice = f'see "Nodes that are handed out whole" in docs/slurm.md, and --ntasks={held}'
    return f"this job holds {held} GPUs and uses {num_tasks}: {advice}"


def slurm_variable(name: str, default: int = 0) -> int:
    return int(os.environ.get(f"SLURM_{name}", default))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    words, num_tasks = args.arguments, slurm_variable("STEP_NUM_TASKS", 1)
    if num_tasks > 1:
        os.environ.update(gpu_of(slurm_variable("LOCALID")))
    if slurm_variable("PROCID") == 0 and (note := note_on_gpus(args.script, words, num_tasks)):
        print(note, flush=True)
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    cli.config_flags(flags)
    flags.add_argument("--num-shards", type=int)
    of_stage = flags.parse_known_args(words)[0]
    num_shards, name = of_stage.num_shards, Path(args.script).stem
    if not name.startswith("generate_embeddings_from"):  # messages then name what submits the stage again
        os.environ[errors.JOB_SETTINGS] = shlex.join(errors.settings_flags(of_stage))
    if num_shards and "SLURM_ARRAY_TASK_ID" in os.environ:
        shard = slurm_variable("ARRAY_TASK_ID") * num_tasks + slurm_variable("PROCID")
        if shard >= num_shards:
            print(f"there is no shard {shard} of {num_shards}", flush=True)
            return 0
        words = [*words, "--shard", str(shard)]
        if name in STAGED and (cfg := cli.load_config(of_stage)).slurm.stage_to:
            from slurm.node import staging

            code = staging.run_on_copies([sys.executable, args.script, *words], cfg, name, shard, num_shards)
            if code is not None:
                return code if num_tasks == 1 else one_of_several(code)
    cli.check_stop()
    command = [sys.executable, args.script, *words]
    if num_tasks == 1:
        os.execv(sys.executable, command)
    return one_of_several(run(command))


def one_of_several(code: int) -> int:
    """What a task of several exits with, once its own code is in the log: srun returns the highest of all, and the
    job is requeued if any task was stopped."""
    print(f"-- task ends with exit code {code}", flush=True)
    return cli.EXIT_STOPPED if code in (cli.EXIT_STOPPED, 128 + signal.SIGTERM) else min(code, 1)


if __name__ == "__main__":
    cli.run(main, resumable=True)
