"""All benchmarks, one after the other: every ratio with its baseline, how time grows with the number of images,
and what the full dataset would cost; in files, and in the documentation.

Reads    tests/benchmarks/bench_*.py, growth.py, full_dataset.py, and on_gpu.py where there is a GPU
Writes   tests/benchmarks/{results,demo,growth,full_dataset,on_gpu}.json, growth.svg, search.png, and the tables of
         README.md and docs/benchmarks.md
Command  python tests/benchmarks/run_all.py     (make bench)
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOPICS = [
    *"tars process_tar images fingerprints storage scale generation".split(),
    *"neighbors index triplets evaluation demo".split(),
]
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import generated_docs
import torch
from timing import machine

from common import files


def run(script: Path, *arguments: str) -> None:
    """One benchmark, in a process of its own. Raises CalledProcessError if it fails."""
    print(f"--- {script.stem}", flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, str(script), *arguments], cwd=ROOT, check=True)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def on_gpu() -> int:
    """The checks of a GPU; their exit code. If one fails, the rest of the figures are written all the same."""
    if not torch.cuda.device_count():
        print("--- on_gpu: skipped, since torch sees no CUDA device", flush=True)
        return 0
    print("--- on_gpu", flush=True)
    return subprocess.call([sys.executable, str(HERE / "on_gpu.py")], cwd=ROOT)


def main() -> int:
    found: dict = {"machine": machine(), "ratios": []}
    with tempfile.TemporaryDirectory() as scratch:
        for script in [HERE / f"bench_{topic}.py" for topic in TOPICS]:
            figures = Path(scratch) / f"{script.stem}.json"
            run(script, "--json", str(figures))
            found["ratios"] += json.loads(figures.read_text())["ratios"]
    files.write_text(HERE / "results.json", json.dumps(found, indent=1) + "\n")
    run(HERE / "growth.py")
    run(HERE / "full_dataset.py")
    code = on_gpu()
    generated_docs.write_all()
    missed = [row["what"] for row in found["ratios"] if row["target"] and row["ratio"] < row["target"]]
    print(f"{len(found['ratios'])} ratios, {len(missed)} below what is wanted: {'; '.join(missed) or 'none'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
