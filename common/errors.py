"""Errors that a user can cause. Their message is all the user sees: what is wrong, where, and what to do.

`command` is a command line that a message advises. `explained` says the same of torch's errors about memory and
GPUs; torch is not imported here, so it matches their messages.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

JOB_SETTINGS = "PIPELINE_JOB_SETTINGS"  # in the environment of a job of the chain: its --config and --set
# of --tune, by their scripts
_STEPS_OF_TUNING = {"optuna_worker": "optuna_worker", "fetch_best_and_train": "train"}
_NO_MEMORY = re.compile("DefaultCPUAllocator|out of memory|CUBLAS_STATUS_ALLOC_FAILED")  # first the host's
_CPU = 'or set infrastructure.device to "cpu"'
_TORCH = "see https://pytorch.org/get-started"
_OF_GPU = {  # words of an error of a GPU, its driver or libraries -> what to do; the first that match
    "no kernel image": "torch has no kernels for this GPU: wheels for CUDA 12.6 run on Maxwell to Hopper, for "
    f"CUDA 13 on Turing and newer. Install the other one ({_TORCH}), {_CPU}",
    "driver|unsupported toolchain": f"update the driver, install a torch for an older CUDA ({_TORCH}), {_CPU}",
    "CUBLAS_STATUS|CUSOLVER_STATUS|cuDNN error": "install torch in a new .venv, so that its libraries belong "
    f"together (make install CONSTRAINTS=), try another GPU, {_CPU}",
    "CUDA error|HIP error|CUDA call failed|cudaGetDeviceCount": "rerun: finished files are kept. If it recurs, "
    f"try another GPU, {_CPU}. CUDA_LAUNCH_BLOCKING=1 and --set logging.level=debug show where it happens",
}
_IS_OF_GPU = re.compile(
    "NVIDIA driver|CUDA driver|CUBLAS_STATUS|CUSOLVER_STATUS|cuDNN error|CUDA error|HIP error|CUDA call failed|"
    "cudaGetDeviceCount"
)


class PipelineError(Exception):
    """The run cannot succeed (exit code 1)."""

    exit_code = 1


class StaleArtefact(PipelineError):
    """A finished file does not match the settings or the inputs of this run."""


class ConfigError(PipelineError):
    """Invalid arguments or configuration (exit code 2)."""

    exit_code = 2


class Stopped(Exception):
    """SIGTERM or SIGUSR2 arrived, and all finished work is saved (exit code 85)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text: what a user is shown of a library's error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device lacks the memory for a request; the process can go on with a smaller one."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(error)) is not None)
    )


def explained(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and what to do, for an error about memory or of a GPU; None for any other error."""
    if is_out_of_memory(error):
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            advice = "--help says how much the script needs; on Slurm set --mem in slurm.<stage>.sbatch"
            return "out of memory", advice
        advice = "free some, lower batch sizes or infrastructure.search_memory_mb, or change infrastructure.device"
        return "the device is out of memory", advice
    lines = (line for line in str(error).splitlines() if _IS_OF_GPU.search(line))
    if (line := next(lines, None)) is None:
        return None
    advice = next(advice for words, advice in _OF_GPU.items() if re.search(words, line))
    return line.partition(" Please ")[0], advice


def command(script: str = "", *more: str) -> str:
    """A command line to print, which can be run as it is: this process's own, of all shards, with `more` at its
    end; or that of another `script` of the repository, with this one's --config and --set. In a job of the chain:
    that of slurm/submit.py, where it can do the same.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--shard", "--num-shards"):
        flags.add_argument(flag)
    flags.add_argument("--set", action="append", default=[])
    given, rest = flags.parse_known_args(sys.argv[1:])
    settings = settings_flags(given)
    if JOB_SETTINGS in os.environ:
        settings = shlex.split(os.environ[JOB_SETTINGS])
        if not script or more == ("--remake",):
            name = Path(script or sys.argv[0]).stem
            settings += ["--tune", "1"] if name in _STEPS_OF_TUNING else []
            stage = [_STEPS_OF_TUNING.get(name, name)] if "--remake" in more else []
            return command_line("slurm/submit.py", *settings, *more, *stage)
    if script:
        return command_line(script, *settings, *more)
    return shlex.join(["python", sys.argv[0], *rest, *settings, *more])


def settings_flags(args: argparse.Namespace) -> list[str]:
    """The --config and --set flags of a call."""
    flags = ["--config", str(Path(args.config).resolve())] if args.config else []
    return [*flags, *(word for override in args.set for word in ("--set", override))]


def command_line(script: str, *words: str) -> str:
    """A script of the repository with these arguments, as it can be run from here."""
    path, here = Path(__file__).resolve().parents[1] / script, Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    return shlex.join(["python", str(path), *words])
