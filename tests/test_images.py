"""common/imagery/tar_images.py. Oracle: the bytes that were put into the tars."""

import gzip
import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from common import parquet, provenance, schemas, stages
from common.archives import gzip_streams
from common.imagery import tar_images

NAMES = ("tar_file", "image_offset", "image_size", "content_hash")


def contents_of(count, size, seed=0):
    """Bytes that deflate can shorten by a tenth, as it can a JPEG's."""
    rng = np.random.default_rng(seed)
    noise = rng.choice(256, (count, size), p=rng.dirichlet(np.full(256, 2.0))).astype(np.uint8)
    return [row.tobytes() for row in noise]


def write_tar(path, contents, mode="w:gz"):
    """The rows of its images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for number, content in enumerate(contents):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = [(path.name, member.offset_data, member.size) for member in tar]
    hashes = pa.array([xxhash.xxh3_64_intdigest(content) for content in contents], pa.uint64())
    return pa.table([*map(list, zip(*places, strict=True)), hashes], names=NAMES)


@pytest.mark.parametrize("threads", [2, 8, 16])
def test_threads_that_take_chunks_in_turn_inflate_a_gzip_tar_once(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(gzip_streams, "SPACING_BYTES", 100_000)
    monkeypatch.setattr(gzip_streams, "READ_BYTES", 50_000)
    contents = contents_of(1_500, 3_000)
    rows = write_tar(tmp_path / "0088.tar", contents)
    read = tar_images.Tar(tmp_path / "0088.tar", points=[]).reader(rows)
    inflated, real = [], gzip_streams.inflate
    monkeypatch.setattr(gzip_streams, "inflate", lambda *args: (inflated.append(len(p)) or p for p in real(*args)))

    def take(start):
        chunk = read(start, start + 64)
        time.sleep(0.002 * (start // 64 % 3))  # some take longer over theirs
        return chunk

    with ThreadPoolExecutor(threads) as pool:
        chunks = list(pool.map(take, range(0, 1_500, 64)))
    assert [content for chunk in chunks for content in chunk] == contents
    total = len(gzip.decompress((tmp_path / "0088.tar").read_bytes()))
    assert sum(inflated) < 1.2 * total  # reading image by image in turn would inflate it many times over


def test_images_that_are_others_than_their_rows_say_are_refused(tmp_path):
    contents = contents_of(20, 3_000)
    rows = write_tar(tmp_path / "raw/0088.tar", contents, "w")
    store = tar_images.TarImages(tmp_path / "raw", tmp_path / "intermediates")
    assert store.read(rows.take([3, 1, 19])) == [contents[3], contents[1], contents[19]]
    raw = bytearray((tmp_path / "raw/0088.tar").read_bytes())
    raw[rows["image_offset"][3].as_py() + 7] ^= 1
    (tmp_path / "raw/0088.tar").write_bytes(raw)
    assert store.read(rows.take([1, 19])) == [contents[1], contents[19]]
    with pytest.raises(tar_images.ChangedTar, match=r"0088\.tar has other images than"):
        store.read(rows.take([3, 1, 19]))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_not_the_one_of_the_intermediates_is_refused_without_hashes_too(tmp_path, mode):
    tar = tmp_path / "raw/0088.tar"
    rows = write_tar(tar, contents_of(20, 3_000), mode)
    made = provenance.record("process_tar", {}, stages.ids([tar]))
    with parquet.writer(tmp_path / "intermediates/0088.parquet", schemas.INTERMEDIATES, made):
        pass
    places = rows.drop(["content_hash"])
    assert len(tar_images.TarImages(tar.parent, tmp_path / "intermediates").read(places)) == 20
    size = tar.stat().st_size
    write_tar(tar, contents_of(20, 3_000, seed=1), mode)
    with tar.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(tar_images.ChangedTar, match=r"0088\.tar has other images than"):
        tar_images.TarImages(tar.parent, tmp_path / "intermediates").read(places)
