"""process_tar.py on a thousand tars with random damage.

Oracles: the undamaged tar as tarfile sees it, zlib byte by byte, xxh3-64 of what is read back, and simplejpeg's
strict decoder at full scale.
"""

import contextlib
import functools
import io
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg
import xxhash
from damaged_tars import MARGIN_BYTES, Member, inflated, members_of
from synthetic import write_dataset

from common import parquet
from common.archives import gzip_streams
from common.cli import exit_code_of
from common.imagery import tar_images
from preprocess import process_tar

TARS = 500  # of each form
TARS_AT_ONCE = 50
FORMS = ("plain", "gzip")


class Mutation(NamedTuple):
    """A damaged content; instead of the bytes start..end of the old one it has `new`."""

    content: bytes
    start: int
    end: int
    new: bytes


def mutated(old: bytes, rng: random.Random) -> Mutation:
    """One bit flipped, or a span cut off, zeroed, copied from elsewhere over or into it, inserted, or removed."""
    start = rng.randrange(len(old))
    size = min(rng.choice([1, 3, 40, 512, 1024, rng.randrange(2, 9_000)]), len(old) - start)
    source = rng.randrange(len(old) - size + 1)
    length, new = {
        "flip": (1, bytes([old[start] ^ 1 << rng.randrange(8)])),
        "cut": (len(old) - start, b""),
        "zero": (size, bytes(size)),
        "copy over": (size, old[source : source + size]),
        "copy into": (0, old[source : source + size]),
        "insert": (0, rng.randbytes(size)),
        "remove": (size, b""),
    }[rng.choice(["flip", "cut", "zero", "copy over", "copy into", "insert", "remove"])]
    return Mutation(old[:start] + new + old[start + length :], start, start + length, new)


def pairs_of(tar: bytes) -> dict[str, tuple[Member, Member]]:
    """Image -> itself and its label."""
    members = {member.name: member for member in members_of(tar)}
    return {name: (m, members[name[:-4] + ".txt"]) for name, m in members.items() if name.endswith(".jpg")}


def gzip_of_short_blocks(content: bytes) -> bytes:
    """A stream whose blocks are so short that it has several restart points, small as it is."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31, memLevel=2)
    return deflater.compress(content) + deflater.flush()


class Mutated:
    """500 damaged tars of one form, and what process_tar.py made of them."""

    def __init__(self, root: Path, whole: bytes, form: str):
        self.root, self.whole, self.form, self.pairs = root, whole, form, pairs_of(whole)
        rng = random.Random(form)
        original = gzip_of_short_blocks(whole) if form == "gzip" else whole
        self.mutations = [mutated(original, rng) for _ in range(TARS)]
        self.codes, self.told = [], io.StringIO()
        for start in range(0, TARS, TARS_AT_ONCE):
            raw = self.raw_dir(start)
            raw.mkdir()
            for number in range(start, start + TARS_AT_ONCE):
                (raw / f"m{number:03d}.tar").write_bytes(self.mutations[number].content)
            settings = [f"paths.root={root}", f"paths.raw_dir={raw}", "data.max_reject_share=1"]
            argv = [word for setting in settings for word in ("--set", setting)]
            with contextlib.redirect_stderr(self.told):
                self.codes.append(exit_code_of(lambda argv=argv: process_tar.main(argv)))

    def raw_dir(self, number: int) -> Path:
        return self.root / f"raw{number // TARS_AT_ONCE}"

    def used(self, number: int) -> list[dict]:
        """The rows that process_tar.py has written of a tar."""
        path = self.root / f"data/intermediates/m{number:03d}.parquet"
        return parquet.read(path).to_pylist() if path.exists() else []

    @functools.lru_cache(None)  # noqa: B019 - as long as the tests
    def damaged_span(self, number: int) -> tuple[int, int]:
        """The bytes first..last of the undamaged tar that the mutation concerns; in gzip all from the first on."""
        mutation = self.mutations[number]
        if self.form == "plain":
            return mutation.start, mutation.end
        broken, whole = (np.frombuffer(content, np.uint8) for content in (inflated(mutation.content), self.whole))
        shorter = min(len(broken), len(whole))
        differ = np.flatnonzero(broken[:shorter] != whole[:shorter])
        return int(differ[0]) if len(differ) else shorter, len(whole)

    def pairs_where(self, holds: Callable[[Member], bool]) -> set[str]:
        """The images for which something holds, and for their labels."""
        return {name for name, pair in self.pairs.items() if all(map(holds, pair))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    write_dataset(out, streets=1, cities=1, image_px=48, facades_per_street=6, compress=False)
    return (out / "0088.tar").read_bytes()


@pytest.fixture(scope="module")
def results(whole, tmp_path_factory) -> dict[str, Mutated]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip_streams, "SPACING_BYTES", 5_000)
        patch.setattr(gzip_streams, "READ_BYTES", 5_000)
        patch.setattr(gzip_streams, "_SEARCHED_BYTES", 4_000)
        patch.setattr(os, "fsync", lambda descriptor: None)  # three times a tar
        return {form: Mutated(tmp_path_factory.mktemp(form), whole, form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_no_damage_is_a_bug_or_loses_count(form, results):
    assert set(results[form].codes) <= {0, 1}  # a traceback would have ended the fixture
    assert "a bug" not in results[form].told.getvalue()
    for number in range(TARS):
        made = parquet.read_provenance(
            results[form].root / f"data/intermediates_rejects/m{number:03d}.parquet"
        ).rows
        assert made["members"] == made["images"] + made["labels"] + made["rejects"] + made["other"]
        assert made["images"] == made["labels"] == len(results[form].used(number))
        assert made["rejects"] == sum(made["rejected"].values())


@pytest.mark.parametrize("form", FORMS)
def test_every_image_that_is_used_decodes_and_has_the_bytes_that_its_hash_says(form, results):
    count, folder = 0, results[form].root / "data/intermediates"
    for number in range(TARS):
        rows = results[form].used(number)
        store = tar_images.TarImages(results[form].raw_dir(number), folder)
        for row in reversed(rows):  # backwards: of a gzip stream, each from a restart point
            [content] = store.tar(row["tar_file"]).read([row["image_offset"]], [row["image_size"]])
            assert xxhash.xxh3_64_intdigest(content) == row["content_hash"]
            pixels = simplejpeg.decode_jpeg(content, strict=True)
            assert pixels.shape[:2] == (row["height"], row["width"])
            count += 1
    assert count > TARS * len(results[form].pairs) * 0.4
    num_points = [
        parquet.num_rows(path) for path in (results[form].root / "data/intermediates_index").glob("*.parquet")
    ]
    assert (np.mean(num_points) > 2) if form == "gzip" else not num_points


@pytest.mark.parametrize("form", FORMS)
def test_images_that_are_used_are_those_of_the_undamaged_tar(form, results, whole):
    """Each has the size that it had, and but for the damage itself, which no decoder need notice, its bytes.

    Of the names only what stands behind the folder: with a 0 in the padding, a header's first 0 is not missed.
    """
    by_name = {Path(name).name: image for name, (image, _) in results[form].pairs.items()}
    for number, mutation in enumerate(results[form].mutations):
        first, last = results[form].damaged_span(number)
        rows = results[form].used(number)
        assert len({row["image_path"] for row in rows}) == len(rows)
        for row in rows:
            image = by_name[Path(row["image_path"]).name]
            end = image.data + image.size
            assert row["image_size"] == image.size
            if row["content_hash"] != xxhash.xxh3_64_intdigest(whole[image.data : end]):
                assert image.data < last, mutation
                assert first < end, mutation


def test_images_of_plain_tars_that_lie_outside_of_the_damage_are_used(results):
    outside = used = 0
    for number in range(TARS):
        first, last = results["plain"].damaged_span(number)
        names = results["plain"].pairs_where(lambda m, a=first, b=last: m.data + m.size <= a or m.header >= b)
        outside += len(names)
        used += len(names & {row["image_path"] for row in results["plain"].used(number)})
    assert outside > TARS * 15
    assert used >= 0.95 * outside


def test_images_of_gzip_tars_that_zlib_inflates_before_the_damage_are_used(results):
    before = used = 0
    for number in range(TARS):
        first, _ = results["gzip"].damaged_span(number)
        names = results["gzip"].pairs_where(lambda m, end=first - MARGIN_BYTES: m.data + m.size <= end)
        before += len(names)
        used += len(names & {row["image_path"] for row in results["gzip"].used(number)})
    assert before > TARS * 10
    assert used >= 0.95 * before
