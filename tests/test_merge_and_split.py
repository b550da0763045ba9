"""preprocess/merge_and_split.py: its files and its refusals. Oracle: what preprocess/split/split_rules.py
decides.
"""

import io
import json

import numpy as np
import pytest
from invented_city import city, images_of
from PIL import Image

from common import config, files, parquet, provenance, schemas, stages
from common.cli import exit_code_of
from common.errors import StaleArtefact
from preprocess import merge_and_split
from preprocess.split import split_rules

DIM = 8
MODEL = {"embedding_model.name": "tiny", "embedding_model.pooling": "cls"}


class Chain:
    """The files of all stages before the merge, written without images."""

    def __init__(self, root, frame, *settings, missing=()):
        flags = [f"paths.root={root}", "data.rows_per_part=500", "data.split_cell_m=250", *settings]
        self.flags = [word for flag in flags for word in ("--set", flag)]
        self.cfg, self.frame, self.missing = config.load(None, flags), frame, set(missing)
        for dataset, rows in frame.groupby("dataset_id"):
            tar = self.cfg.paths.raw_dir / f"{dataset:04d}.tar"
            tar.parent.mkdir(parents=True, exist_ok=True)
            tar.write_bytes(b"tar")
            self.write_dataset(tar, rows)

    def write_dataset(self, tar, rows):
        name = f"{tar.stem}.parquet"
        table = self.intermediates(rows, tar.name)
        source = self.cfg.paths.intermediates_dir / name
        with parquet.writer(
            source, schemas.INTERMEDIATES, provenance.record("process_tar", {}, stages.ids([tar]))
        ) as out:
            out.append(table)
        made = provenance.record("compute_fingerprints", {}, stages.ids([source]))
        for number in range(-(-len(rows) // 500)):
            path = self.cfg.paths.fingerprints_dir / f"{tar.stem}-{number}.parquet"
            with parquet.writer(path, schemas.FINGERPRINTS, made) as out:
                out.append({key: table[key][500 * number :][:500] for key in schemas.FINGERPRINTS.names})
            self.write_part(source, number)

    def intermediates(self, rows, tar_file):
        texts = {"building_id": "target_id", "streetview_image_id": "patch_id", "image_path": "patch_id"}
        columns = {name: rows[name].to_numpy() for name in rows.columns}
        columns |= {name: rows[name].to_numpy().astype(np.uint64) for name in ("content_hash", "phash", "dhash")}
        for name, number in texts.items():
            columns[name] = [f"{d:04d}_{n}" for d, n in zip(rows["dataset_id"], rows[number], strict=True)]
        columns["tar_file"] = [tar_file] * len(rows)
        for field in schemas.INTERMEDIATES:
            if field.name not in columns:
                columns[field.name] = np.zeros(len(rows), field.type.to_pandas_dtype())
        return columns

    def write_part(self, source, number, model=MODEL, dim=DIM):
        rows = parquet.read(source).slice(500 * number, 500)
        rows = rows.filter([id not in self.missing for id in rows["streetview_image_id"].to_pylist()])
        made = provenance.record("generate_embeddings", model, stages.ids([source]))
        path = self.cfg.paths.embeddings_dir / f"{source.stem}-{number}.parquet"
        with parquet.writer(path, schemas.embeddings(dim), made) as out:
            vectors = self.vectors(rows, dim).astype(np.float16)
            out.append({**{name: rows[name] for name in rows.column_names}, "embedding": vectors})
            out.facts = {"model": "tiny", "revision": None, "dim": dim}

    def vectors(self, rows, dim):
        """The embeddings of some rows of the intermediates."""
        return rows["patch_id"].to_numpy()[:, None] % 97 + np.arange(dim)

    def run(self, *flags):
        return merge_and_split.main([*self.flags, *flags])

    def splits(self):
        return {name: parquet.read(self.cfg.paths.merged_dir / f"{name}.parquet") for name in schemas.SPLITS}

    def path(self, name):
        return files.beside(self.cfg.paths.merged_dir, "report") / name

    def report(self):
        return json.loads(self.path("split_report.json").read_text())


def test_a_sheet_shows_the_duplicates_read_from_the_tars(tmp_path, caplog):
    pictures, places, at = [], [], 0
    for colour in ((250, 0, 0), (0, 0, 250)):
        buffer = io.BytesIO()
        Image.new("RGB", (320, 320), colour).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
        places.append((at, len(pictures[-1])))
        at += len(pictures[-1])
    frame = city(buildings=60, datasets=2)
    frame["image_offset"], frame["image_size"] = np.array(places)[frame["patch_id"] % 2].T
    chain = Chain(tmp_path, frame)
    sheet = chain.path("duplicates.png")
    chain.run()  # the tars hold no images yet
    assert "duplicates.png not written" in caplog.text
    assert not sheet.exists()
    for dataset, rows in frame.groupby("dataset_id"):
        tar = chain.cfg.paths.raw_dir / f"{dataset:04d}.tar"
        tar.write_bytes(b"".join(pictures))
        chain.run("--overwrite")
        assert not sheet.exists()  # not from a tar that has been replaced
        chain.write_dataset(tar, rows)
    chain.run("--overwrite")
    red, green, blue = np.asarray(Image.open(sheet).convert("RGB"), int).reshape(-1, 3).T
    assert (green[(red > 240) & (blue < 15)] < 15).sum() > 1_000
    assert (green[(blue > 240) & (red < 15)] < 15).sum() > 1_000


def test_the_command_writes_what_was_decided(tmp_path, capsys):
    chain = Chain(tmp_path, city(), missing={"0001_5", "0002_7"})
    assert chain.run() == 0
    report, splits = chain.report(), chain.splits()
    frame = chain.frame.copy()
    ids = [f"{d:04d}_{p}" for d, p in zip(frame["dataset_id"], frame["patch_id"], strict=True)]
    frame["has_embedding"] = [name not in chain.missing for name in ids]
    images = images_of(frame)
    expected = split_rules.decide(images, chain.cfg.data, 0)
    for number, (name, table) in enumerate(splits.items()):
        rows = np.flatnonzero(expected.split == number)
        assert table["patch_id"].to_numpy().tolist() == images.patch_id[rows].tolist()
        assert table["dataset_id"].to_numpy().tolist() == images.dataset_id[rows].tolist()
        assert table["cell_id"].to_numpy().tolist() == expected.cell[rows].tolist()
        embeddings = parquet.to_matrix(table["embedding"])
        assert np.array_equal(embeddings[:, 3], table["patch_id"].to_numpy() % 97 + 3)  # each with its own image
        keys = list(zip(*(table[key].to_pylist() for key in ("dataset_id", "target_id", "patch_id")), strict=True))
        assert keys == sorted(keys)
        assert table.schema.equals(schemas.merged(DIM))
        assert report["kept"][name]["images"] == table.num_rows
        facts = parquet.read_provenance(chain.cfg.paths.merged_dir / f"{name}.parquet").facts
        settings = {"name": "tiny", "pooling": "cls", "views": [1.0]}  # the parts, like older ones, name no views
        assert facts["embedding_model"] == {**settings, "dim": DIM}
    assert report["dropped"]["embedding_missing"] == 2
    assert sum(report["dropped"].values()) == len(frame) - sum(table.num_rows for table in splits.values())
    assert set(report["in_two_splits"].values()) == {0}
    assert abs(sum(report["ratio_reached"].values()) - 1) < 1e-5
    assert chain.path("split_map.png").read_bytes()[:4] == b"\x89PNG"
    assert "in two splits: 0 buildings, 0 panoramas, 0 pictures" in capsys.readouterr().out

    assert chain.run() == 0
    assert "nothing to do" in capsys.readouterr().out
    before = {name: parquet.read_provenance(chain.cfg.paths.merged_dir / f"{name}.parquet").id for name in splits}
    chain.path("split_report.json").unlink()  # as if killed before the report
    chain.run()
    for name, known in before.items():
        assert parquet.read_provenance(chain.cfg.paths.merged_dir / f"{name}.parquet").id == known


def test_the_listed_images_are_held_out_and_another_list_is_noticed(tmp_path, capsys):
    frame = city(side_m=4_000)
    ids = [f"{d:04d}-{p:07d}" for d, p in zip(frame["dataset_id"], frame["patch_id"], strict=True)]
    listing = tmp_path / "verpairs.txt"
    listing.write_text(
        "\n".join(f"{one} {other} 1 -20.5 3" for one, other in zip(ids[:40:2], ids[1:40:2], strict=True))
    )
    chain = Chain(tmp_path, frame)
    assert chain.run() == 0
    before = chain.report()
    assert "held_out" not in before
    chain.flags += ["--set", "data.held_out=verpairs.txt"]
    with pytest.raises(StaleArtefact, match=r'data\.held_out = "" \(now "\w+"\)'):
        chain.run()
    assert chain.run("--remake") == 0
    assert "held out: 40 of 40 images" in capsys.readouterr().out
    images = images_of(frame)
    listed = {tuple(map(int, name.split("-"))) for name in ids[:40]}
    rows = np.array([(d, p) in listed for d, p in zip(images.dataset_id, images.patch_id, strict=True)])
    expected = split_rules.decide(images, chain.cfg.data, 0, rows)
    assert chain.splits()["test"]["patch_id"].to_pylist() == images.patch_id[expected.split == 2].tolist()
    assert chain.report()["held_out"]["kept_in_test"] > 20
    assert chain.run() == 0
    assert "nothing to do" in capsys.readouterr().out
    listing.rename(tmp_path / "elsewhere.txt")
    chain.flags[-1] = "data.held_out=elsewhere.txt"
    assert chain.run() == 0  # the same list
    (tmp_path / "elsewhere.txt").write_text(f"{ids[50]} {ids[51]} 0 0 0\n")
    with pytest.raises(StaleArtefact, match=r"data\.held_out"):
        chain.run()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.held_out: there is no file"),
        ("nothing here\n", "holds no id of an image, such as 0006-0087241"),
    ],
)
def test_a_list_that_is_absent_or_none_is_refused(small, tmp_path, capsys, content, message):
    if content:
        (tmp_path / "pairs.txt").write_text(content)
    small.flags += ["--set", "data.held_out=pairs.txt"]
    assert exit_code_of(small.run) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def small(tmp_path):
    return Chain(tmp_path, city(buildings=60, datasets=2))


def test_all_stages_whose_files_are_missing_are_named_at_once(small, capsys):
    paths = small.cfg.paths
    for path in [paths.intermediates_dir / "0001.parquet", *paths.fingerprints_dir.glob("0002*")]:
        path.unlink()
    for path in paths.embeddings_dir.glob("*.parquet"):
        path.unlink()
    assert exit_code_of(small.run) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first.endswith("intermediates/0001.parquet does not exist: run preprocess/process_tar.py first")
    assert [line.split(" first")[0].rpartition(" ")[2] for line in others] == [
        "preprocess/compute_fingerprints.py",
        "generate/generate_embeddings.py",
    ]


@pytest.mark.parametrize("stage", ["intermediates", "fingerprints", "embeddings"])
def test_a_missing_file_names_the_stage_that_makes_it(small, capsys, stage):
    path = next(getattr(small.cfg.paths, f"{stage}_dir").glob("0002*"))
    path.unlink()
    assert exit_code_of(small.run) == 1
    said = capsys.readouterr().err
    assert path.name in said
    scripts = {
        "intermediates": "process_tar.py",
        "fingerprints": "compute_fingerprints.py",
        "embeddings": "generate_embeddings.py",
    }
    assert scripts[stage] in said


@pytest.mark.parametrize(("setting", "value"), [("pooling", "mean"), ("views", [1.0, 0.5])])
def test_embeddings_of_two_models_are_refused_by_the_names_of_both_files(setting, value, small, capsys):
    source = small.cfg.paths.intermediates_dir / "0002.parquet"
    small.write_part(source, 0, {**MODEL, f"embedding_model.{setting}": value})
    assert exit_code_of(small.run) == 1
    said = capsys.readouterr().err
    assert "0001-0.parquet" in said
    assert "0002-0.parquet" in said
    assert f"{setting} = {json.dumps(value)}" in said


def test_files_of_older_intermediates_are_refused(small):
    source = small.cfg.paths.intermediates_dir / "0001.parquet"
    table, made = parquet.read(source), parquet.read_provenance(source)
    with parquet.writer(source, schemas.INTERMEDIATES, made) as out:
        out.append(table.slice(1))
    with pytest.raises(
        StaleArtefact,
        match=r"fingerprints.*was made from an earlier version of .*\n.*compute_fingerprints.py --remake",
    ):
        small.run()


@pytest.mark.parametrize("stage", ["fingerprints", "embeddings"])
def test_parts_of_another_division_are_refused(small, stage):
    folder = getattr(small.cfg.paths, f"{stage}_dir")
    (folder / "0001-1.parquet").write_bytes((folder / "0001-0.parquet").read_bytes())
    with pytest.raises(StaleArtefact, match="rows_per_part"):
        small.run()


def test_two_tars_of_one_dataset_are_refused(small, capsys):
    rows = small.frame[small.frame["dataset_id"] == 1]
    tar = small.cfg.paths.raw_dir / "copy.tar"
    tar.write_bytes(b"tar")
    small.write_dataset(tar, rows)
    assert exit_code_of(small.run) == 1
    assert "both of dataset 1" in capsys.readouterr().err


def test_an_empty_split_is_an_error_with_advice(tmp_path, capsys):
    chain = Chain(tmp_path, city(buildings=60), "data.split_cell_m=1000000")
    assert exit_code_of(chain.run) == 1
    said = capsys.readouterr().err
    assert "split is empty" in said
    assert "split_cell_m" in said
    assert not list(chain.cfg.paths.merged_dir.glob("*"))


def test_photographs_that_are_at_several_buildings_are_told_where_no_split_is_left(tmp_path, capsys):
    frame = city(buildings=60)
    frame["content_hash"] = frame["content_hash"] % 5
    assert exit_code_of(Chain(tmp_path, frame).run) == 1
    said = capsys.readouterr().err
    assert "split is empty" in said
    assert "the same photographs are at several buildings, as when a building is in two imported sets" in said
    assert "split_cell_m" not in said


def test_a_changed_setting_is_told_and_not_redone(small, capsys):
    small.run()
    small.flags += ["--set", "data.split_buffer_m=10"]
    with pytest.raises(StaleArtefact, match=r"data\.split_buffer_m = 50\.0 \(now 10\.0"):
        small.run()
    assert small.run("--overwrite") == 0


def test_a_tar_that_has_gone_does_not_take_its_images_out_in_silence(small, capsys):
    next(small.cfg.paths.raw_dir.glob("0002*")).unlink()
    assert exit_code_of(small.run) == 1
    assert "there are files of 0002, but" in capsys.readouterr().err
