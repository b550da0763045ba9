"""common/parquet.py and provenance.py: what is written comes back, resumes, and says what it was made from."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from common import files, parquet, provenance, schemas, stages
from common.errors import PipelineError, StaleArtefact

SCHEMA = pa.schema([("name", pa.string()), ("vector", schemas.vector(pa.float16(), 3))])
ROWS = {"name": ["a", "b"], "vector": np.array([[1, 2, 3], [4, 5, 6]], np.float16)}


def write(path, rows=ROWS, config=None, inputs=None, schema=SCHEMA):
    made = provenance.record("test_stage", config or {"data.x": 1}, inputs or {})
    with parquet.writer(path, schema, made) as out:
        out.append(rows)
    return made


def test_rows_come_back_and_the_vectors_as_an_array(tmp_path):
    write(tmp_path / "a.parquet")
    table = parquet.read(tmp_path / "a.parquet")
    assert table["name"].to_pylist() == ["a", "b"]
    assert table.schema.field("vector").type == SCHEMA.field("vector").type
    assert np.array_equal(parquet.to_matrix(table["vector"]), ROWS["vector"])
    assert parquet.to_matrix(table["vector"].slice(1))[0].tolist() == [4, 5, 6]  # .values would ignore the slice


def test_an_empty_file_keeps_its_schema(tmp_path):
    write(tmp_path / "a.parquet", {"name": [], "vector": np.empty((0, 3), np.float16)})
    assert parquet.num_rows(tmp_path / "a.parquet") == 0
    assert parquet.to_matrix(parquet.read(tmp_path / "a.parquet")["vector"]).shape == (0, 3)


def test_row_groups_stay_below_the_limit(tmp_path):
    schema = pa.schema([("vector", schemas.vector(pa.float16(), 4096))])
    write(tmp_path / "a.parquet", {"vector": np.ones((40_000, 4096), np.float16)}, schema=schema)
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    assert len(sizes) == 10
    assert max(sizes) <= 1.01 * parquet.MAX_ROW_GROUP_BYTES


def test_the_id_follows_the_rows_and_not_the_clock(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet")
    write(tmp_path / "c.parquet", {**ROWS, "name": ["a", "c"]})
    a, b, c = (parquet.read_provenance(tmp_path / f"{name}.parquet").id for name in "abc")
    assert a == b != c
    assert len(a) == 32


def test_the_footer_tells_stage_settings_inputs_and_counts(tmp_path):
    write(tmp_path / "in.parquet")
    (tmp_path / "0088.tar").write_bytes(b"12345")
    inputs = stages.ids([tmp_path / "in.parquet", tmp_path / "0088.tar"])
    write(tmp_path / "a.parquet", inputs=inputs)
    made = parquet.read_provenance(tmp_path / "a.parquet")
    assert made.inputs == {
        "in.parquet": parquet.read_provenance(tmp_path / "in.parquet").id,
        "0088.tar": provenance.identity(tmp_path / "0088.tar"),
    }
    assert (made.stage, made.config, made.rows) == ("test_stage", {"data.x": 1}, {"out": 2})
    assert made.config_hash
    assert made.versions["pyarrow"] == pa.__version__


def test_a_tar_is_known_by_its_size_and_its_two_ends(tmp_path):
    tar, content = tmp_path / "0088.tar", bytes(300_000)
    known = set()
    for place in (None, 0, 65_535, len(content) - 65_536, len(content) - 1):
        tar.write_bytes(content if place is None else content[:place] + b"x" + content[place + 1 :])
        known.add(provenance.identity(tar))
    assert len(known) == 5
    assert all(identity.startswith("300000 bytes, ") for identity in known)
    tar.write_bytes(content[:-1])
    assert provenance.identity(tar) not in known
    tar.write_bytes(b"short")  # both ends are all of it
    assert provenance.identity(tar).startswith("5 bytes, ")


def test_done_means_that_settings_and_inputs_match(tmp_path):
    path = tmp_path / "a.parquet"
    made = provenance.record("test_stage", {"data.x": 1}, {"t.tar": "5 bytes"})
    assert not parquet.is_done(path, made, "")
    write(path, inputs={"t.tar": "5 bytes"})
    assert parquet.is_done(path, made, "")
    assert not parquet.is_done(path, made, "all")


@pytest.mark.parametrize(
    ("config", "inputs", "expected"),
    [
        ({"data.x": 2}, {}, "data.x = 1 (now 2)"),
        ({"data.x": 1}, {"t.tar": "9 bytes"}, "made from an earlier version of t.tar\nto redo it"),
        ({"data.x": 1}, {"t.tar": "5 bytes", "u.tar": "5 bytes"}, "made without u.tar\nto redo it"),
        ({"data.x": 1}, {}, "also made from t.tar\nto keep it, restore t.tar\n"),
        (
            {"data.x": 2},
            {"t.tar": "5 bytes"},
            "to keep it: python preprocess/mine.py --set data.x=2 --set data.x=1\n",
        ),
        ({"data.x": 1, "data.y": 3}, {}, "data.y = null (now 3)"),
    ],
)
def test_a_stale_file_is_refused_in_words_and_remade_on_request(tmp_path, monkeypatch, config, inputs, expected):
    path = tmp_path / "a.parquet"
    write(path, inputs={"t.tar": "5 bytes"})
    monkeypatch.setattr(sys, "argv", ["preprocess/mine.py", "--set", "data.x=2"])
    wanted = provenance.record("test_stage", config, inputs)
    with pytest.raises(StaleArtefact) as caught:
        parquet.is_done(path, wanted, "")
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "9 bytes" not in str(caught.value)  # an identity tells nobody anything
    assert str(caught.value).endswith("\nto redo it (2 rows): python preprocess/mine.py --set data.x=2 --remake")
    assert not parquet.is_done(path, wanted, "stale")


def test_a_damaged_file_is_named_with_the_command_that_removes_it_and_remade_on_request(tmp_path):
    path = tmp_path / "a b.parquet"
    write(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PipelineError, match=rf"is damaged .*\n.*: rm '{path}'$"):
        parquet.is_done(path, provenance.record("test_stage", {"data.x": 1}, {}), "")
    assert not parquet.is_done(path, provenance.record("test_stage", {"data.x": 1}, {}), "stale")


def test_inputs_that_came_and_went_are_told_by_tar():
    def inputs(*stems, version=1):
        names = [
            f"{kind}/{stem}{end}" for stem in stems for kind, end in (("intermediates", ""), ("embeddings", "-0"))
        ]
        return {f"{name}.parquet": f"id {version}" for name in names}

    many = inputs(*(f"{number:04}" for number in range(10)))
    told = provenance.input_differences(inputs("0000"), many)
    assert told == ["was made from 1 tar; there are 10 now: 0001, 0002, 0003, 0004 and 5 more came"]
    told = provenance.input_differences(inputs("0000", "0001"), inputs("0001", "0002", version=2))
    assert told == [
        "was made from 2 tars; there are 2 now: 0002 came, 0000 went",
        "was made from an earlier version of embeddings/0001-0.parquet, intermediates/0001.parquet",
    ]
    assert provenance.input_differences(many, dict(many)) == []


def test_a_record_says_how_long_its_file_took(tmp_path):
    write(tmp_path / "a.parquet")
    assert parquet.read_provenance(tmp_path / "a.parquet").seconds < 60
    record = provenance.record("s", {}, {}).timed(3600)
    assert 3600 <= record.finished("id", {}).seconds < 3660
    assert "began" not in record.to_dict()


def test_a_failing_block_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyError),
        parquet.writer(tmp_path / "a.parquet", SCHEMA, provenance.record("s", {}, {})) as out,
    ):
        out.append(ROWS)
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, full_disk):
    path = tmp_path / "a.parquet"
    write(path)
    before = path.read_bytes()
    with full_disk(50_000), pytest.raises(OSError, match="File too large") as caught:
        write(path, {"name": ["x"] * 50_000, "vector": np.zeros((50_000, 3), np.float16)})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.parquet"]


@pytest.mark.parametrize("times", [1, 5])  # 12 MB, encoded in the end; and 60 MB, most of them before that
def test_an_error_of_the_disk_while_more_is_encoded_is_told_and_leaves_nothing(times, tmp_path, monkeypatch):
    def broken(_):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    schema = pa.schema([("vector", schemas.vector(pa.float16(), 1_536))])
    with (
        pytest.raises(OSError, match="Input/output error"),
        parquet.writer(tmp_path / "a.parquet", schema, provenance.record("test", {}, {})) as out,
    ):
        for _ in range(times):
            out.append({"vector": np.zeros((4_000, 1_536), np.float16)})
    assert os.listdir(tmp_path) == []


def test_no_more_waits_for_a_slow_disk_than_is_set(tmp_path, monkeypatch):
    most, waiting, write_to = 2**20, [], parquet._HashingFile.write

    def watched(self, data):
        written = write_to(self, data)
        waiting.append(self._size - self._passed_on)
        return written

    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.05))
    monkeypatch.setattr(parquet, "_SYNCED_BYTES", 2**18)
    monkeypatch.setattr(parquet, "_WAITING_BYTES", most)
    monkeypatch.setattr(parquet._HashingFile, "write", watched)
    vectors = np.random.default_rng(0).normal(size=(4_000, 768)).astype(np.float16)
    path, schema = tmp_path / "a.parquet", pa.schema([("vector", schemas.vector(pa.float16(), 768))])
    with parquet.writer(path, schema, provenance.record("test", {}, {})) as out:
        out.append({"vector": vectors})
    assert 0 < max(waiting) <= most < vectors.nbytes  # the disk was behind, and was waited for
    assert (parquet.read_matrix(path, "vector") == vectors).all()


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(PipelineError, match="does not exist"):
        parquet.read_provenance(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(PipelineError, match="not written by this pipeline"):
        parquet.read_provenance(path)
    files.write_bytes(path, path.read_bytes()[:-7])
    with pytest.raises(PipelineError, match="damaged"):
        parquet.read_provenance(path)


def test_batches_are_the_rows_in_order(tmp_path):
    write(tmp_path / "a.parquet", {"name": list("abcde"), "vector": np.zeros((5, 3), np.float16)})
    sizes = [batch["name"].to_pylist() for batch in parquet.batches(tmp_path / "a.parquet", ["name"], size=2)]
    assert sizes == [["a", "b"], ["c", "d"], ["e"]]


def test_a_column_that_is_not_there_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    for reading in (lambda: parquet.read(path, ["a", "b"]), lambda: list(parquet.batches(path, ["b"]))):
        with pytest.raises(
            PipelineError, match=r"foreign.parquet has no column b.*\n.*fix_intermediate_schema.py"
        ):
            reading()


def test_damaged_pages_are_told_by_both_ways_of_reading(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(100_000))}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40_000] = bytes(39_996)
    path.write_bytes(content)
    for reading in (lambda: parquet.read(path), lambda: list(parquet.batches(path))):
        with pytest.raises(PipelineError, match="is damaged"):
            reading()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_disk_is_not_told_as_damage_of_the_file(tmp_path, monkeypatch, number):
    write(tmp_path / "a.parquet")

    def fails(*_, **__):
        raise OSError(number, "as Arrow raises it")

    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(OSError, match="as Arrow raises it"):  # "delete it" would be the wrong advice
        parquet.read(tmp_path / "a.parquet")


def test_the_footer_is_read_once_for_a_matrix_of_many_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100)
    schema = pa.schema([("vector", schemas.vector(pa.float32(), 8))])
    write(tmp_path / "a.parquet", {"vector": np.ones((50, 8), np.float32)}, schema=schema)
    real, footers = pq.ParquetFile, []

    def opened(*arguments, metadata=None, **options):
        footers.append(metadata)
        return real(*arguments, metadata=metadata, **options)

    monkeypatch.setattr(pq, "ParquetFile", opened)
    assert parquet.read_matrix(tmp_path / "a.parquet", "vector").shape == (50, 8)
    assert len(footers) > 10
    assert footers.count(None) == 1  # parsing all of it for each group is quadratic


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_matrix_of_many_row_groups_is_read_in_order_and_what_is_not_finite_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 4_000)
    monkeypatch.setattr(parquet, "_CACHED_BYTES", 300)  # some batches for each group
    schema = pa.schema([("vector", schemas.vector(pa.from_numpy_dtype(kind), 8))])
    matrix = np.random.default_rng(0).normal(size=(1_000, 8)).astype(kind)
    matrix[5] = min(float(np.finfo(kind).max), parquet.LARGEST)
    matrix[700] = -matrix[5]
    write(tmp_path / "a.parquet", {"vector": matrix}, schema=schema)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups > 3
    assert np.array_equal(parquet.read_matrix(tmp_path / "a.parquet", "vector"), matrix)
    too_large = (-2 * parquet.LARGEST,) if kind is np.float32 else ()
    for value in (np.nan, -np.float64(np.nan), np.inf, -np.inf, *too_large):
        matrix[777, 3] = value
        write(tmp_path / "a.parquet", {"vector": matrix}, schema=schema)
        with pytest.raises(PipelineError, match=r"a\.parquet: vector of row 777 holds NaN, infinity"):
            parquet.read_matrix(tmp_path / "a.parquet", "vector")


def test_records_of_older_versions_are_read_by_todays_names_of_settings():
    older = provenance.record("evaluate", {"training.gallery": "test", "training.run": "default"}, {})
    todays = {"evaluation.gallery": "test", "training.run": "default"}
    assert not provenance.differences(older, provenance.record("evaluate", todays, {}))
    other = provenance.record("evaluate", todays | {"evaluation.gallery": "all"}, {})
    assert provenance.differences(older, other) == ['was made with evaluation.gallery = "test" (now "all")']
    older = provenance.record("train", {"training.sampler": "ucb"}, {})  # before there was training.mining
    for mining, same in (("none", True), ("semi_hard", False)):
        now = provenance.record("train", {"training.sampler": "ucb", "training.mining": mining}, {})
        assert (provenance.differences(older, now) == []) == same


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_the_commit_is_recorded_in_a_colleagues_checkout(tmp_path):
    """git refuses a repository of another owner, unless it is told that this one is safe."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "common", checkout / "common", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", checkout, "-c", f"safe.directory={checkout}", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for path in (checkout, checkout / ".git"):
        os.chown(path, 65534, 65534)
    code = "from common import provenance; print(provenance.record('a', {}, {}).finished('', {}).git_commit)"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert told.stdout.strip() == head, told.stderr


@pytest.mark.parametrize("change", [{"a_field_of_another_version": 1}, {"seconds": None, "versions": None}])
def test_records_of_other_versions_are_read_as_far_as_they_are_known(change):
    made = provenance.record("train", {"training.run": "a"}, {"x": "y"}).finished("id", {"out": 1}).to_dict()
    changed = {name: value for name, value in (made | change).items() if value is not None}
    read = provenance.Provenance.from_dict(changed)
    assert (read.stage, read.config, read.inputs, read.id) == ("train", {"training.run": "a"}, {"x": "y"}, "id")


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"stage": "train"}', '{"config": [], "inputs": {}}'])
def test_what_is_no_record_is_refused(content):
    with pytest.raises(ValueError, match="not the record of a file"):
        provenance.Provenance.from_json(content)
