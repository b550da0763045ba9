"""process_tar, fingerprints and generation on gzip tars: killed, resumed, divided; a tar or an index changed.

Oracles: an undisturbed run, xxh3-64 of what is read, and counts of the bytes that are read of a tar.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from conftest import ROOT
from damaged_tars import gzipped, inflated, members_of
from local_backbone import write_tiny_backbone
from same_artefacts import assert_same_artefacts
from small_pairs import jpeg
from synthetic import write_dataset

from common import config, files, parquet, provenance, schemas
from common.archives import gzip_streams, tars
from common.cli import exit_code_of
from common.imagery import tar_images
from generate import generate_embeddings
from preprocess import compute_fingerprints, process_tar

ROWS_PER_PART = 6
STAGES = {
    "process_tar": process_tar,
    "compute_fingerprints": compute_fingerprints,
    "generate_embeddings": generate_embeddings,
}
READING_STAGES = [name for name in STAGES if name != "process_tar"]
each_reading_stage = pytest.mark.parametrize("stage", READING_STAGES)


class Place:
    """A folder of three tars, and what the stages have made of them."""

    def __init__(self, root: Path, raw_dir: Path, backbone: Path):
        self.settings = [
            *(f"paths.root={root}", f"paths.raw_dir={raw_dir}", f"data.rows_per_part={ROWS_PER_PART}"),
            *(f"embedding_model.name={backbone}", "infrastructure.embedding_batch_size=4"),
            "infrastructure.workers=2",
        ]
        self.cfg, self.root, self.backbone = config.load(None, self.settings), root, backbone

    @property
    def flags(self) -> list[str]:
        return [word for setting in self.settings for word in ("--set", setting)]

    def run(self, stage: str, *more: str) -> int:
        return exit_code_of(lambda: STAGES[stage].main([*self.flags, *more]))

    def rows(self, stem: str):
        return parquet.read(self.cfg.paths.intermediates_dir / f"{stem}.parquet")

    def index(self, stem: str) -> Path:
        return tar_images.index_of(self.cfg.paths.intermediates_dir, Path(f"{stem}.tar"))

    def made_by(self, stage: str) -> Path:
        paths = self.cfg.paths
        return paths.fingerprints_dir if stage == "compute_fingerprints" else paths.embeddings_dir


@pytest.fixture(scope="module", autouse=True)
def close_points():
    """So that these small streams have several restart points, and are read in many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip_streams, "SPACING_BYTES", 5_000)
        patch.setattr(gzip_streams, "READ_BYTES", 10_000)
        patch.setattr(gzip_streams, "_SEARCHED_BYTES", 8_000)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Place:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "raw", streets=3, cities=3, image_px=96, facades_per_street=6)
    place = Place(folder / "run", folder / "raw", write_tiny_backbone(folder / "tiny", "dinov2"))
    for stage in STAGES:
        assert place.run(stage) == 0
    for stem in ("0088", "0089", "0090"):
        assert parquet.num_rows(place.index(stem)) >= 2
        assert len(place.rows(stem)) > 3 * ROWS_PER_PART
    return place


@pytest.fixture
def copy(finished, tmp_path) -> Place:
    """The same tars and what process_tar has made of them, to be changed."""
    shutil.copytree(finished.cfg.paths.raw_dir, tmp_path / "raw")
    for folder in finished.root.glob("data/intermediates*"):
        shutil.copytree(folder, tmp_path / "run/data" / folder.name)
    return Place(tmp_path / "run", tmp_path / "raw", finished.backbone)


# ---------------------------------------------------------------------------------------------------------- killed

RUN_AND_KILL = """
import importlib, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder, flags = Path(sys.argv[2]), sys.argv[3:]
import imagehash, scipy.fft, threadpoolctl, torch, transformers
from common.archives import gzip_streams
from common.imagery import tar_images
from generate import backbone, embedding_parts, loop  # once, here: each run below is a fork of this process
from preprocess.duplicates import fingerprints
from preprocess.tars import label_geometry, tar_files
gzip_streams.SPACING_BYTES, gzip_streams.READ_BYTES, gzip_streams._SEARCHED_BYTES = 5_000, 10_000, 8_000
rng = random.Random(0)

def started(main):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(flags))
    return child

for stage in ("preprocess.process_tar", "preprocess.compute_fingerprints", "generate.generate_embeddings"):
    main, killed = importlib.import_module(stage).main, 0
    for _ in range(12):
        files = set(folder.rglob("*"))
        wanted, delay_s = rng.randrange(3), rng.uniform(0, 0.02)
        child = started(main)
        ended = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        while len(set(folder.rglob("*")) - files) < wanted and not ended():
            time.sleep(0.001)
        time.sleep(delay_s)  # a random moment of reading, computing or writing
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(killed, os.waitpid(started(main), 0)[1])
"""


def test_stages_that_are_killed_many_times_end_with_the_same_files(finished, tmp_path):
    place = Place(tmp_path, finished.cfg.paths.raw_dir, finished.backbone)
    command = [sys.executable, "-c", RUN_AND_KILL, str(ROOT), str(tmp_path), *place.flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [code for _, code in lines] == ["0"] * len(STAGES), done.stderr
    assert all(int(killed) >= 4 for killed, _ in lines), lines  # at work; the other runs had ended by themselves
    assert_same_artefacts(place.root, finished.root, folders=("data",))  # with the rejects and the index


# --------------------------------------------------------------------------------------------------------- divided


def test_more_tasks_than_tars_make_the_same_files_as_one(finished, tmp_path):
    place = Place(tmp_path, finished.cfg.paths.raw_dir, finished.backbone)
    for stage in STAGES:
        for shard in (6, 0, 5, 1, 4, 2, 3):  # in any order
            assert place.run(stage, "--shard", str(shard), "--num-shards", "7") == 0
    assert_same_artefacts(place.root, finished.root, folders=("data",))


# ----------------------------------------------------------------------------------------------- out of the middle


@each_reading_stage
def test_a_part_in_the_middle_is_read_from_a_restart_point_on(stage, finished, copy, monkeypatch):
    assert copy.run(stage) == 0
    target = copy.made_by(stage) / "0088-2.parquet"
    whole = parquet.read(target)
    target.unlink()

    tar = copy.cfg.paths.raw_dir / "0088.tar"
    places, given = [], []
    real_pread, real_inflate = os.pread, gzip_streams.inflate

    def counted(descriptor: int, size: int, at: int) -> bytes:
        content = real_pread(descriptor, size, at)
        if os.fstat(descriptor).st_ino == tar.stat().st_ino and size > tars.BLOCK:  # not a look at what kind it is
            places.append((at, at + len(content)))
        return content

    def measured(*arguments):
        for piece in real_inflate(*arguments):
            given.append(len(piece))
            yield piece

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(gzip_streams, "inflate", measured)
    assert copy.run(stage) == 0
    assert parquet.read(target).equals(whole)

    points = parquet.read(copy.index("0088")).to_pylist()
    rows = copy.rows("0088").slice(2 * ROWS_PER_PART, ROWS_PER_PART).to_pylist()
    first, end = rows[0]["image_offset"], rows[-1]["image_offset"] + rows[-1]["image_size"]
    point = max((p for p in points if p["offset"] <= first), key=lambda p: p["offset"])
    assert point["offset"] > 0  # else this shows nothing
    assert min(at for at, _ in places) >= point["bit"] // 8
    assert sum(given) < end - point["offset"] + 50_000  # of READ_BYTES that hold labels, too
    assert sum(given) < len(inflated(tar.read_bytes())) * 0.75


# ------------------------------------------------------------------------------------------------- a changed index


def absent(place: Place, monkeypatch) -> None:
    place.index("0088").unlink()


def without_its_folder(place: Place, monkeypatch) -> None:
    shutil.rmtree(place.index("0088").parent)


def cut_off(place: Place, monkeypatch) -> None:
    os.truncate(place.index("0088"), place.index("0088").stat().st_size // 2)


def empty(place: Place, monkeypatch) -> None:
    os.truncate(place.index("0088"), 0)


def another_tars(place: Place, monkeypatch) -> None:
    shutil.copy(place.index("0089"), place.index("0088"))


def older_tars(place: Place, monkeypatch) -> None:
    """Of a tar of that name which was another."""
    points = parquet.read(place.index("0089"))
    made = provenance.record("process_tar", {}, {"0088.tar": "123 bytes, of others"})
    with parquet.writer(place.index("0088"), schemas.RESTART_POINTS, made) as out:
        out.append(points)


def absent_and_read_only(place: Place, monkeypatch) -> None:
    place.index("0088").unlink()

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "atomic", refuse)


def a_file_in_the_place_of_the_folder(place: Place, monkeypatch) -> None:
    folder = place.index("0088").parent
    shutil.rmtree(folder)
    folder.write_text("")


CHANGES = [absent, without_its_folder, cut_off, empty, another_tars, older_tars]
UNWRITABLE = [absent_and_read_only, a_file_in_the_place_of_the_folder]


@pytest.mark.parametrize("change", CHANGES + UNWRITABLE, ids=lambda change: change.__name__)
def test_images_are_read_whatever_has_become_of_the_index(change, copy, monkeypatch):
    rows = copy.rows("0088")
    before = parquet.read(copy.index("0088"))
    with monkeypatch.context() as patch:
        change(copy, patch)
        store = tar_images.of_paths(copy.cfg.paths)
        for order in (range(len(rows)), reversed(range(len(rows)))):
            for row in order:
                [content] = store.read(rows.slice(row, 1))
                assert xxhash.xxh3_64_intdigest(content) == rows["content_hash"][row].as_py()
    if change in CHANGES:  # and it is made again, by whoever reads first
        assert parquet.read(copy.index("0088")).equals(before)
        assert set(parquet.read_provenance(copy.index("0088")).inputs) == {"0088.tar"}


@pytest.mark.parametrize("change", UNWRITABLE, ids=lambda change: change.__name__)
def test_an_index_that_cannot_be_written_is_told_and_made_once(change, copy, monkeypatch, caplog):
    change(copy, monkeypatch)
    store, rows = tar_images.of_paths(copy.cfg.paths), copy.rows("0088")
    for row in range(len(rows)):
        store.read(rows.slice(row, 1))
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{copy.index('0088')} cannot be written" in warning


# --------------------------------------------------------------------------------------------------- a changed tar


def with_other_pictures(tar: bytes) -> bytes:
    """A plain tar with the same members in the same places, but its images are others, of the old ones' sizes."""
    changed = bytearray(tar)
    for number, member in enumerate(m for m in members_of(tar) if m.name.endswith(".jpg")):
        picture = jpeg(number, size=(32, 32))
        comment = member.size - len(picture)
        segment = b"\xff\xfe" + (comment - 2).to_bytes(2, "big") + bytes(comment - 4)
        changed[member.data : member.data + member.size] = picture[:2] + segment + picture[2:]
    return bytes(changed)


@pytest.mark.parametrize("form", ["plain", "gzip"])
@each_reading_stage
def test_a_tar_that_another_of_its_size_has_replaced_is_refused_alone(stage, form, finished, tmp_path, capsys):
    raw, tar = tmp_path / "raw", tmp_path / "raw/0089.tar"
    shutil.copytree(finished.cfg.paths.raw_dir, raw)
    whole = inflated(tar.read_bytes())
    if form == "plain":
        tar.write_bytes(whole)
    right, other = tar.read_bytes(), with_other_pictures(whole)
    if form == "gzip":
        other = gzipped(other)
        other += bytes(len(right) - len(other))  # zeros behind the stream are padding
    assert len(other) == len(right)
    place = Place(tmp_path / "run", raw, finished.backbone)
    assert place.run("process_tar") == 0
    tar.write_bytes(other)
    capsys.readouterr()
    for _ in range(2):  # nothing of it counts as done
        assert place.run(stage) == 1
        told = capsys.readouterr().err
        assert "0089.tar" in told
        assert "process_tar" in told
        assert "0088.tar" not in told
        assert "0090.tar" not in told
        made = {path.name.partition("-")[0] for path in place.made_by(stage).glob("*.parquet")}
        assert made == {"0088", "0090"}
    tar.write_bytes(right)
    assert place.run(stage) == 0
    rows = sum(parquet.num_rows(path) for path in place.made_by(stage).glob("0089-*.parquet"))
    assert rows == len(place.rows("0089"))


@each_reading_stage
def test_one_image_that_is_another_is_refused(stage, copy, capsys, monkeypatch):
    """Plain, so that a byte is a byte, and far from both ends, by which a tar is known."""
    monkeypatch.setattr(provenance, "_PROBED_BYTES", 512)
    tar = copy.cfg.paths.raw_dir / "0089.tar"
    tar.write_bytes(inflated(tar.read_bytes()))
    assert copy.run("process_tar", "--overwrite") == 0
    row = copy.rows("0089").slice(8, 1).to_pylist()[0]
    content = np.frombuffer(tar.read_bytes(), np.uint8).copy()
    content[row["image_offset"] + 100] ^= 1  # of a quantization table: it decodes
    tar.write_bytes(content.tobytes())
    assert copy.run(stage) == 1
    assert "0089.tar" in capsys.readouterr().err
    made = sorted(path.stem for path in copy.made_by(stage).glob("0089-*.parquet"))
    assert "0089-1" not in made
    assert "0089-0" in made
