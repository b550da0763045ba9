"""preprocess/import_photographs.py. Oracle: the bytes and the positions that the photographs were written with."""

import itertools
import os
import re
import shutil
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_photographs import BLANK, HEIC, encoded, photograph, write, write_dataset, write_folder

from common import config, parquet, schemas
from common.errors import ConfigError, PipelineError, StaleArtefact
from common.imagery import tar_images
from common.places import geo
from preprocess import compute_fingerprints, fix_intermediate_schema, import_photographs, process_tar
from preprocess.photographs import photo_columns
from preprocess.tars import label_geometry
from slurm import chain
from slurm.node import staging

TOLERANT = ("--set", "data.max_reject_share=0.9")


@pytest.fixture
def load(cfg, tmp_path):
    """Import a source as "mine"; its rows."""

    def run(source, *flags, name="mine") -> pd.DataFrame:
        arguments = [str(source), "--name", name, "--set", f"paths.root={tmp_path}", *flags]
        assert import_photographs.main(arguments) == 0
        table = parquet.read(cfg.paths.intermediates_dir / f"{name}.parquet")
        assert table.schema.equals(schemas.INTERMEDIATES)
        return table.to_pandas()

    return run


def rejects(cfg) -> dict[str, str]:
    rows = parquet.read(cfg.paths.root / "data" / "intermediates_rejects" / "mine.parquet").to_pylist()
    return {row["member"]: row["reason"] for row in rows}


def images(cfg) -> list[bytes]:
    """Of all rows, as later stages read them: with their hashes, and one by one without."""
    rows = parquet.read(cfg.paths.intermediates_dir / "mine.parquet")
    store = tar_images.of_paths(cfg.paths)
    contents = store.reader(rows)(0, len(rows))
    places = rows.select(["tar_file", "image_offset", "image_size"])
    assert [store.read(places.slice(row, 1))[0] for row in range(len(rows))] == contents
    return contents


def test_a_folder_for_each_building(cfg, load, tmp_path, capsys):
    good = write_folder(tmp_path / "photos")
    rows = load(tmp_path / "photos")
    assert rows["image_path"].tolist() == sorted(good)
    assert images(cfg) == [good[name] for name in sorted(good)]
    assert rows["building_id"].tolist() == ["mine_Rathaus Köln"] * 3 + ["mine_b"] * 2
    assert rows["streetview_image_id"].tolist() == [f"mine_{name}" for name in sorted(good)]
    assert rows["target_id"].tolist() == [0, 0, 0, 1, 1]
    assert (rows["width"].tolist(), rows["height"].tolist()) == ([64] * 5, [48] * 5)
    assert rows["street_view_id"].is_unique
    assert rows["dataset_id"].between(1_000, 9_999).all()
    assert rows[["target_lat", "camera_lon", "heading", "pitch", "distance"]].isna().all(axis=None)
    told = capsys.readouterr().out
    assert "2 buildings, no positions" in told
    assert "three splits need three buildings, better 300" in told
    assert load(tmp_path / "photos", name="other")["dataset_id"][0] != rows["dataset_id"][0]


def test_what_cannot_be_used_is_rejected_with_a_reason(cfg, load, tmp_path, capsys):
    write_folder(tmp_path / "photos")
    bad = {
        "top.jpg": (photograph(6), "building_missing"),
        "b/blank.jpg": (BLANK, "jpeg_blank"),
        "b/cut.jpg": (photograph(7)[:-300], "jpeg_corrupt"),
        "b/phone.HEIC": (HEIC, "not_an_image"),
        "b/empty.png": (b"", "not_an_image"),
        "b/page.jpg": (b"<html>", "not_an_image"),
    }
    for name, (content, _) in bad.items():
        write(tmp_path / "photos" / name, content)
    for name in ("b/notes.txt", "b/._1.jpg", ".DS_Store", "b/.hid.jpg", "b/.thumbnails/1.jpg"):
        write(tmp_path / "photos" / name, b"?")
    with pytest.raises(
        PipelineError, match=r"(?s)54.5% of the photographs are rejected .* a subfolder of its own"
    ):
        load(tmp_path / "photos")
    assert not (cfg.paths.intermediates_dir / "mine.parquet").exists()
    assert len(load(tmp_path / "photos", *TOLERANT)) == 5
    assert rejects(cfg) == {name: reason for name, (_, reason) in bad.items()}
    assert "ignored files that are no images: 1" in capsys.readouterr().out
    record = parquet.read_provenance(cfg.paths.intermediates_dir / "mine.parquet")
    assert (record.rows["in"], record.rows["out"], record.rows["rejects"]) == (11, 5, 6)


def test_a_csv_of_positions(cfg, load, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "9.jpg"
    for number in range(8):
        write(tmp_path / f"images/{number}.jpg", photograph(number))
    write(elsewhere, photograph(9))
    (tmp_path / "photos.csv").write_text(
        "path,building,latitude,longitude,target_latitude,target_longitude,heading,id,mood\n"
        "images/0.jpg,007,48.8585,179.9999,48.85837,-179.9999,,,good\n"  # across the date line
        "images/1.jpg,007,48.85826,179.9998,,,33.5,,bad\n"  # the target is that of the row before
        f"{elsewhere},Café,10,20,,,,,\n"
        "images/2.jpg,Cafe\u0301,10.0002,20.0004,,,,,\n"  # the same name, decomposed; at the mean of its cameras
        "images/3.jpg,none,0,0,,,,,\n"  # a camera without a fix
        "images/4.jpg,none,95,0,,,,,\n"
        "images/5.jpg,none,5,,,,,,\n"
        "images/6.jpg,,,,,,,,\n"
        "images/0.jpg,none,,,,,,,\n"
        "images/gone.jpg,none,,,,,,,\n"
        "images/7.jpg,none,,,,,400,,\n"
        "images/7.jpg,none,,,,,,seven,\n"
    )
    rows = load(tmp_path / "photos.csv", *TOLERANT).set_index("streetview_image_id")
    assert list(rows["building_id"]) == ["mine_007"] * 2 + ["mine_Café"] * 2 + ["mine_none"] * 2
    assert rows.index[-1] == "mine_seven"
    assert images(cfg) == [photograph(number) for number in (0, 1, 9, 2, 3, 7)]
    assert rows["target_lon"].tolist()[:4] == pytest.approx([-179.9999, -179.9999, 20.0002, 20.0002], abs=1e-9)
    assert rows["target_lat"].tolist()[2:4] == pytest.approx([10.0001] * 2, abs=1e-9)
    assert rows[["target_lat", "camera_lat"]][4:].isna().all(axis=None)
    assert rows["heading"].tolist()[1] == 33.5
    assert rows["heading"][2:].isna().all()  # towards the mean of the cameras it would mean nothing
    exact = {name: rows[name][:1] for name in rows.columns}
    level = {name: np.zeros(1) for name in ("pitch", "camera_height", "target_height")}
    assert label_geometry.summary(label_geometry.count_disagreements(exact | level)) == ""
    apart = geo.distance_m(48.85826, 179.9998, 48.85837, -179.9999)
    assert rows["distance"].iloc[1] == pytest.approx(apart, rel=1e-3)
    reasons = parquet.read(tmp_path / "data/intermediates_rejects/mine.parquet").to_pylist()
    assert [(row["member"][-8:], row["reason"], row["detail"]) for row in reasons] == [
        ("es/4.jpg", "position_out_of_range", "latitude = 95.0"),
        ("es/5.jpg", "position_out_of_range", "only one of latitude and longitude"),
        ("es/6.jpg", "building_missing", ""),
        ("es/0.jpg", "duplicate_id", "images/0.jpg"),
        ("gone.jpg", "image_missing", "there is no such file, or its name is not UTF-8"),
        ("es/7.jpg", "angle_out_of_range", "heading = 400.0"),
    ]


def test_links_are_followed_and_what_cannot_be_read_is_counted(cfg, load, tmp_path):
    good = write_folder(tmp_path / "elsewhere")
    photos = tmp_path / "photos"
    write(photos / "c" / "1.jpg", photograph(6))
    (photos / "linked").symlink_to(tmp_path / "elsewhere" / "b")
    (photos / "c" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "b" / "1.jpg")
    (photos / "c" / "all").symlink_to(photos)  # a loop
    (tmp_path / "elsewhere" / "b" / "back").symlink_to(photos / "c")  # and one through two links
    (photos / "c" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    write(photos / os.fsdecode(b"c/K\xf6ln.jpg"), photograph(8))
    rows = load(photos, *TOLERANT)
    expected = {
        "c/1.jpg": photograph(6),
        "c/2.jpg": good["b/1.jpg"],
        "linked/1.jpg": good["b/1.jpg"],
        "linked/2.jpeg": good["b/2.jpeg"],
        "linked/back/1.jpg": photograph(6),
        "linked/back/2.jpg": good["b/1.jpg"],
    }
    assert dict(zip(rows["image_path"], images(cfg), strict=True)) == expected
    assert rejects(cfg) == dict.fromkeys(
        ["c/K\\xf6ln.jpg", "c/gone.jpg", "linked/back/K\\xf6ln.jpg", "linked/back/gone.jpg"], "image_missing"
    )


def test_a_refused_import_keeps_what_there_is(cfg, load, tmp_path):
    table = pa.table({"image": [photograph(1), photograph(2)], "building": ["a", "a"]})
    pq.write_table(table, tmp_path / "good.parquet")
    pq.write_table(table.set_column(0, "image", pa.array([b"?", b""])), tmp_path / "bad.parquet")
    packed = tmp_path / "data" / "intermediates_images" / "mine.tar"
    with pytest.raises(PipelineError, match=r"(?s)100\.0% .*the first is row 0: not_an_image"):
        load(tmp_path / "bad.parquet")
    assert not packed.exists()
    load(tmp_path / "good.parquet")
    for wrong in (tmp_path / "bad.parquet", write(tmp_path / "text" / "a" / "1.jpg", b"?").parents[1]):
        with pytest.raises(PipelineError, match=r"100\.0%"):
            load(wrong, "--remake")
        assert images(cfg) == [photograph(1), photograph(2)]
    load(tmp_path / "good.parquet")
    assert rejects(cfg) == {}
    packed.unlink()
    load(tmp_path / "good.parquet")
    assert images(cfg) == [photograph(1), photograph(2)]


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_the_images_in_it_is_packed_once(cfg, load, tmp_path, as_struct, capsys):
    write(tmp_path / "beside.jpg", photograph(7))
    contents = [photograph(1), None, encoded(photograph_of_cmyk(), "JPEG"), BLANK, photograph(4)]
    if as_struct:  # as Hugging Face writes them
        contents = [{"bytes": content, "path": None if content else "beside.jpg"} for content in contents]
    columns = {
        "image": contents,
        "label": [3, 3, 3, 4, 4],
        "name": ["?"] * 5,
        "date": pa.array([0] * 5, pa.timestamp("s")),
        "x": [1] * 5,
    }
    (tmp_path / "set").mkdir()
    for part in range(2):
        pq.write_table(pa.table(columns), tmp_path / "set" / f"{part}.parquet")
    shutil.copy(tmp_path / "beside.jpg", tmp_path / "set")
    rows = load(tmp_path / "set", *TOLERANT)
    expected = [photograph(1), photograph(7), encoded(photograph_of_cmyk(), "JPEG"), photograph(4)]
    if not as_struct:
        expected.pop(1)
    shutil.rmtree(tmp_path / "set") if not as_struct else None  # the copy is all that is needed
    assert images(cfg) == expected * 2
    assert set(rows["building_id"]) == {"mine_3", "mine_4"}
    assert rejects(cfg)["row 8"] == "jpeg_blank"
    if not as_struct:
        assert rejects(cfg)["row 6"] == "image_missing"
    assert rows["street_view_id"].nunique() == 2  # the photographs of a building on one day
    with tarfile.open(tmp_path / "data/intermediates_images/mine.tar") as tar:
        assert [tar.extractfile(member).read() for member in tar][:1] == expected[:1]
    assert "ignored columns: name, x" in capsys.readouterr().out


def photograph_of_cmyk():
    from embedding_setup import picture

    return picture(64, 48, mode="CMYK", seed=3)


def test_a_dataset_on_disk_is_read_in_place(cfg, load, tmp_path):
    write(tmp_path / "set" / "beside.jpg", photograph(9))
    contents = [photograph(number) for number in range(7)]

    def table(numbers):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = [{"bytes": contents[number], "path": f"{number}.jpg"} for number in numbers]
        column += [{"bytes": None, "path": "beside.jpg"}] if 0 in numbers else []
        buildings = [f"house {number // 2}" for number in numbers] + ["house 0"] * (len(column) - len(numbers))
        return pa.table({"image": pa.array(column, kind), "building": buildings})

    write_dataset(tmp_path / "set", {"train": [table([0, 1, 2]), table([3, 4])], "test": [table([5, 6])]})
    rows = load(tmp_path / "set")
    # the splits in alphabetical order
    assert images(cfg) == [contents[n] for n in (5, 6, 0, 1, 2)] + [photograph(9)] + [contents[n] for n in (3, 4)]
    assert rows["tar_file"].tolist()[:3] == ["mine/test/data-00000-of-00001.arrow"] * 2 + [
        "mine/train/data-00000-of-00002.arrow"
    ]
    assert not (tmp_path / "data" / "intermediates_images").exists()


def test_a_compressed_dataset_is_refused(load, tmp_path):
    write_dataset(tmp_path / "set", {"train": [pa.table({"image": [photograph(1)], "building": ["a"]})]})
    (path,) = tmp_path.glob("set/train/*.arrow")
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as out:
        out.write_table(table)
    with pytest.raises(PipelineError, match=r"arrow is compressed: .* write Parquet files"):
        load(tmp_path / "set")


def test_views_of_one_panorama_or_of_one_camera_and_day_belong_together(load, tmp_path):
    for number in range(7):
        write(tmp_path / f"{number}.jpg", photograph(number))
    (tmp_path / "photos.csv").write_text(
        "path,building,panorama,camera,date\n"
        "0.jpg,a,p1,,\n1.jpg,b,p1,,\n"  # one panorama of two buildings
        "2.jpg,a,,c1,2024-05-01\n3.jpg,a,,c1,2024-05-01\n4.jpg,a,,c1,2024-05-02\n5.jpg,b,,c1,2024-05-01\n"
        "6.jpg,a,,,\n"
    )
    assert load(tmp_path / "photos.csv")["street_view_id"].tolist() == [0, 0, 1, 1, 2, 3, 4]


def test_finished_work_is_kept_moved_photographs_are_found_and_changed_ones_are_named(
    cfg, load, tmp_path, capsys, monkeypatch
):
    write_folder(tmp_path / "photos")
    load(tmp_path / "photos")
    path = cfg.paths.intermediates_dir / "mine.parquet"
    before = path.stat().st_mtime_ns
    load(tmp_path / "photos")
    assert path.stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out
    flags = ["--set", f"paths.root={tmp_path}"]
    assert compute_fingerprints.main(flags) == 0

    (tmp_path / "photos").rename(tmp_path / "moved")
    root, again = re.escape(f"--set paths.root={tmp_path}"), "again from where they are: python "
    imported = rf"{again}\S*preprocess/import_photographs\.py {root} SOURCE --name mine --overwrite\n"
    remade = rf"slurm/submit\.py {root} --remake compute_fingerprints --remake generate_embeddings"
    monkeypatch.setattr("sys.argv", ["compute_fingerprints.py", *flags])
    with pytest.raises(PipelineError, match=rf"1\.jpg does not exist: restore it, .*{imported}.*{remade}$"):
        compute_fingerprints.main([*flags, "--overwrite"])
    contents, made = path.read_bytes(), parquet.read_provenance(path).id
    load(tmp_path / "moved")
    assert path.read_bytes() != contents
    assert parquet.read_provenance(path).id == made  # what was made from it is still its own
    images(cfg)
    assert compute_fingerprints.main(flags) == 0
    assert "nothing to do" in capsys.readouterr().out

    changed = tmp_path / "moved" / "b" / "1.jpg"
    content = bytearray(changed.read_bytes())
    content[-30] ^= 1
    changed.write_bytes(content)
    with pytest.raises(
        PipelineError,
        match=rf"b/1\.jpg has other images than when import_photographs\.py read it\n.*{imported}.*{remade}$",
    ):
        compute_fingerprints.main([*flags, "--overwrite"])
    write(tmp_path / "moved" / "b" / "3.jpg", photograph(8))
    with pytest.raises(StaleArtefact, match="photographs"):
        load(tmp_path / "moved")
    assert len(load(tmp_path / "moved", "--overwrite")) == 5
    assert rejects(cfg) == {"b/1.jpg": "jpeg_corrupt"}


def test_sources_that_are_none_are_refused_by_what_they_lack(cfg, load, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text.txt", b"x")
    write(tmp_path / "no_path.csv", b"file,building\n1.jpg,a\n")
    write(tmp_path / "no_building.csv", b"path\n1.jpg\n")
    write(tmp_path / "no_number.csv", b"path,building,latitude\n1.jpg,a,1\n2.jpg,a,north\n")
    write(tmp_path / "twice.csv", b"path,building,path\n1.jpg,a,1.jpg\n")
    write(tmp_path / "excel.csv", b"path;building;latitude\n1.jpg;a;1,5\n")
    write(tmp_path / "upper.csv", b"Path,Building\n1.jpg,a\n")
    write(tmp_path / "table.tsv", b"path\tbuilding\n1.jpg\ta\n")
    write(tmp_path / "missing.csv", b"path,building\n1.jpg,a\n2.jpg,a\n")
    pq.write_table(pa.table({"image": ["1.jpg"], "building": ["a"]}), tmp_path / "no_bytes.parquet")
    for source, message in {
        "gone": "does not exist",
        "empty": "holds no photographs",
        "text.txt": "is none of these: a folder with a subfolder for each building",
        "no_path.csv": "no column `path` of files, or `image` .*: file, building",
        "no_bytes.parquet": "the column `image` holds string, not encoded images",
        "no_building.csv": "no column `building`: path",
        "no_number.csv": r"(?s)cannot be read as a CSV table: .*Row #3: .*north.*\n.*commas.*UTF-8",
        "twice.csv": "has a column twice: path",
        "excel.csv": r"(?s)Row #2: Expected 1 columns, got 2.*\n.*separated by commas",
        "upper.csv": r"no column `path` .*: Path, Building\n.*lower case, and separated by commas",
        "table.tsv": "is none of these: .* CSV",
        "missing.csv": r"(?s)the first is 1\.jpg: image_missing, .*\npaths in a table are relative to its folder$",
    }.items():
        with pytest.raises(PipelineError, match=message):
            load(tmp_path / source)
    for name in ("0088", "a/b", "", "my.tar"):
        with pytest.raises(ConfigError, match="begin with a letter"):
            load(tmp_path / "empty", name=name)
    write(cfg.paths.raw_dir / "city.tar", b"")
    with pytest.raises(ConfigError, match="is the name of a tar"):
        load(tmp_path / "empty", name="city")


def test_two_sets_never_have_the_same_number(load, tmp_path, capsys):
    write(tmp_path / "photos" / "a" / "1.jpg", photograph(1))
    number = load(tmp_path / "photos")["dataset_id"][0]
    told = capsys.readouterr().out
    assert "1 building, no positions" in told
    assert "buildings with a single photograph, which merge_and_split.py will drop: 1" in told
    same = next(name for n in itertools.count() if photo_columns.dataset_of(name := f"n{n}") == number)
    with pytest.raises(ConfigError, match=f"--name {same}: mine already has its number, {number}; choose another"):
        load(tmp_path / "photos", name=same)
    load(tmp_path / "photos", "--overwrite")


def test_a_chain_of_photographs_alone_has_nothing_to_do_for_tars(cfg, load, tmp_path, capsys):
    flags = ["--set", f"paths.root={tmp_path}"]
    with pytest.raises(PipelineError, match="is not a folder"):
        process_tar.main(flags)
    write_folder(tmp_path / "photos")
    load(tmp_path / "photos")
    steps = chain.steps_of(cfg)
    todo = chain.missing(steps, cfg)
    assert todo["process_tar"] == []
    assert todo["compute_fingerprints"] == [0]  # of four shards
    assert process_tar.main(flags) == 0
    assert "0 tars up to date" in capsys.readouterr().out
    assert staging.read_by(steps[1], cfg, 0, 4) == []  # on a node's own disk there would be nothing to copy
    with pytest.raises(PipelineError, match="holds no files"):  # the imported set is not its concern
        fix_intermediate_schema.main(flags)
    assert compute_fingerprints.main(["--num-shards", "4", *flags]) == 0
    assert chain.missing(steps, config.load(None, flags[1::2]))["compute_fingerprints"] == []
