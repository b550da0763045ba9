"""Perceptual hashes of JPEGs: ours on one core against decoding an image in each of three stages, or just once.

Command  python tests/benchmarks/bench_fingerprints.py
"""

import io
import tempfile
from pathlib import Path

import imagehash
import timing  # puts the repository's root on sys.path
from PIL import Image
from synthetic import write_dataset
from threadpoolctl import threadpool_limits

from common.archives import tars
from preprocess.duplicates import fingerprints


def some_jpegs() -> list[bytes]:
    """About 60 street views of 640 x 640 px."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), streets=2, cities=2, image_px=640, facades_per_street=3)
        members = [m for tar in tars.of_shard(Path(folder), 0, 1) for m in tars.walk(tar, contents=True)]
    return [member.content for member in members if member.name.endswith(".jpg")]


def in_three_stages(jpegs: list[bytes]) -> None:
    """Each image is decoded to check it, to hash it and to hash it again."""
    for content in jpegs:
        Image.open(io.BytesIO(content)).load()
        imagehash.phash(Image.open(io.BytesIO(content)))
        imagehash.dhash(Image.open(io.BytesIO(content)))


def decoded_once(jpegs: list[bytes]) -> None:
    """The same hashes from one decoding: what a careful user of the library would write."""
    for content in jpegs:
        picture = Image.open(io.BytesIO(content))
        imagehash.phash(picture)
        imagehash.dhash(picture)


def measure() -> list[timing.Ratio]:
    jpegs = some_jpegs()
    ways = {
        "fast": lambda: fingerprints.hash_images(jpegs, "fast"),
        "PIL + imagehash, 3 stages": lambda: in_three_stages(jpegs),
        "PIL + imagehash": lambda: decoded_once(jpegs),
    }
    with threadpool_limits(1):
        taken = timing.seconds(ways, rounds=7)
    what = "pHash and dHash of 640 x 640 JPEGs, one core"
    return [
        timing.ratio(
            what,
            taken,
            "fast",
            "PIL + imagehash, 3 stages",
            items=len(jpegs),
            unit="images/s",
            target=6,
        ),
        timing.ratio(what, taken, "fast", "PIL + imagehash", items=len(jpegs), unit="images/s"),
    ]


if __name__ == "__main__":
    timing.main(__doc__, measure)
