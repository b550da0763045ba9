"""All benchmarks, one after the other: every ratio with its baseline, in one file and in the README.

Reads    tests/benchmarks/bench_*.py
Writes   tests/benchmarks/results.json, and README.md's table of it
Command  python tests/benchmarks/run_all.py     (make bench)
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import readme_parts
from timing import machine

from common import files


def main() -> int:
    found: dict = {"machine": machine(), "ratios": []}
    with tempfile.TemporaryDirectory() as scratch:
        for script in sorted(HERE.glob("bench_*.py")):
            print(f"--- {script.stem}", flush=True)
            started, figures = time.monotonic(), Path(scratch) / f"{script.stem}.json"
            code = subprocess.run([sys.executable, str(script), "--json", str(figures)], cwd=ROOT).returncode
            if code:
                return code
            found["ratios"] += json.loads(figures.read_text())["ratios"]
            print(f"{time.monotonic() - started:.0f} s", flush=True)
    files.write_text(readme_parts.RESULTS, json.dumps(found, indent=1) + "\n")
    files.write_text(readme_parts.README, readme_parts.renewed(readme_parts.README.read_text()))
    missed = [row["what"] for row in found["ratios"] if row["target"] and row["ratio"] < row["target"]]
    print(f"{len(found['ratios'])} ratios, {len(missed)} below what is wanted: {'; '.join(missed) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
