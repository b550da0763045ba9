"""The whole chain, `make demo`: from synthetic tars to a model, and what the same command costs when all is done.

Writes   tests/benchmarks/demo.json: its table, and bytes per image of what it wrote; search.png: its picture
Command  python tests/benchmarks/bench_demo.py
"""

import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path

import timing  # puts the repository's root on sys.path

from common import files, parquet

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ARTEFACTS = {  # where the demo has them
    **{name: f"data/{name}" for name in ("intermediates", "fingerprints")},
    **{name: f"data/backbone/{name}" for name in ("embeddings", "merged", "difficulty")},
}


def make_demo(folder: str) -> tuple[float, str]:
    """(seconds, what it printed) of one `make demo`, its data included where that is not there."""
    started = time.perf_counter()
    command = ["make", "--no-print-directory", "demo", f"DEMO={folder}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def table_in(printed: str) -> str:
    """The tables of the evaluation: from the first one's heading to the place of the report."""
    lines = [line.rstrip() for line in printed.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("%") and "mAP@R" in line)
    return "\n".join(itertools.takewhile(lambda line: not line.startswith("report:"), lines[first:]))


def facts(folder: Path, printed: str) -> dict:
    """What the documentation and full_dataset.py use of the demo."""
    folders = {name: next(folder.glob(f"*-streets/{place}")) for name, place in ARTEFACTS.items()}
    images = sum(parquet.num_rows(path) for path in folders["intermediates"].glob("*.parquet"))
    sizes = {name: sum(path.stat().st_size for path in place.glob("*.parquet")) for name, place in folders.items()}
    return {
        "images": images,
        "bytes_per_image": {name: round(size / images, 1) for name, size in sizes.items()},
        "table": table_in(printed),
    }


def measure() -> list[timing.Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        first, printed = make_demo(folder)
        found = facts(Path(folder), printed)
        again = [make_demo(folder)[0] for _ in range(3)]
        picture = next(Path(folder).glob("*-streets/data/backbone/search.png"))
        files.write_bytes(HERE / "search.png", picture.read_bytes())
    files.write_text(HERE / "demo.json", json.dumps({**found, "seconds": round(first, 1)}, indent=1) + "\n")
    taken = {"again": again, "the first time": [first] * len(again)}
    return [timing.ratio(f"make demo ({found['images']:,} images), all done", taken, "again", "the first time")]


if __name__ == "__main__":
    timing.main(__doc__, measure)
