"""preprocess/merge_and_split.py. Oracle: the rules written as loops over images, and layouts that one can see."""

import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common import config, geo, parquet, provenance, schemas
from common.cli import exit_code_of
from common.errors import StaleArtefact
from preprocess import duplicate_sheet, duplicates, merge_and_split, split

METRE = 1 / geo.METRES_PER_DEGREE  # in degrees of latitude
ALL = 2**64 - 1


def data(**changes) -> config.Data:
    return config.load(None, [f"data.{key}={value}" for key, value in changes.items()]).data


def u64(values):
    return np.array(values, np.uint64)


# --------------------------------------------------------------------------------------------------- duplicates


def test_of_three_in_a_row_the_middle_one_goes():
    # 0 and 4 bits apart, 4 and 8 bits apart, 0 and 8 not: the third is like the second, but that is gone
    hashes = u64([0b0, 0b1111, 0b11111111])
    assert duplicates.within_buildings(np.zeros(3, int), hashes, hashes, 4).tolist() == [-1, 0, -1]


def test_both_hashes_must_be_near_and_other_buildings_do_not_count():
    building = np.array([0, 0, 1, 1, 2])
    phash, dhash = u64([0, 1, 0, 0, 0]), u64([0, ALL, 0, 0, 0])
    assert duplicates.within_buildings(building, phash, dhash, 4).tolist() == [-1, -1, -1, 2, -1]


def slow_within(building, phash, dhash, max_hamming):
    like = np.full(len(building), -1)
    for i in range(len(building)):
        for j in range(i):
            apart = [bin(int(h[i]) ^ int(h[j])).count("1") for h in (phash, dhash)]
            if building[i] == building[j] and like[i] == like[j] == -1 and max(apart) <= max_hamming:
                like[i] = j
    return like


@pytest.mark.parametrize("seed", range(5))
def test_within_buildings_is_the_loop(seed):
    rng = np.random.default_rng(seed)
    building = np.sort(rng.integers(0, 12, 120))
    few_bits = u64(2 ** rng.integers(0, 12, (120, 5))).T
    phash, dhash = few_bits[0] | few_bits[1] | few_bits[2], few_bits[3] | few_bits[4]
    found = duplicates.within_buildings(building, phash, dhash, 2)
    assert np.array_equal(found, slow_within(building, phash, dhash, 2))
    assert 0 < (found >= 0).sum() < 120


def test_a_building_of_many_equal_pictures_keeps_one():
    same = u64(np.full(100_000, 7))
    like = duplicates.within_buildings(np.zeros(100_000, int), same, same, 4)
    assert like[0] == -1
    assert (like[1:] == 0).all()


def test_equal_bytes_far_apart_are_dropped_and_near_ones_kept():
    xyz = np.array([[0, 0, 0], [20, 0, 0], [40, 0, 0], [900, 0, 0]], float)
    building, content = np.array([0, 0, 1, 2, 3, 3]), u64([5, 6, 5, 6, 7, 7])
    # 5: buildings 0 and 1, 20 m; 6: buildings 0 and 2, 40 m; 7: one building
    drop = duplicates.across_buildings(building, content, xyz, 25)
    assert drop.tolist() == [False, True, False, True, False, False]
    chain = duplicates.across_buildings(np.array([1, 0, 2]).argsort(), u64([5, 5, 5]), xyz[[1, 0, 2]], 25)
    assert chain.tolist() == [True, True, True]  # each within 25 m of the first, but two of them 40 m apart


def test_one_picture_at_a_hundred_thousand_buildings_of_one_place_costs_nothing():
    n = 100_000  # labels of 0/0, say: all pairs of them would take 800 GB
    xyz = np.zeros((n, 3))
    assert not duplicates.across_buildings(np.arange(n), u64(np.full(n, 7)), xyz, 25).any()
    xyz[n // 2 :, 0] = 20
    xyz[-1, 0] = -10  # 30 m from those
    assert duplicates.across_buildings(np.arange(n), u64(np.full(n, 7)), xyz, 25).all()


@pytest.mark.parametrize("seed", range(5))
def test_across_buildings_is_the_loop(seed):
    rng = np.random.default_rng(seed)
    building, content = np.sort(rng.integers(0, 30, 150)), u64(rng.integers(0, 60, 150))
    xyz = rng.uniform(0, 45, (30, 3))
    expected = np.zeros(150, bool)
    for picture in np.unique(content):
        rows = np.flatnonzero(content == picture)
        pairs = itertools.combinations(building[rows], 2)
        expected[rows] = any(np.linalg.norm(xyz[a] - xyz[b]) > 25 for a, b in pairs)
    assert np.array_equal(duplicates.across_buildings(building, content, xyz, 25), expected)
    assert 0 < expected.sum() < 150


def test_lookalikes_share_hashes_but_not_bytes_with_another_building():
    building, content, phash = np.array([0, 0, 1, 2, 3]), u64([1, 2, 3, 4, 4]), u64([8, 8, 8, 9, 9])
    assert duplicates.count_lookalikes(building, content, phash, phash) == 3


# -------------------------------------------------------------------------------------------------------- split


def test_cells_near_are_those_whose_square_is_within_the_radius():
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(40.0, 40.02, 40), rng.uniform(-74.02, -74.0, 40)
    found = [set() for _ in lat]
    for ids in geo.cells_near(lat, lon, 100.0, 130.0):
        for cells, cell in zip(found, ids, strict=True):
            cells.add(int(cell))
    grid_lat, grid_lon = (a.ravel() for a in np.meshgrid(*[np.arange(-3, 3, 0.1)] * 2))
    for y, x, cells in zip(lat, lon, found, strict=True):
        # oracle: the cells of a dense grid of points, by their distance to this one
        points = y + 60 * grid_lat * METRE, x + 60 * grid_lon * METRE / np.cos(np.radians(y))
        within = geo.distance_m(y, x, *points) <= 130.0
        expected = set(geo.cell_ids(points[0][within], points[1][within], 100.0).tolist())
        assert expected <= cells
        lat_c, lon_c = geo.cell_corners(np.array(sorted(cells)), 100.0)
        nearest = geo.distance_m(y, x, np.clip(y, *lat_c.T), np.clip(x, *lon_c.T))
        assert (nearest <= 130.01).all()


def test_cells_go_to_the_split_that_is_furthest_below_its_ratio():
    cells, found = split.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), seed=0)
    assert np.bincount(found).tolist() == [800, 100, 100]
    assert cells.tolist() == list(range(1000))
    again = split.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), seed=0)[1]
    other = split.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), seed=1)[1]
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    assert split.assign_cells(np.arange(9), np.ones(9), (0.5, 0.0, 0.5), seed=0)[1].tolist().count(split.VAL) == 0


def test_buildings_are_split_by_their_images():
    sizes = np.random.default_rng(0).integers(0, 8, 10_000)
    found = split.assign_buildings(sizes, (0.8, 0.1, 0.1), seed=0)
    shares = np.bincount(found, sizes) / sizes.sum()
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=1e-3)


def test_a_shared_panorama_stays_in_the_last_split():
    T, V, E = split.TRAIN, split.VAL, split.TEST
    splits, dataset, view = np.array([T, V, T, V, E, T, E]), [1, 1, 1, 1, 1, 1, 2], [1, 1, 2, 3, 3, 4, 4]
    drop = split.shared_with_later_split(splits, np.array(dataset), np.array(view))
    assert drop.tolist() == [True, False, False, True, False, False, False]  # view 4 is another in dataset 2
    assert split.count_in_two_splits(splits, np.array(dataset), np.array(view)) == 2
    assert split.count_in_two_splits(splits[~drop], np.array(dataset)[~drop], np.array(view)[~drop]) == 0


def city(seed=0, buildings=400, datasets=2, side_m=2_000):
    """Random metadata in which every rule has something to drop."""
    rng = np.random.default_rng(seed)
    rows = []
    for dataset in range(1, datasets + 1):
        patch = 0
        for target in rng.permutation(buildings):
            north, east = rng.uniform(0, side_m, 2)
            lat = 40.0 + dataset + north * METRE
            lon = -74.0 + east * METRE / np.cos(np.radians(41))
            picture = rng.integers(1, 2**62)
            for number in range(rng.integers(1, 6)):
                patch += 1
                near = number == 0 or rng.random() < 0.1  # as the first view but for two bits
                hashed = int(picture ^ 3 * (number > 0)) if near else int(rng.integers(1, 2**62))
                content = int(rng.integers(1, 2**62)) if rng.random() > 0.02 else 404
                view = int(north // 120) * 100 + int(
                    east // 120
                )  # a panorama for each 120 m, more than the buffer
                rows.append((dataset, int(target), patch, view, lat, lon, content, hashed, hashed))
    columns = "dataset_id target_id patch_id street_view_id target_lat target_lon content_hash phash dhash".split()
    return pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=seed)


def images_of(frame):
    frame = frame.sort_values(["dataset_id", "target_id", "patch_id"])
    columns = {name: frame[name].to_numpy() for name in frame.columns}
    for name in ("content_hash", "phash", "dhash"):
        columns[name] = columns[name].astype(np.uint64)
    has = columns.pop("has_embedding", np.ones(len(frame), bool))
    return split.Images(**columns, has_embedding=has)


@pytest.mark.parametrize("split_by", ["geo", "building"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks_and_every_drop_is_counted(seed, split_by):
    settings = data(split_cell_m=250, split_by=split_by)
    images = images_of(city(seed))
    found = split.decide(images, settings, seed)
    frame = pd.DataFrame({"split": found.split, "building": found.building, "cell": found.cell})
    for name in ("dataset_id", "street_view_id", "content_hash", "target_lat", "target_lon"):
        frame[name] = getattr(images, name)
    kept = frame[frame["split"] >= 0]
    for key in (["building"], ["dataset_id", "street_view_id"], ["content_hash"]):
        assert kept.groupby(key)["split"].nunique().max() == 1
    assert kept.groupby("building").size().min() >= 2
    assert sum(found.dropped.values()) == len(frame) - len(kept)
    assert 404 not in set(kept["content_hash"])
    if split_by == "geo":
        assert kept.groupby("cell")["split"].nunique().max() == 1
        assert (
            min(found.dropped[r] for r in ("duplicate_within_building", "buffer", "panorama", "single_view")) > 0
        )
        for one, other in itertools.permutations(range(3), 2):
            a, b = kept[kept["split"] == one], kept[kept["split"] == other]
            apart = geo.distance_m(
                *(a[name].to_numpy()[:, None] for name in ("target_lat", "target_lon")),
                *(b[name].to_numpy()[None] for name in ("target_lat", "target_lon")),
            )
            assert apart.min() > settings.split_buffer_m


def test_the_split_does_not_depend_on_the_order_of_the_tar_and_does_on_the_seed():
    frame = city()
    first = split.decide(images_of(frame), data(split_cell_m=250), 0)
    again = split.decide(images_of(frame.sample(frac=1, random_state=9)), data(split_cell_m=250), 0)
    other = split.decide(images_of(frame), data(split_cell_m=250), 1)
    assert np.array_equal(first.split, again.split)
    assert not np.array_equal(first.split, other.split)


@pytest.mark.parametrize("split_by", ["geo", "building"])
def test_images_of_which_none_is_left_before_the_split_are_all_counted(split_by):
    frame = city(buildings=20)
    frame["has_embedding"] = False
    decision = split.decide(images_of(frame), data(split_by=split_by), seed=0)
    assert (decision.split == split.NONE).all()
    assert {reason: n for reason, n in decision.dropped.items() if n} == {"embedding_missing": len(frame)}


def test_no_images_are_split_into_nothing():
    found = split.decide(images_of(city().head(0)), data(), 0)
    assert len(found.split) == 0
    assert sum(found.dropped.values()) == 0


# ------------------------------------------------------------------------------------------------------ command

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
        with parquet.writer(source, schemas.INTERMEDIATES, provenance.record("process_tar", {}, [tar])) as out:
            out.append(table)
        made = provenance.record("compute_fingerprints", {}, [source])
        with parquet.writer(self.cfg.paths.fingerprints_dir / name, schemas.FINGERPRINTS, made) as out:
            out.append({key: table[key] for key in schemas.FINGERPRINTS.names})
        for number in range(-(-len(rows) // 500)):
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
        made = provenance.record("generate_embeddings", model, [source])
        path = self.cfg.paths.embeddings_dir / f"{source.stem}-{number}.parquet"
        with parquet.writer(path, schemas.embeddings(dim), made) as out:
            patch = rows["patch_id"].to_numpy()
            vectors = (patch[:, None] % 97 + np.arange(dim)).astype(np.float16)
            out.append({**{name: rows[name] for name in rows.column_names}, "embedding": vectors})
            out.facts = {"model": "tiny", "revision": None, "dim": dim}

    def run(self, *flags):
        return merge_and_split.main([*self.flags, *flags])

    def splits(self):
        return {name: parquet.read(self.cfg.paths.merged_dir / f"{name}.parquet") for name in schemas.SPLITS}

    def report(self):
        return json.loads((self.cfg.paths.merged_dir / "split_report.json").read_text())


def test_the_largest_groups_are_those_of_most_images_with_the_one_that_was_kept_first():
    frame = city(buildings=60, datasets=1)
    frame["content_hash"] = np.arange(len(frame)) + 1000
    places = frame.groupby("target_id")["target_lat"].first().sort_values().index
    chosen = frame.index[frame["target_id"].isin(places[[0, -1]])][:5]
    assert frame.loc[chosen, "target_id"].nunique() == 2  # at opposite ends of the city
    frame.loc[chosen, "content_hash"] = 404
    many = len(frame) + np.arange(9)  # ten views of building 7, all of one picture
    copies = pd.concat([frame[frame["target_id"] == 7].head(1)] * 10).assign(patch_id=[1, *(many + 9_000)])
    copies["content_hash"] = [*many.tolist(), 5]
    images = images_of(pd.concat([frame[frame["target_id"] != 7], copies]))
    found = split.decide(images, data(split_cell_m=250), 0)
    groups = duplicate_sheet.largest_groups(images, found)
    assert groups[0].size == 9
    assert images.target_id[groups[0].rows].tolist() == [7] * duplicate_sheet.SHOWN
    assert images.patch_id[groups[0].rows[0]] == 1  # the lowest patch was kept
    [far] = [group for group in groups if "far apart" in group.title]
    assert set(images.content_hash[far.rows].tolist()) == {404}
    assert far.size == found.dropped["duplicate_across_buildings"] == (np.array(far.rows) >= 0).sum() > 1


def test_the_copies_of_two_pictures_of_one_building_are_two_groups():
    frame = city(buildings=20, datasets=1)
    [view] = frame[frame["target_id"] == 7].head(1).to_dict("records")
    copies = pd.DataFrame([{**view, "patch_id": 9_000 + n, "content_hash": 9_000 + n} for n in range(9)])
    is_first = np.isin(copies["patch_id"], [9_000, 9_003, 9_004, 9_005, 9_008])
    copies["phash"] = copies["dhash"] = np.where(is_first, 0, 2**62 - 1)
    images = images_of(pd.concat([frame[frame["target_id"] != 7], copies]))
    found = split.decide(images, data(split_cell_m=250), 0)
    groups = [g for g in duplicate_sheet.largest_groups(images, found) if images.target_id[g.rows[0]] == 7]
    assert [images.patch_id[group.rows].tolist() for group in groups] == [
        [9_000, 9_003, 9_004, 9_005, 9_008],  # each group with the picture that was kept first
        [9_001, 9_002, 9_006, 9_007],
    ]
    assert [group.size for group in groups] == [4, 3]


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
    sheet = chain.cfg.paths.merged_dir / "duplicates.png"
    chain.run()  # the tars hold no images yet
    assert "no sheet of duplicates" in caplog.text
    assert not sheet.exists()
    for tar in chain.cfg.paths.raw_dir.glob("*.tar"):
        tar.write_bytes(b"".join(pictures))
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
    expected = split.decide(images, chain.cfg.data, 0)
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
        assert facts["embedding_model"] == {"name": "tiny", "pooling": "cls", "dim": DIM}
    assert report["dropped"]["embedding_missing"] == 2
    assert sum(report["dropped"].values()) == len(frame) - sum(table.num_rows for table in splits.values())
    assert set(report["in_two_splits"].values()) == {0}
    assert abs(sum(report["ratio_reached"].values()) - 1) < 1e-5
    assert (chain.cfg.paths.merged_dir / "split_map.png").read_bytes()[:4] == b"\x89PNG"
    assert "in two splits: 0 buildings, 0 panoramas, 0 pictures" in capsys.readouterr().out

    assert chain.run() == 0
    assert "nothing to do" in capsys.readouterr().out
    before = {name: parquet.read_provenance(chain.cfg.paths.merged_dir / f"{name}.parquet").id for name in splits}
    (chain.cfg.paths.merged_dir / "split_report.json").unlink()  # as if killed before the report
    chain.run()
    for name, known in before.items():
        assert parquet.read_provenance(chain.cfg.paths.merged_dir / f"{name}.parquet").id == known


@pytest.fixture
def small(tmp_path):
    return Chain(tmp_path, city(buildings=60, datasets=2))


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


def test_embeddings_of_two_models_are_refused_by_the_names_of_both_files(small, capsys):
    source = small.cfg.paths.intermediates_dir / "0002.parquet"
    small.write_part(source, 0, {**MODEL, "embedding_model.pooling": "mean"})
    assert exit_code_of(small.run) == 1
    said = capsys.readouterr().err
    assert "0001-0.parquet" in said
    assert "0002-0.parquet" in said
    assert 'pooling = "mean"' in said


def test_files_of_older_intermediates_are_refused(small):
    source = small.cfg.paths.intermediates_dir / "0001.parquet"
    table, made = parquet.read(source), parquet.read_provenance(source)
    with parquet.writer(source, schemas.INTERMEDIATES, made) as out:
        out.append(table.slice(1))
    with pytest.raises(StaleArtefact, match=r"fingerprints.*was made from another"):
        small.run()


def test_parts_of_another_division_are_refused(small):
    surplus = small.cfg.paths.embeddings_dir / "0001-1.parquet"
    surplus.write_bytes((small.cfg.paths.embeddings_dir / "0001-0.parquet").read_bytes())
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


def test_a_changed_setting_is_told_and_not_redone(small, capsys):
    small.run()
    small.flags += ["--set", "data.split_buffer_m=10"]
    with pytest.raises(StaleArtefact, match=r"data\.split_buffer_m = 50\.0; this run says 10\.0"):
        small.run()
    assert small.run("--overwrite") == 0


def test_a_tar_that_has_gone_does_not_take_its_images_out_in_silence(small, capsys):
    next(small.cfg.paths.raw_dir.glob("0002*")).unlink()
    assert exit_code_of(small.run) == 1
    assert "has 0002, of which" in capsys.readouterr().err
