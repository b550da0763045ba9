"""process_tar on one tar of 640 x 640 JPEGs with labels: against the way that extracts the tar to disk and decodes
every pixel with PIL, both on one core; and against decoding alone, the same bytes already in memory, on all cores.

Command  python tests/benchmarks/bench_process_tar.py
"""

import os
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
import timing  # puts the repository's root on sys.path
from PIL import Image
from synthetic import write_dataset

from common import provenance, tars
from preprocess import tar_files
from preprocess.labels import parse_label

IMAGES = 6_000  # the dataset's tars hold some ten thousands: what a tar costs by itself must not show
BATCH = 32


def write_tar(path: Path) -> list[bytes]:
    """A tar of IMAGES pairs: 60 street views, again and again under other ids. Returns its JPEGs."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), streets=3, cities=1, image_px=640, facades_per_street=4)
        members = tars.walk(next(Path(folder).glob("*.tar")), contents=True)
        found = {member.name: bytes(member.content or b"") for member in members}
    stems = [name[:-4] for name in found if name.endswith(".jpg") and f"{name[:-4]}.txt" in found]
    jpegs = []
    with path.open("wb") as file:
        for n in range(IMAGES):
            stem = stems[n % len(stems)]
            fields = found[f"{stem}.txt"].split(b" ")
            fields[3] = str(n).encode()  # the patch, an image's id
            jpegs.append(bytes(bytearray(found[f"{stem}.jpg"])))  # one of its own, as from a tar
            for suffix, content in (("jpg", jpegs[-1]), ("txt", b" ".join(fields))):
                info = tarfile.TarInfo(f"0088/0088_{n}_1_{n // 4}.{suffix}")
                info.size = len(content)
                file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return jpegs


def process(tar: Path, folder: Path, threads: int) -> None:
    """What process_tar.py does with one tar, without the start of Python."""
    made = provenance.record("process_tar", {}, [tar])
    with tar_files.Readers(threads) as readers:
        files = readers.read(tar, on_images=lambda count, at: None)
    pairs = tar_files.pair(files, tar_files.dataset_of(tar, files))
    counts = tar_files.account(tar, files, pairs)
    assert counts["images"] == IMAGES
    tar_files.write_rejects(folder / "rejects.parquet", pairs, made, counts)
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
        tar = folder / "0088.tar"
        jpegs = write_tar(tar)
        try:
            os.sched_setaffinity(0, {min(cores)})
            ways = {"ours": lambda: process(tar, folder, 1), "extract + PIL": lambda: extract_and_load(tar)}
            alone = timing.seconds(ways, rounds=3)
        finally:
            os.sched_setaffinity(0, cores)
        ways = {
            "ours": lambda: process(tar, folder, len(cores)),
            "decoding alone": lambda: decode_all(jpegs, len(cores)),
        }
        all_cores = timing.seconds(ways, rounds=7)
    what = f"process_tar, {IMAGES:,} JPEGs of 640 x 640"
    items = {"items": IMAGES, "unit": "images/s"}
    return [
        timing.ratio(f"{what}, one core", alone, "ours", "extract + PIL", target=4, **items),
        timing.ratio(f"{what}, {len(cores)} cores", all_cores, "ours", "decoding alone", target=0.9, **items),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
