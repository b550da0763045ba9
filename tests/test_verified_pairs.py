"""common/imagery/verified_pairs.py: the list of pairs and the test set's files. Oracle: what was written."""

import gzip
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import schemas
from common.errors import PipelineError
from common.imagery import verified_pairs

IDS = st.builds("{:04d}-{:07d}".format, st.integers(0, 9999), st.integers(0, 10**9))
ANGLES = st.floats(-360, 360, allow_nan=False)
SPACES = st.sampled_from([" ", "  ", "\t"])
ENDS = st.sampled_from(["\n", "\r\n"])
PAIRS = st.lists(st.tuples(IDS, IDS, st.booleans(), ANGLES, ANGLES), max_size=8)
JUNK = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40)


@settings(deadline=None)  # on a busy machine
@given(PAIRS, SPACES, ENDS)
def test_a_list_is_read_as_it_was_written(pairs, space, end):
    lines = [space.join([a, b, str(int(same)), repr(h), repr(p)]) for a, b, same, h, p in pairs]
    table, malformed = verified_pairs.parse(end.join(lines))
    assert malformed == {}
    assert table.schema.equals(schemas.pairs([]))
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [(number, *pair) for number, pair in enumerate(pairs, 1)]


@settings(deadline=None)  # on a busy machine
@given(PAIRS, JUNK, st.integers(0, 8))
def test_a_line_that_is_no_pair_costs_itself_alone(pairs, junk, at):
    lines = [f"{a} {b} {int(same)} {h!r} {p!r}" for a, b, same, h, p in pairs]
    at = min(at, len(lines))
    lines.insert(at, f"x {junk}")  # no id
    table, malformed = verified_pairs.parse("\n".join(lines))
    assert len(table) == len(pairs)
    assert list(malformed) == [at + 1]


@settings(deadline=None)  # on a busy machine
@given(st.lists(st.one_of(JUNK, st.builds(" ".join, st.lists(IDS, max_size=3)))))
def test_every_line_is_a_pair_or_malformed_or_empty_and_no_id_of_a_pair_is_overlooked(lines):
    text = "\n".join(lines)
    table, malformed = verified_pairs.parse(text)
    filled = [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    assert sorted([*table["line"].to_pylist(), *malformed]) == filled
    assert {*table["first"].to_pylist(), *table["second"].to_pylist()} <= set(verified_pairs.ids_in(text))


@pytest.mark.parametrize(
    "line",
    [
        "0006-1 0006-2 1 5",  # a field is missing
        "0006-1 0006-2 1 5 6 7",
        "0006-1 0006-2 2 5 6",  # no label
        "0006-1 0006 1 5 6",
        "0006-1 0006-2 1 east 6",
        "0006-1 0006-2 1 inf 6",
        "٠٠٠٦-1 0006-2 1 5 6",  # digits, but not these
    ],
)
def test_what_is_no_pair(line):
    table, malformed = verified_pairs.parse(f"{line}\n\n0006-1 0006-2 0 nan 6\n")
    assert malformed == {1: line}
    assert table["line"].to_pylist() == [3]  # an angle may be unknown
    assert np.isnan(table["heading_difference"][0].as_py())


def test_ids_name_dataset_and_patch_and_also_count_in_lines_that_are_no_pairs():
    text = "0006-0087241 0007-12 1 -3.5 -4e-05\n0006-3 and 0006-0000004, -20-5"
    names = verified_pairs.ids_in(text)
    patches = verified_pairs.patches_of(names)
    assert {dataset: of.tolist() for dataset, of in patches.items()} == {6: [3, 4, 87241], 7: [12], 20: [5]}
    dataset, patch = np.array([6, 6, 7, 8]), np.array([87241, 12, 12, 4])
    assert verified_pairs.is_listed(patches, dataset, patch).tolist() == [True, False, True, False]


CONTENT = {f"set/data/0006-{n}_i.jpg": bytes([n]) * (600 + n) for n in range(1, 9)}
CONTENT["set/verTest/verpairs.txt"] = b"0006-1 0006-2 1 0 0\n"


def write(folder, kind):
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if kind == "folder":
        return folder / "set"
    with tarfile.open(folder / "set.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in CONTENT:
            tar.add(folder / name, name)
    if kind == "gzip":
        (folder / "set.tar").write_bytes(gzip.compress((folder / "set.tar").read_bytes()))
    return folder / "set.tar"


@pytest.mark.parametrize("kind", ["folder", "tar", "gzip"])
def test_files_are_read_by_name_from_a_tar_or_a_folder(tmp_path, kind):
    path = write(tmp_path, kind)
    files = verified_pairs.PairFiles(path)
    names = ["0006-5_i.jpg", "0006-77_i.jpg", "0006-3_i.jpg"]
    assert files.read(names) == [CONTENT["set/data/0006-5_i.jpg"], None, CONTENT["set/data/0006-3_i.jpg"]]
    assert sorted(files.places) == sorted(name.rpartition("/")[2] for name in CONTENT)
    assert verified_pairs.listed_in(files) == "0006-1 0006-2 1 0 0\n"
    before = verified_pairs.identity_of(path)
    (tmp_path / "set" / "data" / "0006-3_i.jpg").write_bytes(b"longer" * 500)
    assert (verified_pairs.identity_of(path) == before) == (kind != "folder")


def test_what_a_damaged_tar_still_holds_is_read(tmp_path, caplog):
    path = write(tmp_path, "tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"set/data/0006-6_i.jpg") + 700])
    files = verified_pairs.PairFiles(path)
    assert files.read(["0006-5_i.jpg", "0006-6_i.jpg"]) == [CONTENT["set/data/0006-5_i.jpg"], None]
    assert len(files.damages) == 1
    assert "set.tar is damaged" in caplog.text
    with pytest.raises(
        PipelineError, match=r"set.tar holds no verpairs.txt; it is damaged: only 188 of 606 bytes"
    ):
        verified_pairs.text_of(path)


def test_a_list_is_read_by_itself_or_out_of_the_tar(tmp_path):
    path = write(tmp_path, "gzip")
    (tmp_path / "list.txt").write_bytes(CONTENT["set/verTest/verpairs.txt"])
    assert verified_pairs.text_of(path) == verified_pairs.text_of(tmp_path / "list.txt")


def test_a_test_set_that_is_none_is_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"does not exist\nname the published test_matching.tar"):
        verified_pairs.identity_of(tmp_path / "set.tar")
    with pytest.raises(PipelineError, match="is an empty folder"):
        verified_pairs.identity_of(tmp_path)


def test_an_empty_list_has_the_columns_of_others():
    table, _ = verified_pairs.parse("")
    assert table.schema.equals(schemas.pairs([]))
    assert isinstance(table, pa.Table)
    assert len(table) == 0
