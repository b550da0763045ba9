"""preprocess/process_tar.py and tar_files.py. Oracle: what the synthetic tars were made of, and small tars."""

import bz2
import errno
import io
import os
import random
import subprocess
import sys
import tarfile
import time

import pytest
import xxhash
from small_pairs import jpeg, label
from synthetic import write_dataset

from common import cli, parquet
from common.cli import exit_code_of
from common.errors import StaleArtefact
from preprocess import process_tar
from preprocess.tars import jpegs, tar_files


def make_tar(path, files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def run(root, *settings, more=()):
    flags = [f"paths.root={root}", "data.max_reject_share=1", "infrastructure.workers=2", *settings]
    return process_tar.main([*(word for flag in flags for word in ("--set", flag)), *more])


def rejects(root, stem="0088"):
    table = parquet.read(root / "data/intermediates_rejects" / f"{stem}.parquet").to_pandas()
    return dict(zip(table["member"], table["reason"], strict=True))


def test_one_pair_becomes_one_row(tmp_path):
    content = jpeg()
    files = [
        ("0088/0088/0088_567_9_1234.txt", label(88, 1234, 567, 9, "a 1 2\n")),
        ("0088_567_9_1234.jpg", content),
    ]
    tar = make_tar(tmp_path / "data/raw/0088.tar", files)  # at different depths, the label first
    assert run(tmp_path) == 0
    [row] = parquet.read(tmp_path / "data/intermediates/0088.parquet").to_pylist()
    assert (row["building_id"], row["streetview_image_id"]) == ("0088_1234", "0088_567")
    assert (row["width"], row["height"], row["aligned"], row["tar_file"]) == (48, 32, True, "0088.tar")
    assert tar.read_bytes()[row["image_offset"] :][: row["image_size"]] == content
    assert row["content_hash"] == xxhash.xxh3_64_intdigest(content)
    assert rejects(tmp_path) == {}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    truth = write_dataset(
        root / "data/raw", streets=6, cities=2, image_px=96, damage=True, facades_per_street=3, seed=3
    )
    run(root)
    return root, truth


def test_every_planted_image_and_reject_is_found(planted):
    root, truth = planted
    for stem, counts in truth.members.items():
        rows = parquet.read(root / f"data/intermediates/{stem}.parquet").to_pandas()
        expected = truth.images[truth.images["tar"] == f"{stem}.tar"]
        assert sorted(rows["image_path"]) == sorted(expected["member"])
        both = rows.merge(expected, left_on="image_path", right_on="member")
        for name in ("target_id_x", "patch_id_x", "street_view_id_x"):
            assert (both[name] == both[name.replace("_x", "_y")]).all()
        bad = truth.rejects[truth.rejects["tar"] == f"{stem}.tar"]
        assert rejects(root, stem) == dict(zip(bad["member"], bad["reason"], strict=True))
        footer = parquet.read_provenance(root / f"data/intermediates/{stem}.parquet").rows
        assert {name: footer[name] for name in counts} == counts
        assert footer["members"] == sum(counts.values())
        assert rows["image_offset"].is_monotonic_increasing


def test_synthetic_labels_agree_with_their_positions(planted):
    root, truth = planted
    for stem in truth.members:
        rows = parquet.num_rows(root / f"data/intermediates/{stem}.parquet")
        facts = parquet.read_provenance(root / f"data/intermediates/{stem}.parquet").facts
        assert facts["disagreements"] == {"labels": rows, "heading": 0, "pitch": 0, "distance": 0}


def test_a_second_run_does_nothing_and_a_changed_tar_is_refused(planted, tmp_path, capsys):
    root, _ = planted
    assert run(root) == 0
    assert "nothing to do, 2 tars" in capsys.readouterr().out
    files = [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label())]
    make_tar(tmp_path / "data/raw/0088.tar", files)
    run(tmp_path)
    make_tar(tmp_path / "data/raw/0088.tar", [*files, ("README", b"x" * 20_000)])
    with pytest.raises(StaleArtefact, match=r"0088\.tar"):
        run(tmp_path)


def test_without_its_rejects_a_tar_is_not_done(planted):
    root, _ = planted
    target, other = root / "data/intermediates/0088.parquet", root / "data/intermediates_rejects/0088.parquet"
    before = parquet.read_provenance(target).id, parquet.read_provenance(other).id
    other.unlink()
    run(root)
    assert (parquet.read_provenance(target).id, parquet.read_provenance(other).id) == before


def test_too_many_rejects_fail_the_stage_but_not_the_other_tars(tmp_path, capsys):
    make_tar(tmp_path / "data/raw/0087.tar", [("87_1_1_1.jpg", jpeg()), ("87_1_1_1.txt", b"")])
    make_tar(tmp_path / "data/raw/0088.tar", [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label())])
    assert exit_code_of(lambda: run(tmp_path, "data.max_reject_share=0.5")) == 1
    said = capsys.readouterr().err
    assert "0087.tar: 100.0%" in said
    assert "(label_empty 1), more than 50.0%" in said  # not that its image was rejected with it
    assert not (tmp_path / "data/intermediates/0087.parquet").exists()
    assert rejects(tmp_path, "0087")["87_1_1_1.txt"] == "label_empty"
    assert parquet.num_rows(tmp_path / "data/intermediates/0088.parquet") == 1


def test_a_tar_that_fails_when_made_again_leaves_no_old_rows_that_would_count_as_done(tmp_path):
    files = [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label()), ("88_2_1_1.jpg", jpeg()), ("88_2_1_1.txt", b"")]
    make_tar(tmp_path / "data/raw/0088.tar", files)
    run(tmp_path)  # allows every share
    assert exit_code_of(lambda: run(tmp_path, "data.max_reject_share=0.4", more=["--overwrite"])) == 1
    assert exit_code_of(lambda: run(tmp_path, "data.max_reject_share=0.4")) == 1


def test_a_new_tar_that_fails_leaves_the_rows_of_the_former_one_which_do_not_count_as_its_own(tmp_path):
    make_tar(tmp_path / "data/raw/0088.tar", [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label())])
    run(tmp_path)
    target = tmp_path / "data/intermediates/0088.parquet"
    before = target.read_bytes()
    make_tar(tmp_path / "data/raw/0088.tar", [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", b"")])
    for _ in range(2):
        assert exit_code_of(lambda: run(tmp_path, "data.max_reject_share=0.4", more=["--remake"])) == 1
        assert target.read_bytes() == before
    with pytest.raises(StaleArtefact, match=r"an earlier version of 0088\.tar"):
        run(tmp_path)


@pytest.mark.parametrize("files", [[], [("README", b"hello")]])
def test_a_tar_without_images_fails(tmp_path, capsys, files):
    make_tar(tmp_path / "data/raw/0088.tar", files)
    assert exit_code_of(lambda: run(tmp_path)) == 1
    assert "holds no images" in capsys.readouterr().err


def test_a_tar_in_another_compression_and_one_that_does_not_add_up_fail_alone(tmp_path, capsys, monkeypatch):
    for stem in ("0086", "0087", "0088", "0089"):
        files = [(f"{stem}_1_1_1.jpg", jpeg()), (f"{stem}_1_1_1.txt", label(int(stem)))]
        path = make_tar(tmp_path / f"data/raw/{stem}.tar", files)
    compressed = tmp_path / "data/raw/0086.tar"
    compressed.write_bytes(bz2.compress(path.read_bytes()))
    real = tar_files.pair

    def loses_one(files, dataset_id):
        found = real(files, dataset_id)
        return found._replace(valid=[]) if dataset_id == 88 else found

    monkeypatch.setattr(tar_files, "pair", loses_one)
    assert exit_code_of(lambda: run(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "0086.tar is compressed (bzip2)" in said
    assert "0088.tar has 2 members, but 0 images, labels, rejects and other files" in said
    done = sorted(path.name for path in (tmp_path / "data/intermediates").glob("*.parquet"))
    assert done == ["0087.parquet", "0089.parquet"]
    assert not (tmp_path / "data/intermediates_rejects/0088.parquet").exists()


def test_a_tar_that_the_disk_does_not_give_fails_alone_with_its_name(tmp_path, capsys, monkeypatch):
    for stem in ("0087", "0088"):
        files = [(f"{stem}_1_1_1.jpg", jpeg()), (f"{stem}_1_1_1.txt", label(int(stem)))]
        make_tar(tmp_path / f"data/raw/{stem}.tar", files)
    real, bad = os.pread, (tmp_path / "data/raw/0087.tar").stat().st_ino

    def fails(descriptor, *arguments):
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", fails)
    assert exit_code_of(lambda: run(tmp_path)) == 1
    assert "0087.tar cannot be read: Input/output error" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data/intermediates").glob("*.parquet")] == ["0088.parquet"]


def test_a_tar_whose_name_is_no_number_is_of_the_dataset_that_most_labels_say(tmp_path, capsys):
    files = [("7_0_1_1.jpg", jpeg()), ("7_0_1_1.txt", label(7, patch=0))]  # the first label is the wrong one
    for n in (1, 2):
        files += [(f"88_{n}_1_1.jpg", jpeg(n)), (f"88_{n}_1_1.txt", label(88, patch=n))]
    make_tar(tmp_path / "data/raw/new_york.tar", files)
    assert run(tmp_path) == 0
    assert "new_york.tar is assumed to be dataset 0088, as in most of its labels" in capsys.readouterr().out
    assert parquet.read(tmp_path / "data/intermediates/new_york.parquet")["patch_id"].to_pylist() == [1, 2]
    assert rejects(tmp_path, "new_york") == {"7_0_1_1.jpg": "partner_rejected", "7_0_1_1.txt": "dataset_mismatch"}


def test_labels_that_disagree_with_their_positions_are_used_and_counted_over_all_tars(tmp_path, capsys):
    for stem in ("0087", "0088"):
        good, far = label(int(stem)), label(int(stem), patch=2).replace(b" 15.5 ", b" 17 ")
        files = [(f"{stem}_1_1_1.jpg", jpeg()), (f"{stem}_1_1_1.txt", good)]
        files += [(f"{stem}_2_1_1.jpg", jpeg(1)), (f"{stem}_2_1_1.txt", far)]
        make_tar(tmp_path / f"data/raw/{stem}.tar", files)
    run(tmp_path)
    said = capsys.readouterr().out
    assert "4 images in, 4 out" in said
    assert "labels that disagree with their positions: heading 0, pitch 0, distance 2 of 4" in said
    facts = parquet.read_provenance(tmp_path / "data/intermediates/0088.parquet").facts
    assert facts["disagreements"] == {"labels": 2, "heading": 0, "pitch": 0, "distance": 1}


def test_a_signal_stops_it_within_a_tar_and_nothing_is_left(tmp_path, monkeypatch):
    files = []
    for n in range(400):
        files += [(f"88_{n}_1_1.jpg", jpeg()), (f"88_{n}_1_1.txt", label(patch=n))]
    make_tar(tmp_path / "data/raw/0088.tar", files)
    real, calls = jpegs.inspect, []

    def counted(content):
        calls.append(1)
        monkeypatch.setattr(cli, "_stop_signal", 15)  # the signal comes while the first images are checked
        time.sleep(0.01)  # large ones
        return real(content)

    monkeypatch.setattr(jpegs, "inspect", counted)
    assert exit_code_of(lambda: run(tmp_path)) == cli.EXIT_STOPPED
    assert len(calls) < 300
    assert not list(tmp_path.glob("data/intermediates/**/*"))


def test_an_empty_file_fails_with_its_name(tmp_path, capsys):
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/0088.tar").touch()
    assert exit_code_of(lambda: run(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "0088.tar (0 bytes) holds no images: download it again" in said


def test_links_are_rejected_with_their_partners(tmp_path):
    path = make_tar(tmp_path / "data/raw/0088.tar", [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label())])
    with tarfile.open(path, "a") as tar:
        for name, kind, content in [
            ("88_2_1_1.jpg", tarfile.LNKTYPE, b""),
            ("88_2_1_1.txt", b"0", label(patch=2)),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "88_1_1_1.jpg", len(content)
            tar.addfile(info, io.BytesIO(content))
    run(tmp_path)
    assert rejects(tmp_path) == {"88_2_1_1.jpg": "jpeg_corrupt", "88_2_1_1.txt": "partner_rejected"}


def damaged(whole: bytes, rng: random.Random) -> tuple[bytes, int, int]:
    """The tar cut off, or with bytes zeroed, overwritten or one bit flipped; from where on, and how long it is."""
    raw, start = bytearray(whole), rng.randrange(len(whole))
    length = min(rng.choice([1, 40, 512, 3_000]), len(raw) - start)
    kind = rng.randrange(4)
    if kind == 0:
        del raw[start:]
    elif kind == 1:
        raw[start : start + length] = bytes(length)
    elif kind == 2:
        raw[start : start + length] = rng.randbytes(length)
    else:
        raw[start] ^= 1 << rng.randrange(8)
    return bytes(raw), start, len(raw)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_damage_breaks_the_accounting(tmp_path, form):
    """DAMAGED_TARS=100000 pytest ... tries more than the 1,500 here."""
    rng = random.Random(form)
    folder = "0088/" + ("s" * 90 + "/" if form == tarfile.USTAR_FORMAT else "street/" * 20)  # extra headers
    files = []
    for n in range(6):
        both = [(f"{folder}88_{n}_1_1.jpg", jpeg(n)), (f"{folder}88_{n}_1_1.txt", label(patch=n))]
        files += both if n % 2 else reversed(both)
    whole = make_tar(tmp_path / "whole.tar", files, format=form).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end_of = [member.offset_data + member.size for member in tar]
    pair_ends = {n: max(end_of[2 * n], end_of[2 * n + 1]) for n in range(6)}
    path = tmp_path / "0088.tar"
    for _ in range(int(os.environ.get("DAMAGED_TARS", 1_500)) // 3):
        raw, start, length = damaged(whole, rng)
        path.write_bytes(raw)
        found = tar_files.read(path, 2, on_images=lambda count, at: None)
        judged = tar_files.pair(found, tar_files.dataset_of(path, found))
        counts = tar_files.account(path, found, judged)  # raises if the identity does not hold
        assert counts["images"] <= 6
        kept = {label.patch_id for *_, label in judged.valid}
        # all before the damage; at `end` it might be bytes of the member itself, pushed out by others
        assert kept >= {n for n, end in pair_ends.items() if end < start}
        assert counts["members"] == counts["images"] + counts["labels"] + counts["rejects"] + counts["other"]
        if length <= len(whole.rstrip(b"\0")):
            assert counts["rejected"]["tar_truncated"] == 1


def test_a_full_disk_leaves_no_broken_file(tmp_path):
    make_tar(tmp_path / "data/raw/0088.tar", [("88_1_1_1.jpg", jpeg()), ("88_1_1_1.txt", label())])
    # -B: Python would cut off its own files of bytecode too
    command = f"ulimit -f 1; exec {sys.executable} -B {process_tar.__file__} --set paths.root={tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "exceeds the size limit" in done.stderr
    assert not list(tmp_path.glob("data/intermediates/**/*parquet*"))


def test_two_tasks_on_one_tar_at_once_leave_one_correct_file(tmp_path):
    files = []
    for n in range(300):
        files += [(f"88_{n}_1_1.jpg", jpeg(n)), (f"88_{n}_1_1.txt", label(patch=n))]
    make_tar(tmp_path / "data/raw/0088.tar", files)
    command = [sys.executable, process_tar.__file__, "--set", f"paths.root={tmp_path}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [task.communicate(timeout=120)[1] for task in both]
    assert [task.returncode for task in both] == [0, 0], said
    table = parquet.read(tmp_path / "data/intermediates/0088.parquet")
    assert table["patch_id"].to_pylist() == list(range(300))
    assert rejects(tmp_path) == {}
    left = sorted(path.name for path in (tmp_path / "data").glob("intermediates*/*"))
    assert left == ["0088.parquet", "0088.parquet"]  # the other one is of its rejects
