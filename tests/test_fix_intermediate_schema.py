"""preprocess/fix_intermediate_schema.py. Oracle: the file as process_tar.py wrote it, before it was disfigured."""

import shutil
import signal
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from synthetic import write_dataset

from common import parquet, schemas
from common.cli import exit_code_of
from preprocess import fix_intermediate_schema, process_tar
from preprocess.tars.schema_fixes import Unfixable, fix


def run(root, *flags):
    return fix_intermediate_schema.main(["--set", f"paths.root={root}", *flags])


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    root = tmp_path_factory.mktemp("processed")
    write_dataset(root / "data/raw", streets=2, cities=2, image_px=64, facades_per_street=2)
    process_tar.main(["--set", f"paths.root={root}"])
    return root


@pytest.fixture
def root(processed, tmp_path):
    return shutil.copytree(processed, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def right(root):
    return parquet.read(root / "data/intermediates/0088.parquet")


def replaced(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


def disfigured():
    """How another writer may have written the table: (name, function)."""
    return {
        "wide": lambda t: replaced(t, "width", t["width"].cast(pa.int64())),
        "narrow": lambda t: replaced(t, "image_size", t["image_size"].cast(pa.int32())),
        "double": lambda t: replaced(t, "distance", t["distance"].cast(pa.float64())),
        "large string": lambda t: replaced(t, "image_path", t["image_path"].cast(pa.large_string())),
        "dictionary": lambda t: replaced(t, "tar_file", t["tar_file"].dictionary_encode()),
        "signed hash": lambda t: replaced(
            t, "content_hash", pa.array(t["content_hash"].to_numpy().astype("int64"), pa.int64())
        ),
        "order": lambda t: t.select(t.column_names[::-1]),
        "extra": lambda t: t.append_column("season", pa.array(["spring"] * t.num_rows)),
        "without texts": lambda t: t.drop_columns(["building_id", "streetview_image_id", "tar_file"]),
        "without dataset": lambda t: t.drop_columns(["dataset_id", "building_id", "streetview_image_id"]),
        "pandas": lambda t: pa.Table.from_pandas(t.to_pandas().set_index("patch_id").reset_index()),
    }  # fmt: skip


@pytest.mark.parametrize("name", disfigured())
def test_what_another_writer_did_is_undone(right, name):
    fixed, changes = fix(disfigured()[name](right), "0088")
    assert fixed.equals(right)
    assert fixed.schema.equals(schemas.INTERMEDIATES, check_metadata=True)
    assert changes
    assert fix(fixed, "0088") == (fixed, [])  # nothing is left to do


def test_all_at_once(right):
    table = right
    for name in ("wide", "large string", "without texts", "signed hash", "extra", "order"):
        table = disfigured()[name](table)
    assert fix(table, "0088")[0].equals(right)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t.drop_columns("image_offset"), "lacks image_offset"),
        (lambda t: replaced(t, "width", pa.array([None] + [5] * (len(t) - 1))), "1 rows without width"),
        (lambda t: replaced(t, "heading", pa.array(["north"] * t.num_rows)), "heading as string"),
        (lambda t: replaced(t, "width", pa.array([2**40] * t.num_rows)), "width as int64"),
        (lambda t: replaced(t, "content_hash", t["content_hash"].cast("float64", safe=False)), "been rounded"),
        (lambda t: replaced(t, "image_offset", pa.array([2.0**31] * len(t), pa.float32())), "been rounded"),
        (lambda t: replaced(t, "target_lat", t["target_lat"].cast("float32")), "have been rounded"),
        (lambda t: replaced(t, "width", pa.array([True] * t.num_rows)), "width as bool"),
        (lambda t: replaced(t, "width", pa.array([640.5] * t.num_rows)), "width as double"),
        (lambda t: replaced(t, "heading", pa.array([float("nan")] * t.num_rows)), "heading that is not finite"),
        (lambda t: replaced(t, "distance", pa.array([1e300] * t.num_rows)), "distance that is not finite"),
        (lambda t: replaced(t, "aligned", pa.nulls(t.num_rows, pa.int8())), "rows without aligned"),
        (lambda t: replaced(t, "aligned", pa.array([2] * t.num_rows)), "aligned as int64"),
        (lambda t: replaced(t, "width", pa.array([[640]] * t.num_rows)), "width as list"),
        (lambda t: replaced(t, "width", pa.array([{"px": 640}] * t.num_rows)), "width as struct"),
        (lambda t: replaced(t, "roll", pa.array([b"up"] * t.num_rows).dictionary_encode()), "roll as dictionary"),
        (lambda t: replaced(t, "patch_id", pa.array(["9" * 30] * t.num_rows)), "patch_id as string"),
        (lambda t: replaced(t, "building_id", pa.array([f"0088_{n + 1}" for n in t["target_id"].to_pylist()])),
         "building_id 0088_.* in row 0, whose numbers make it 0088_"),
        (lambda t: replaced(t, "building_id", pa.array(["town hall"] * t.num_rows)), "building_id town hall"),
        (lambda t: t.drop_columns("target_id"), "lacks target_id"),
        (lambda t: replaced(t, "building_id", pa.array([f"88_{n}" for n in t["target_id"]])), "building_id 88_"),
        (lambda t: replaced(t, "patch_id", pa.array([7] * t.num_rows)), "streetview_image_id"),
        (lambda t: pa.concat_tables([t, t]), "patch_id .* in 2 rows"),
        (lambda t: t.append_column("width", t["width"]), "width more than once"),
        (lambda t: replaced(t, "tar_file", pa.array(["0089.tar"] * t.num_rows)), "tar_file = 0089.tar"),
        (lambda t: replaced(t.drop_columns(["building_id", "streetview_image_id"]), "dataset_id",
                            pa.array([89] * t.num_rows)), "rows of dataset 89"),
    ],
)  # fmt: skip
def test_what_does_not_follow_from_the_rest_or_contradicts_it_cannot_be_fixed(right, spoil, why):
    with pytest.raises(Unfixable, match=why):
        fix(spoil(right), "0088")


def test_whole_numbers_that_a_float_holds_exactly_are_taken(right):
    table = replaced(right, "image_offset", right["image_offset"].cast("float64"))
    assert fix(table, "0088")[0].equals(right)


def test_a_tar_may_be_named_tar_gz(right):
    table = replaced(right, "tar_file", pa.array(["0088.tar.gz"] * right.num_rows))
    assert fix(table, "0088") == (table, [])


def test_a_file_without_rows_is_fixed(right):
    empty = replaced(right.slice(0, 0), "distance", pa.array([], pa.float64()))
    assert fix(empty, "0088")[0].equals(right.slice(0, 0))


def test_right_files_are_left_alone(root, capsys):
    before = (root / "data/intermediates/0088.parquet").read_bytes()
    assert run(root) == run(root, "--check") == 0
    assert "2 files, 0 changed" in capsys.readouterr().out
    assert (root / "data/intermediates/0088.parquet").read_bytes() == before


def test_a_foreign_file_is_checked_then_fixed_and_then_stands_as_if_ours(root, right, capsys):
    path, rejects = root / "data/intermediates/0088.parquet", root / "data/intermediates_rejects/0088.parquet"
    rejects.unlink()
    frame = right.to_pandas().drop(columns="building_id")
    frame.to_parquet(path)
    foreign = path.read_bytes()
    assert run(root, "--check") == 1
    assert path.read_bytes() == foreign
    assert "adds building_id" in capsys.readouterr().out
    assert run(root) == 0
    assert parquet.read(path).equals(right)
    capsys.readouterr()
    assert run(root, "--check") == 0
    process_tar.main(["--set", f"paths.root={root}"])
    assert (
        "nothing to do" in capsys.readouterr().out
    )  # it is not made again, and its rejects are known to be unknown
    assert parquet.num_rows(rejects) == 0


def test_a_file_of_an_older_version_keeps_its_record(root, right):
    path = root / "data/intermediates/0088.parquet"
    before = parquet.read_provenance(path)
    metadata = {"provenance": before.to_json()}
    pq.write_table(disfigured()["wide"](right).replace_schema_metadata(metadata), path)
    run(root)
    after = parquet.read_provenance(path)
    assert (after.stage, after.inputs, after.rows) == (before.stage, before.inputs, before.rows)
    assert after.id == before.id  # the same rows
    assert after.facts["schema_fixed"] == ["width from int64 to int32"]


def test_a_file_that_cannot_be_fixed_stays_and_is_named_and_the_others_are_fixed(root, right, capsys):
    bad, good = root / "data/intermediates/0088.parquet", root / "data/intermediates/0089.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(bad)
    (root / "data/intermediates/0090.parquet").write_bytes(b"PAR1 not really")
    parquet.read(good).to_pandas().to_parquet(good)
    before = bad.read_bytes()
    assert exit_code_of(lambda: run(root)) == 1
    said = capsys.readouterr().err
    assert "0088.parquet lacks" in said
    assert "0090.parquet is damaged" in said
    assert bad.read_bytes() == before
    assert parquet.has_provenance(good)


def test_a_run_killed_before_any_of_its_renames_is_completed_by_the_next(root, right):
    """Killed at each moment when a file appears: the foreign file, or its fixed one, and nothing in between."""
    folder, rejects = root / "data/intermediates", root / "data/intermediates_rejects"
    for path in folder.glob("*.parquet"):
        parquet.read(path).to_pandas().to_parquet(path)
        (rejects / path.name).unlink()
    foreign = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    for renames in range(2 * len(foreign) + 1):  # rejects and rows of each file
        for name, content in foreign.items():
            (folder / name).write_bytes(content)
            (rejects / name).unlink(missing_ok=True)
        code = f"""
import os, signal, sys
sys.path[0] = {str(ROOT)!r}
from preprocess import fix_intermediate_schema
rename, left = os.replace, [{renames}]
def killed(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
os.replace = killed
fix_intermediate_schema.main(["--set", {f"paths.root={root}"!r}])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == (0 if renames == 2 * len(foreign) else -signal.SIGKILL), done.stderr
        for name, content in foreign.items():
            assert (folder / name).read_bytes() == content or parquet.has_provenance(folder / name)
        assert run(root) == run(root, "--check") == 0
        assert parquet.read(folder / "0088.parquet").equals(right)
        assert not list(folder.rglob(".*"))  # no temporary file is left


def test_a_record_of_an_unknown_version_is_told_without_a_traceback(root, right, capsys):
    path = root / "data/intermediates/0088.parquet"
    pq.write_table(right.replace_schema_metadata({"provenance": '{"maker": "somebody"}'}), path)
    assert exit_code_of(lambda: run(root)) == 1
    assert "0088.parquet has a record that this version cannot read" in capsys.readouterr().err


def test_without_files_the_stage_to_run_is_named(tmp_path, capsys):
    assert exit_code_of(lambda: run(tmp_path)) == 1
    assert "process_tar.py" in capsys.readouterr().err
