"""Imported photographs in the chain, from fingerprints to the published model. Oracles: the same synthetic facades
as tars with labels, and rules small enough to see.
"""

import csv
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from invented_city import city, data, images_of
from local_backbone import write_local_backbone
from synthetic import write_dataset

from common import config, files, parquet
from common.imagery import tar_images
from common.places import geo, zones
from difficulty import compute_visual_neighbors
from difficulty.report.band_table import METRES, BandCounts
from generate import generate_embeddings
from preprocess import compute_fingerprints, import_photographs, merge_and_split, process_tar, summarize_ids
from preprocess.duplicates import duplicate_rules
from preprocess.split import split_report, split_rules
from publish import convert_to_hf, demo_usage
from slurm import chain
from train import datasets, evaluate, train
from train.evaluation import metrics_json

SETTINGS = (
    *("embedding_model.pooling=mean", "data.split_cell_m=150", "data.split_buffer_m=10", "data.neighbors=20"),
    *(
        "data.train_ratio=0.5",
        "data.val_ratio=0.2",
        "data.test_ratio=0.3",
        "infrastructure.embedding_batch_size=16",
    ),
    *("training_model.output_dim=32", "training_model.hidden_dim=32", "training_model.whitening_shrinkage=[1.0]"),
    *("training.epochs=2", "training.steps_per_epoch=4", "training.batch_size=32", "training.warmup_steps=2"),
)
AFTER_LISTING = (
    *(compute_fingerprints, generate_embeddings, merge_and_split, summarize_ids, compute_visual_neighbors),
    *(train, evaluate),
)
METHODS = ("raw", "pca", "whitening", "trained")


class Run:
    """A chain of its own."""

    def __init__(self, place, name: str):
        self.flags = [
            f"paths.root={place / name}",
            "paths.raw_dir=raw",
            f"embedding_model.name={place / 'backbone'}",
        ]
        self.flags = [word for setting in (*SETTINGS, *self.flags) for word in ("--set", setting)]
        self.cfg = config.load(None, self.flags[1::2])

    def do(self, *stages) -> None:
        for stage in stages:
            assert stage.main(self.flags) == 0

    def table(self, name: str) -> pd.DataFrame:
        return pd.concat(
            parquet.read(path).to_pandas() for path in sorted(getattr(self.cfg.paths, name).glob("*"))
        )

    def vectors(self) -> dict[int, bytes]:
        rows = self.table("embeddings_dir")
        return {row.content_hash: row.embedding.tobytes() for row in rows.itertuples()}

    def splits(self) -> dict[str, set[bytes]]:
        return {
            path.stem: {row.tobytes() for row in parquet.read_matrix(path, "embedding")}
            for path in self.cfg.paths.merged_dir.glob("*.parquet")
        }

    def figures(self) -> dict:
        return metrics_json.read(self.cfg.paths.evaluation_dir / "metrics.json")

    def report(self) -> dict:
        return json.loads((files.beside(self.cfg.paths.merged_dir, "report") / "split_report.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tars of two cities, the same photographs in a folder for each building, and a backbone."""
    place = tmp_path_factory.mktemp("place")
    write_dataset(place / "tars" / "raw", streets=12, cities=2, image_px=64, facades_per_street=5)
    write_local_backbone(place / "backbone")
    run = Run(place, "tars")
    run.do(process_tar)
    store = tar_images.of_paths(run.cfg.paths)
    for path in run.cfg.paths.intermediates_dir.glob("*.parquet"):
        rows = parquet.read(path)
        for row, content in zip(rows.to_pylist(), store.read(rows), strict=True):
            folder = place / "photos" / row["building_id"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row['patch_id']}.jpg").write_bytes(content)
    return place


@pytest.fixture(scope="module")
def of_tars(place):
    run = Run(place, "tars")
    run.do(*AFTER_LISTING)
    return run


def write_csv(of_tars, place) -> None:
    """What the labels say, but for ids, heights and normals, in any order."""
    rows = of_tars.table("intermediates_dir").sample(frac=1, random_state=0)
    with open(place / "photos.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("path building latitude longitude target_latitude target_longitude heading panorama".split())
        for row in rows.itertuples():
            position = [row.camera_lat, row.camera_lon, row.target_lat, row.target_lon, row.heading]
            panorama = f"{row.dataset_id} {row.street_view_id}"
            out.writerow([f"photos/{row.building_id}/{row.patch_id}.jpg", row.building_id, *position, panorama])


def test_a_table_of_positions_gives_what_tars_with_labels_give(place, of_tars, no_curves):
    write_csv(of_tars, place)
    run = Run(place, "table")
    import_photographs.main([str(place / "photos.csv"), "--name", "mine", *run.flags])
    run.do(*AFTER_LISTING)
    assert run.vectors() == of_tars.vectors()
    assert run.splits() == of_tars.splits()
    ours, theirs = run.figures(), of_tars.figures()
    assert ours["counts"] == {**theirs["counts"], "buildings_without_position": 0}
    for method in METHODS:
        noise = 0.03 if method == "trained" else 2e-3  # of the triplets; of ties and of sums in another order
        for metric in ("recall@1", "recall@5", "map@r"):
            of_both = [each["methods"][method][metric]["value"] for each in (ours, theirs)]
            assert of_both[0] == pytest.approx(of_both[1], abs=noise), (method, metric)
    same = [name for name in ours["breakdowns"] if name not in ("dataset", "target_height_m")]
    assert "target_height_m" not in ours["breakdowns"]  # no pitch is given
    for name in same:
        classes = [
            [(c["class"], c["queries"], c["matches"]) for c in each["breakdowns"][name]["classes"]]
            for each in (ours, theirs)
        ]
        assert classes[0] == classes[1]


def test_a_folder_without_positions_goes_through_to_a_published_model(place, of_tars, no_curves, capsys):
    run = Run(place, "folder")
    import_photographs.main([str(place / "photos"), "--name", "mine", *run.flags])
    run.do(*AFTER_LISTING, convert_to_hf)
    told = capsys.readouterr().out
    assert told.count("have no position: each is a cell of its own, for the split and the bootstrap") == 1
    assert run.vectors() == of_tars.vectors()
    report, buildings = run.report(), set(run.table("intermediates_dir")["target_id"])
    assert (report["split_by"], report["buildings_without_position"]) == ("building", len(buildings))
    assert report["dropped"]["buffer"] == report["dropped"]["duplicate_across_buildings"] == 0
    for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        assert report["ratio_reached"][split] == pytest.approx(share, abs=0.05)
    counts = run.figures()["counts"]
    assert counts["cells"] == counts["buildings"] == counts["buildings_without_position"]
    assert set(run.figures()["breakdowns"]) == {"views", "dataset"}
    assert "no position" in (run.cfg.paths.evaluation_dir / "report.html").read_text()
    card = (run.cfg.paths.published_dir / "README.md").read_text()
    assert "Photographs of buildings, imported as mine." in card
    assert "The splits are random buildings" in card
    assert not [words for words in ("3D Street View", "within 25 m", "is labelled with") if words in card]
    steps = chain.steps_of(run.cfg)
    assert not any(chain.missing(steps, run.cfg).values())
    assert demo_usage.main(["search", "--out", str(place / "search.png"), *run.flags]) == 0
    assert "same building" in capsys.readouterr().out


def test_tars_and_photographs_together(place, of_tars, no_curves, tmp_path):
    run = Run(place, "both")
    run.cfg.paths.raw_dir.mkdir(parents=True)
    (run.cfg.paths.raw_dir / "0088.tar").symlink_to(of_tars.cfg.paths.raw_dir / "0088.tar")
    for path in sorted((place / "photos").glob("0089_*")):  # of the other city
        (tmp_path / "photos" / path.name).mkdir(parents=True)
        for image in path.iterdir():
            (tmp_path / "photos" / path.name / image.name).symlink_to(image)
    import_photographs.main([str(tmp_path / "photos"), "--name", "mine", *run.flags])
    assert process_tar.main([*run.flags, "--num-shards", "2", "--shard", "1"]) == 0  # one tar: nothing
    assert chain.missing(chain.steps_of(run.cfg), run.cfg)["process_tar"] == [0]
    run.do(process_tar)
    for stage in (compute_fingerprints, generate_embeddings):
        for shard in range(3):
            assert stage.main([*run.flags, "--num-shards", "3", "--shard", str(shard)]) == 0
    run.do(*AFTER_LISTING[2:])
    assert run.vectors() == of_tars.vectors()
    merged = run.table("merged_dir")
    is_ours = merged["dataset_id"] >= 1_000
    assert is_ours.any()
    assert not is_ours.all()
    assert merged["target_lat"].isna().equals(is_ours)
    cells = merged["cell_id"] >= geo.OWN_CELLS
    assert cells.equals(is_ours)
    assert merged[is_ours].groupby("cell_id")["target_id"].nunique().eq(1).all()
    assert run.report()["split_by"] == "geo"
    assert run.figures()["counts"]["buildings_without_position"] > 0


# ------------------------------------------------------------------ the rules, without positions of some buildings


def test_points_without_a_position_are_near_nothing():
    rng = np.random.default_rng(0)
    lat, lon = 40 + rng.uniform(0, 1e-3, 200), rng.uniform(0, 1e-3, 200)
    lat[rng.random(200) < 0.3] = np.nan
    indptr, indices = geo.within(lat, lon, 40.0)
    near = geo.distance_m(lat[:, None], lon[:, None], lat, lon) <= 40.0  # not a number: not near
    np.fill_diagonal(near, True)
    assert [indices[a:b].tolist() for a, b in itertools.pairwise(indptr)] == [
        np.flatnonzero(row).tolist() for row in near
    ]
    assert geo.within(np.full(3, np.nan), np.zeros(3), 40.0)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_building_without_a_position_is_split_alone_and_the_others_as_before(seed):
    frame = city(seed, buildings=150, datasets=1)
    frame["street_view_id"] = np.arange(len(frame))
    known = images_of(frame)
    lost = frame["target_id"] % 3 == 0
    frame.loc[lost, ["target_lat", "target_lon"]] = np.nan
    images, settings = images_of(frame), data(split_cell_m=250)
    decision = split_rules.decide(images, settings, seed)
    is_lost = np.isnan(images.target_lat)
    cells = pd.Series(decision.cell[is_lost]).groupby(images.target_id[is_lost])
    assert cells.nunique().eq(1).all()
    assert cells.first().is_unique
    assert (decision.cell[is_lost] >= geo.OWN_CELLS).all()
    assert np.array_equal(decision.cell[~is_lost], split_rules.decide(known, settings, seed).cell[~is_lost])
    buffer = decision.why == list(decision.dropped).index("buffer")
    assert buffer[~is_lost].any()
    assert not buffer[is_lost].any()
    report = split_report.summarise(images, decision, settings)
    assert set(report["in_two_splits"].values()) == {0}
    kept = (decision.split >= 0) & is_lost
    assert report["buildings_without_position"] == len(np.unique(images.target_id[kept]))
    assert split_report.draw_map(images, decision, 250).startswith(b"\x89PNG")


def test_one_file_at_two_buildings_is_dropped_unless_both_are_known_to_be_near():
    xyz = geo.to_xyz_m([40.0, 40.0001, np.nan, 41.0], [0.0, 0.0, np.nan, 0.0])
    building = np.array([0, 0, 0, 1, 1, 2, 2, 3])
    content = np.array([7, 8, 8, 7, 9, 9, 5, 5], np.uint64)
    dropped = duplicate_rules.across_buildings(building, content, xyz, 25.0)
    # 7 is of two near buildings, 8 of one alone; 9 and 5 are of building 2, which may be anywhere
    assert dropped.tolist() == [False, False, False, False, True, True, True, True]


def test_without_positions_all_other_buildings_are_negatives():
    building = np.repeat(np.arange(4), 2)
    lat = np.repeat([40.0, 40.0001, np.nan, np.nan], 2)
    columns = {"target_lat": lat, "target_lon": lat * 0, "street_view_id": np.arange(8)}
    rows = datasets.make_rows(
        np.ones((8, 3), np.float16), np.full((8, 1), -1, np.int32), np.zeros((8, 2), np.uint8), building, columns,
        25.0, torch.device("cpu"),
    )  # fmt: skip
    everyone = torch.arange(8)
    _, negative = datasets.relations(rows, everyone, everyone)
    near = np.equal.outer(building, building) | ((building < 2)[:, None] & (building < 2))
    assert negative.numpy().tolist() == (~near).tolist()
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for anchor in range(8):
        drawn = datasets.random_rows(rows, torch.full((50,), anchor), u).unique().tolist()
        assert drawn == np.flatnonzero(~near[anchor]).tolist()


def test_advice_about_negatives_is_of_the_zone_only_where_there_is_one():
    assert "data.ignore_radius_m" in zones.too_few_outside(25.0)
    assert zones.too_few_outside(0.0) == "use more buildings"


def test_pairs_without_positions_have_no_distance_in_the_bands():
    xyz = geo.to_xyz_m([40.0, 40.01, np.nan], [0.0, 0.0, np.nan])
    table = BandCounts(np.array([1.0]), xyz, np.zeros(3, np.int32))
    table.add(0, np.array([[1, 2], [0, 2], [0, 1]]), np.full((3, 2), 0.5), np.array([[0, 2, 2]] * 3))
    (first, _) = table.rows()
    assert (first["pairs"], first["share_same_dataset"], table.metres.sum()) == (6, 1.0, 2)
    assert first["median_distance_m"] == pytest.approx(1_112, rel=np.diff(METRES[:2])[0])
