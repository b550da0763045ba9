"""Checks and times the pipeline on a GPU: whether it computes what the CPU does, how fast, in how much memory.

First each stage is compared with the CPU on little data. Then come rates: a ViT-S, B and L at 224 pixels (random
weights in DINOv2's form) against their bare forward pass and the card's peak, with torch.compile and without;
neighbours among a million rows against plain tiles and the product alone; steps of training; a head; the
evaluation of 200,000 images; and the peak of memory of each against the formula in its docstring. A check that
fails is a row of the table too, and the others go on. Nothing is downloaded.

Writes   tests/benchmarks/on_gpu.json, from which a table of docs/benchmarks.md is made
Command  python tests/benchmarks/on_gpu.py [--json PATH]     (make bench calls it where there is a GPU)
         --small: little of everything, only to see that all of it runs; written only where --json says
Needs    one CUDA device with 24 GB free, 16 GB of memory, and 2 GB in the folder for temporary files
Time     under 8 minutes on one A100 or H200, by estimate: what has not begun after 6 is skipped
Exit     1 if a check failed, or a result differs from the CPU's
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import sysconfig
import time
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from common import cli
from common.errors import PipelineError

TARGET = Path(__file__).with_suffix(".json")
LATEST_S = 300  # no check begins after so many seconds


def rows_of(name: str, check, gpu) -> list:
    """The rows that a check yields; one that fails ends with a row that says so."""
    import gpu_rows
    import torch

    rows = []
    print(f"--- {name}", file=sys.stderr, flush=True)
    try:
        for row in check(gpu):
            rows.append(row)
    except Exception as error:  # whatever it is: the other checks are worth their time
        traceback.print_exc()
        first_line = str(error).partition("\n")[0]
        rows.append(gpu_rows.Row(name, None, "", is_right=False, note=f"{type(error).__name__}: {first_line}"))
    print(gpu_rows.as_text(rows), file=sys.stderr, flush=True)
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after an error of the card itself, nothing on it works
        torch.cuda.empty_cache()
    return rows


def all_rows(gpu) -> list:
    """All checks, one after the other."""
    import gpu_equality
    import gpu_rows
    import gpu_speed

    began, rows = time.monotonic(), []
    for name, check in gpu_equality.CHECKS.items():
        rows += rows_of(f"{name}, compared with the CPU", check, gpu)
    for name, check in gpu_speed.CHECKS.items():
        reason = why_not_compiled(gpu) if "compiled" in name else ""
        if not reason and time.monotonic() - began > LATEST_S:
            reason = f"no time left after {LATEST_S} s"
        if reason:
            rows.append(gpu_rows.Row(name, None, "", note=reason))
        else:
            rows += rows_of(name, check, gpu)
    return rows


def why_not_compiled(gpu) -> str:
    """Why torch.compile is not measured; "" if it is."""
    import gpu_rows

    if gpu.sizes is gpu_rows.SMALL:
        return "--small"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h, which Triton needs"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help=f"of the figures ({TARGET.name} beside this file)"
    )
    parser.add_argument("--small", action="store_true", help="little of everything, to see that it runs")
    args = parser.parse_args(argv)
    import timing  # puts tests/ on the path
    import torch

    if not torch.cuda.device_count():
        raise PipelineError(
            f"torch {torch.__version__} sees no CUDA device, and these checks need one\n"
            "run them where nvidia-smi lists a GPU, with a torch that has CUDA: make install CONSTRAINTS="
        )
    import gpu_rows

    began, name = time.monotonic(), torch.cuda.get_device_name()
    gpu = gpu_rows.Gpu(torch.device("cuda"), name, gpu_rows.SMALL if args.small else gpu_rows.FULL)
    rows = all_rows(gpu)
    machine = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {timing.machine()}"
    print(f"{machine}, {time.monotonic() - began:.0f} s\n{gpu_rows.as_text(rows)}")
    found = {"machine": machine, "rows": [asdict(row) for row in rows]}
    if target := args.json or (None if args.small else TARGET):
        target.write_text(json.dumps(found, indent=1) + "\n")
    wrong = sum(not row.is_right for row in rows)
    print(f"{len(rows)} rows, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    cli.run(main)
