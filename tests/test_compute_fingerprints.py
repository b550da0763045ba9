"""preprocess/compute_fingerprints.py. Oracle: the library imagehash, on PIL's full decode."""

import io
import shutil
import time

import imagehash
import numpy as np
import pytest
from PIL import Image
from synthetic import write_dataset

from common import cli, config, parquet
from common.archives import tars
from common.cli import exit_code_of
from common.errors import StaleArtefact
from preprocess import compute_fingerprints, process_tar
from preprocess.duplicates import fingerprints


def flags(root, *settings):
    every = [f"paths.root={root}", "infrastructure.workers=2", *settings]
    return [word for setting in every for word in ("--set", setting)]


def as_number(found: imagehash.ImageHash) -> int:
    return int(str(found), 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    write_dataset(root / "data/raw", streets=2, cities=2, image_px=640, facades_per_street=3)
    process_tar.main(flags(root))
    return root


@pytest.fixture(scope="module")
def images(root):
    members = [
        member for tar in tars.of_shard(root / "data/raw", 0, 1) for member in tars.walk(tar, contents=True)
    ]
    return [member.content for member in members if member.name.endswith(".jpg")]


@pytest.fixture(scope="module")
def expected(images):
    pictures = [Image.open(io.BytesIO(content)) for content in images]
    phash = [as_number(imagehash.phash(picture)) for picture in pictures]
    return np.array(phash, np.uint64), np.array([as_number(imagehash.dhash(p)) for p in pictures], np.uint64)


def bits_apart(a, b):
    return np.array([bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True)])


def test_dhash_of_a_ramp_is_all_ones():
    ramp = np.tile(np.arange(9, dtype=np.uint8), (1, 8, 1))
    assert fingerprints.dhash_bits(ramp).tolist() == [2**64 - 1]
    assert fingerprints.dhash_bits(ramp[:, :, ::-1]).tolist() == [0]
    ramp[0, 0, :2] = 1, 0  # only the first comparison fails: the highest bit
    assert fingerprints.dhash_bits(ramp).tolist() == [2**63 - 1]


def test_exact_is_imagehash_bit_for_bit(images, expected):
    phash, dhash = fingerprints.hash_images(images, "exact")
    assert np.array_equal(phash, expected[0])
    assert np.array_equal(dhash, expected[1])


def test_fast_is_within_3_bits_and_mostly_the_same(images, expected):
    assert len(images) > 40
    for found, right in zip(fingerprints.hash_images(images, "fast"), expected, strict=True):
        assert bits_apart(found, right).max() <= 3  # decoding at 1/4 scale: 4, in a level sky
        assert np.mean(found == right) >= 0.8  # at 1/2 scale: 0.77 of the dHashes


@pytest.mark.parametrize(("size", "shorter"), [(640, 32), (640, 9), (433, 8), (7, 32), (32, 32)])
def test_the_weights_are_those_of_pils_filter(size, shorter):
    line = np.random.default_rng(size).integers(0, 255, (1, size), np.uint8)
    expected = np.asarray(Image.fromarray(line).resize((shorter, 1), Image.Resampling.LANCZOS))
    found = np.clip(line @ fingerprints._weights(size, shorter), 0, 255)
    assert np.abs(found - expected).max() <= 0.51  # PIL's are rounded


def test_runs_of_four_are_added_up():
    grey = np.random.default_rng(0).integers(0, 256, (5, 24), np.uint8)
    assert np.array_equal(fingerprints._sums_of_runs(grey), grey.reshape(5, 6, 4).sum(axis=2))
    level = np.random.default_rng(1).integers(0, 256, (5, 160), np.uint8).repeat(4, axis=1)  # within each run
    expected = level @ fingerprints._weights(640, 32, 9)
    found = fingerprints._sums_of_runs(level) @ fingerprints._weights_of_runs(640)
    assert np.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 48), (7, 300), (641, 433), (516, 300)])
def test_any_size_is_hashed(size):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    exact = fingerprints.hash_images([buffer.getvalue()], "exact")
    assert int(exact[0][0]) == as_number(imagehash.phash(Image.open(buffer)))
    fast = fingerprints.hash_images([buffer.getvalue()], "fast")
    assert max(bits_apart(a, b)[0] for a, b in zip(exact, fast, strict=True)) <= 3


def test_no_images_have_no_hashes():
    assert [len(hashes) for hashes in fingerprints.hash_images([], "fast")] == [0, 0]


def test_the_command_hashes_every_image_in_order(root, images, expected, capsys):
    assert compute_fingerprints.main(flags(root, "data.fingerprint=exact")) == 0
    paths = config.load(None, [f"paths.root={root}"]).paths
    tables = [parquet.read(path).to_pandas() for path in sorted(paths.fingerprints_dir.glob("*.parquet"))]
    assert np.array_equal(np.concatenate([table["phash"] for table in tables]), expected[0])
    assert np.array_equal(np.concatenate([table["dhash"] for table in tables]), expected[1])
    source = parquet.read(paths.intermediates_dir / "0088.parquet").to_pandas()
    assert (tables[0]["streetview_image_id"] == source["streetview_image_id"]).all()
    assert (tables[0]["building_id"] == source["building_id"]).all()

    assert compute_fingerprints.main(flags(root, "data.fingerprint=exact")) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(StaleArtefact, match=r'data\.fingerprint = "exact" \(now "fast"'):
        compute_fingerprints.main(flags(root))


def test_a_signal_stops_it_within_a_tar_and_nothing_is_left(root, monkeypatch, tmp_path, capsys):
    real, calls = fingerprints.hash_images, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) > 2:
            time.sleep(0.5)  # the first ones are written meanwhile, and the signal is seen
        monkeypatch.setattr(cli, "_stop_signal", 15)  # the signal comes while the first images are hashed
        return real(*arguments)

    monkeypatch.setattr(fingerprints, "CHUNK", 1)
    monkeypatch.setattr(fingerprints, "hash_images", counted)
    folder = tmp_path / "fingerprints"
    options = flags(root, f"paths.fingerprints_dir={folder}")
    assert cli.exit_code_of(lambda: compute_fingerprints.main(options)) == cli.EXIT_STOPPED
    assert len(calls) < 10  # of some twenty images of the first tar; the queue is not worked off
    assert list(folder.iterdir()) == []


def test_a_tar_with_other_bytes_fails_alone(root, tmp_path, capsys):
    shutil.copytree(root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("fingerprints"))
    tar = tmp_path / "data/raw/0088.tar"
    raw = bytearray(tar.read_bytes())
    raw[len(raw) // 2] ^= 1
    tar.write_bytes(raw)
    assert exit_code_of(lambda: compute_fingerprints.main(flags(tmp_path))) == 1
    assert "0088.tar has other images than when process_tar.py read it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data/fingerprints").iterdir()] == ["0089-0.parquet"]


def test_without_intermediates_the_stage_to_run_is_named(tmp_path, capsys):
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/0088.tar").touch()
    assert exit_code_of(lambda: compute_fingerprints.main(flags(tmp_path))) == 1
    assert "process_tar.py" in capsys.readouterr().err
