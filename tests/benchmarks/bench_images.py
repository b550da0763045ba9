"""A gzip tar of 2 GB after process_tar.py: what reading its images costs, at random and in row order, how large
its index is, and how much memory the script took.

"One pass" and "inflating all before it" are the same reader without an index: it begins at the start of the tar,
and passes through it once, since images are read in the order of the tar. All reading is done by one thread, from
files in the page cache. Needs 5 GB of disk for some minutes.

Command  python tests/benchmarks/bench_images.py
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import street_tar
import timing  # puts the repository's root on sys.path
from damaged_tars import write_gzip

from common import config, parquet, sections
from common.imagery import tar_images

IMAGES = 60_000  # 2 GB of them
RANDOM, RANDOM_S = 100, 5
INDEX_SHARE = 0.01
BATCH = 256  # rows that a stage reads at a time


def allowed_mb(tar_bytes: int, threads: int) -> float:
    """What process_tar.py's docstring says of its memory."""
    return 20 + threads + 0.0025 * IMAGES + 50 + 0.004 * tar_bytes / 1e6


def process(root: Path) -> None:
    """process_tar.py on one tar; prints how much memory it took beyond that of a process that has begun."""
    from preprocess import process_tar
    from preprocess.tars import tar_files  # noqa: F401  (imported before memory is looked at)

    def held_mb(kind: str) -> float:
        return int(re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

    before = held_mb("VmRSS")
    assert process_tar.main(["--set", f"paths.root={root}"]) == 0
    print(json.dumps(held_mb("VmHWM") - before))


def read_in_order(store: tar_images.TarImages, rows: pa.Table) -> None:
    for start in range(0, rows.num_rows, BATCH):
        store.read(rows.slice(start, BATCH))


def measure_reading(paths: sections.Paths, plain_dir: Path, rows: pa.Table, tar_gb: str) -> list[timing.Ratio]:
    chosen = np.random.default_rng(0).choice(rows.num_rows, RANDOM, replace=False)
    some, middle = rows.take(chosen), rows.slice(rows.num_rows // 2, 1)
    tar = paths.raw_dir / rows["tar_file"][0].as_py()
    in_order = some.sort_by("image_offset")

    def without_index(rows: pa.Table) -> list[bytes]:
        return tar_images.Tar(tar, points=[]).reader(rows)(0, rows.num_rows)

    assert tar_images.of_paths(paths).read(some) == tar_images.TarImages(plain_dir, plain_dir).read(some)
    ways = {
        "random": lambda: tar_images.of_paths(paths).read(some),
        "one pass": lambda: without_index(in_order),
        "middle": lambda: tar_images.of_paths(paths).read(middle),
        "inflating all before it": lambda: without_index(middle),
        "gzip": lambda: read_in_order(tar_images.of_paths(paths), rows),
        "the plain tar": lambda: read_in_order(tar_images.TarImages(plain_dir, plain_dir), rows),
    }
    taken = timing.seconds(ways, rounds=3, warm_up=False)
    what = f"read {RANDOM} random images of a gzip tar of {tar_gb}"
    taken[f"{RANDOM_S} s allowed"] = [float(RANDOM_S)] * 3
    items = {"items": rows.num_rows, "unit": "images/s"}
    return [
        timing.ratio(what, taken, "random", f"{RANDOM_S} s allowed", target=1),
        timing.ratio(what, taken, "random", "one pass"),
        timing.ratio(
            f"read an image out of the middle of a gzip tar of {tar_gb}",
            taken,
            "middle",
            "inflating all before it",
        ),
        timing.ratio(
            f"read all images of a gzip tar of {tar_gb} in row order", taken, "gzip", "the plain tar", **items
        ),
    ]


def measure() -> list[timing.Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        root, plain_dir = Path(folder) / "root", Path(folder) / "plain"
        cfg = config.load(None, [f"paths.root={root}"])
        paths = cfg.paths
        for place in (paths.raw_dir, plain_dir):
            place.mkdir(parents=True)
        plain, packed = plain_dir / "0088.tar", paths.raw_dir / "0088.tar"
        street_tar.write(plain, IMAGES)
        write_gzip(plain, packed)
        command = [sys.executable, __file__, "--process", str(root)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        taken_mb = json.loads(done.stdout.splitlines()[-1])
        rows = parquet.read(paths.intermediates_dir / "0088.parquet", ["tar_file", "image_offset", "image_size"])
        assert rows.num_rows == IMAGES
        tar_bytes = packed.stat().st_size
        tar_gb = f"{tar_bytes / 1e9:.1f} GB"
        ratios = measure_reading(paths, plain_dir, rows, tar_gb)
        share = tar_images.index_of(paths.intermediates_dir, packed).stat().st_size / tar_bytes
    mb = allowed_mb(tar_bytes, cfg.infrastructure.threads)
    return [
        *ratios,
        allowance(
            f"index of a gzip tar of {tar_gb}",
            f"{100 * INDEX_SHARE:g} % of the tar",
            100 * share,
            "%",
            100 * INDEX_SHARE,
        ),
        allowance(
            f"memory of process_tar, gzip tar of {tar_gb}, {IMAGES:,} images",
            f"{mb:.0f} MB by its docstring",
            taken_mb,
            "MB",
            mb,
        ),
    ]


def allowance(what: str, name: str, taken: float, unit: str, most: float) -> timing.Ratio:
    return timing.Ratio(what, name, taken, unit, *3 * [most / taken], 1)


if __name__ == "__main__":
    if "--process" in sys.argv:
        process(Path(sys.argv[2]))
    else:
        timing.main(__doc__, measure)
