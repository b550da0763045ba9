"""process_tar on one tar of 640 x 640 JPEGs with labels, plain and as a gzip stream: against the way that extracts
the tar to disk and decodes every pixel with PIL, on one core; against decoding alone, the same bytes already in
memory, on all cores; and the gzip stream against the plain tar, on one core and on all.

Command  python tests/benchmarks/bench_process_tar.py
"""

import os
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
import street_tar
import timing  # puts the repository's root on sys.path
from damaged_tars import write_gzip
from PIL import Image

from common import provenance, stages
from common.imagery import tar_images
from preprocess.tars import tar_files
from preprocess.tars.labels import parse_label

IMAGES = 6_000  # the dataset's tars hold some ten thousands: what a tar costs by itself must not show
BATCH = 32


def process(tar: Path, folder: Path, threads: int) -> None:
    """What process_tar.py does with one tar, without the start of Python."""
    made = provenance.record("process_tar", {}, stages.ids([tar]))
    files = tar_files.read(tar, threads, on_images=lambda count, at: None)
    pairs = tar_files.pair(files, tar_files.dataset_of(tar, files))
    counts = tar_files.account(tar, files, pairs)
    assert counts["images"] == IMAGES
    tar_files.write_rejects(folder / "rejects.parquet", pairs, made, counts)
    tar_images.write_restart_points(folder / "index.parquet", files.restart_points, made)
    tar_files.write_intermediates(folder / "rows.parquet", pairs, tar.name, made, counts, files.damages)


def extract_and_load(tar: Path) -> int:
    """The other way: everything to disk, then each image with its label from there."""
    valid = 0
    with tempfile.TemporaryDirectory(dir=tar.parent) as folder:
        with tarfile.open(tar) as file:
            file.extractall(folder, filter="data")
        for path in sorted(Path(folder).rglob("*.jpg")):
            with Image.open(path) as image:
                image.load()
            parse_label(path.with_suffix(".txt").read_bytes())
            valid += 1
    assert valid == IMAGES
    return valid


def decode_all(jpegs: list[bytes], threads: int) -> None:
    def decode(batch: list[bytes]) -> None:
        for content in batch:
            simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, strict=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [jpegs[i : i + BATCH] for i in range(0, len(jpegs), BATCH)]))


def measure() -> list[timing.Ratio]:
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, packed = folder / "0088.tar", folder / "0089" / "0088.tar"
        packed.parent.mkdir()
        street_tar.write(plain, IMAGES)
        write_gzip(plain, packed)
        try:
            os.sched_setaffinity(0, {min(cores)})
            ways = {
                "gzip": lambda: process(packed, folder, 1),
                "the plain tar": lambda: process(plain, folder, 1),
                "extract + PIL": lambda: extract_and_load(plain),
                "extract gzip + PIL": lambda: extract_and_load(packed),
            }
            one = timing.seconds(ways, rounds=3)
        finally:
            os.sched_setaffinity(0, cores)
        jpegs = street_tar.jpegs_of(plain)
        ways = {
            "gzip": lambda: process(packed, folder, len(cores)),
            "the plain tar": lambda: process(plain, folder, len(cores)),
            "decoding alone": lambda: decode_all(jpegs, len(cores)),
        }
        both = timing.seconds(ways, rounds=7)
    what, many = f"{IMAGES:,} JPEGs of 640 x 640", f"{len(cores)} cores"
    rows = [  # full_dataset.py reckons with the first
        ("process_tar on gzip", "one core", one, "gzip", "extract gzip + PIL", None),
        ("process_tar on gzip", "one core", one, "gzip", "the plain tar", None),
        ("process_tar on gzip", many, both, "gzip", "the plain tar", 0.7),
        ("process_tar", "one core", one, "the plain tar", "extract + PIL", 4),
        ("process_tar", many, both, "the plain tar", "decoding alone", 0.9),
    ]
    return [
        timing.ratio(f"{script}, {what}, {where}", *compared, items=IMAGES, unit="images/s", target=target)
        for script, where, *compared, target in rows
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
