"""Small worlds at random, the odd ones above all, through merge, neighbours, two steps of training and evaluation.

No stage may end in a traceback; what it writes is held against slow references: the rules of the split in sets,
every pair of images in float64, and the ranking of each query in a loop. `make soak` runs hundreds (WORLDS=300).
"""

import os

import numpy as np
import pandas as pd
import pytest
from test_merge_and_split import Chain
from test_metrics import reference
from test_search import brute_force

from common import cli, pages, parquet
from common.imagery import pictures
from common.places import geo, zones
from difficulty import compute_visual_neighbors
from train import evaluate, train
from train.evaluation import metrics_json
from train.fitting import history

WORLDS, AT_ONCE = int(os.environ.get("WORLDS", "6")), 6
SETTINGS = (
    *("training.epochs=1", "training.steps_per_epoch=2", "training.warmup_steps=1", "training.val_max_queries=50"),
    *("training_model.hidden_dim=8", "training_model.output_dim=4", "evaluation.bootstrap_samples=20"),
    *("data.band_percentiles=[20, 60]", "logging.level=warning"),
)
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("error::RuntimeWarning")]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """No pictures: they take longer than all that is tested here."""
    monkeypatch.setattr(pages, "svg", lambda figure, alt: alt)
    monkeypatch.setattr(history, "draw", lambda path, table: path.touch())
    monkeypatch.setattr(pictures, "png", lambda figure: b"")


def metadata(rng: np.random.Generator) -> pd.DataFrame:
    """The columns of images that the split looks at; see `invented_city.city`."""
    buildings, datasets = int(rng.choice([1, 5, 40, 120, 120])), int(rng.integers(1, 4))
    first = int(rng.choice([0, 2**31, 2**62]))  # of the ids
    lat, lon = [(41.0, -74.0), (0.0, 180.0), (89.999, 0.0), (-90.0, 12.0), (65.0, -180.0)][rng.integers(5)]
    side, rows = float(rng.choice([0, 100, 3_000, 20_000])), []  # metres
    for dataset in range(1, datasets + 1):
        patch = first
        for target in range(buildings):
            north, east = rng.uniform(0, side, 2) / geo.METRES_PER_DEGREE
            east /= max(0.001, np.cos(np.radians(lat)))
            place = np.clip(lat + north, -90, 90), (lon + east + 180) % 360 - 180
            place = (np.nan, np.nan) if rng.random() < 0.03 else place
            picture = int(rng.integers(1, 2**62))
            for _ in range(rng.integers(1, 7)):
                patch += 1
                hashed = picture if rng.random() < 0.2 else int(rng.integers(1, 2**62))
                content = 404 if rng.random() < 0.02 else int(rng.integers(1, 2**62))
                view = patch if rng.random() < 0.9 else first + int(rng.integers(1, 40))
                rows.append((dataset, first + target, patch, view, *place, content, hashed, hashed))
    columns = "dataset_id target_id patch_id street_view_id target_lat target_lon content_hash phash dhash".split()
    return pd.DataFrame(rows, columns=columns)


class World(Chain):
    """The files before the merge, with vectors of some kind, and the stages from there on."""

    def __init__(self, root, seed: int):
        self.rng = np.random.default_rng(seed)
        self.kind = str(self.rng.choice(["buildings", "noise", "equal", "pairs", "tiny"]))
        frame = metadata(self.rng)
        ids = [f"{d:04d}_{p}" for d, p in zip(frame["dataset_id"], frame["patch_id"], strict=True)]
        chosen = {
            "data.split_by": self.rng.choice(["geo", "geo", "building"]),
            "data.split_cell_m": self.rng.choice([50, 250, 5_000]),
            "data.ignore_radius_m": self.rng.choice([0, 25, 500]),
            "data.neighbors": self.rng.choice([1, 20, 255]),
            "data.search": self.rng.choice(["exact", "exact", "balltree"]),
            "data.balltree_dim": 4,
            "data.rows_per_part": 500,
            "training.batch_size": self.rng.choice([2, 16, 300]),
            "training.bandit_groups": 2,
            "training.sampler": self.rng.choice(["ucb", "uniform", "hard_random", "random"]),
            "training.loss": self.rng.choice(["triplet", "infonce", "multi_similarity"]),
            "training_model.init": self.rng.choice(["whitening", "random"]),
            "evaluation.gallery": self.rng.choice(["test", "all"]),
        }
        lost = set(self.rng.choice(ids, len(ids) // 20, replace=False))
        super().__init__(root, frame, *SETTINGS, *(f"{k}={v}" for k, v in chosen.items()), missing=lost)

    def vectors(self, rows, dim) -> np.ndarray:
        n = len(rows)
        looks = np.random.default_rng(7).normal(size=(211, dim))[rows["target_id"].to_numpy() % 211]
        noise = self.rng.normal(size=(n, dim))
        made = {
            "buildings": looks + 0.3 * noise,
            "noise": noise,
            "equal": np.ones((n, dim)),
            "pairs": np.round(looks),  # many equal ones
            "tiny": 1e-6 * noise,  # below float16's normal numbers
        }[self.kind]
        made[~made.any(axis=1)] = 1
        return made

    def stage(self, main, *flags) -> bool:
        """Whether a stage has succeeded; it may refuse with a message, but not raise anything else."""
        return cli.exit_code_of(lambda: main([*self.flags, *flags])) == 0


def hold_against_the_rules(world: World) -> None:
    splits = {name: table.to_pandas() for name, table in world.splits().items()}
    rows = pd.concat([frame.assign(split=name) for name, frame in splits.items()])
    planted = world.frame.set_index(["dataset_id", "patch_id"])["content_hash"]
    rows["content"] = planted.loc[list(zip(rows["dataset_id"], rows["patch_id"], strict=True))].to_numpy()
    for key in (["dataset_id", "target_id"], ["dataset_id", "street_view_id"], ["content"]):
        assert (rows.groupby(key)["split"].nunique() <= 1).all(), key
    assert rows.groupby(["dataset_id", "target_id"]).size().min() >= 2
    assert not set(rows["streetview_image_id"]) & world.missing
    report = world.report()
    assert sum(report["dropped"].values()) + len(rows) == len(world.frame)
    if world.cfg.data.split_by == "geo":
        assert (rows.groupby("cell_id")["split"].nunique() == 1).all()
        test, buffer = rows[rows["split"] == "test"], world.cfg.data.split_buffer_m
        for row in rows[rows["split"] == "train"].itertuples():
            away = geo.distance_m(row.target_lat, row.target_lon, test["target_lat"], test["target_lon"])
            assert not (away < 0.99 * buffer).any()


def hold_against_every_pair(world: World) -> None:
    train_table = parquet.read(world.cfg.paths.merged_dir / "train.parquet").to_pandas()
    k, radius = world.cfg.data.neighbors, world.cfg.data.ignore_radius_m
    building = zones.number_buildings(train_table["dataset_id"].to_numpy(), train_table["target_id"].to_numpy())
    places = zones.make_zones(
        building, train_table["target_lat"].to_numpy(), train_table["target_lon"].to_numpy(), radius
    )
    vectors = np.stack(train_table["embedding"].to_numpy())
    found = parquet.read(world.cfg.paths.difficulty_dir / "difficulty_metadata.parquet")
    similarities = np.stack(found["neighbor_similarities"].to_numpy(zero_copy_only=False)).astype(np.float64)
    neighbours = np.stack(found["neighbor_rows"].to_numpy(zero_copy_only=False))
    _, expected = brute_force(vectors, places, k)
    expected = np.pad(expected, ((0, 0), (0, k - expected.shape[1])), constant_values=-1)
    np.testing.assert_array_equal(neighbours >= 0, expected > -1)
    for row, (others, known) in enumerate(zip(neighbours, expected > -1, strict=True)):
        assert not set(others[known]) & set(places.rows_of(np.array([row]), own=True)[1])
        assert len(set(others[known])) == known.sum()
    if world.cfg.data.search == "exact":
        np.testing.assert_allclose(similarities[expected > -1], expected[expected > -1], atol=2e-3)


def hold_against_the_loop(world: World) -> None:
    cfg = world.cfg
    names = ("test", "train", "val") if cfg.evaluation.gallery == "all" else ("test",)
    tables = [parquet.read(cfg.paths.merged_dir / f"{name}.parquet").to_pandas() for name in names]
    rows = pd.concat(tables, ignore_index=True)
    building = zones.number_buildings(rows["dataset_id"].to_numpy(), rows["target_id"].to_numpy())
    places = zones.make_zones(
        building, rows["target_lat"].to_numpy(), rows["target_lon"].to_numpy(), cfg.data.ignore_radius_m
    )
    vectors = np.stack(rows["embedding"].to_numpy()).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = np.arange(len(tables[0]))
    scores = np.round(vectors[queries] @ vectors.T, 6)
    junk = [places.rows_of(np.array([query]), own=False)[1].tolist() for query in queries]
    expected = reference(scores, building[queries], building, queries, junk)
    found = metrics_json.read(cfg.paths.evaluation_dir / "metrics.json")
    has = expected.has_match
    assert found["counts"]["queries"] == has.sum()
    raw = found["methods"]["raw"]
    # ties in float32 may fall otherwise than those of rounded float64
    slack = 0.02 if world.kind in ("equal", "pairs") else 1e-6
    assert abs(raw["recall@1"]["value"] - np.mean(expected.best_rank[has] <= 1)) <= slack
    assert abs(raw["map@r"]["value"] - expected.average_precision_at_r[has].mean()) <= slack


def end_of(world: World) -> str:
    """The last stage that has succeeded, its files held against their references."""
    if not world.stage(lambda flags: world.run()):
        return ""
    hold_against_the_rules(world)
    if not world.stage(compute_visual_neighbors.main):
        return "merge_and_split"
    hold_against_every_pair(world)
    if not world.stage(train.main) or not world.stage(evaluate.main):
        return "compute_visual_neighbors"
    hold_against_the_loop(world)
    return "evaluate"


@pytest.mark.parametrize("first", range(0, WORLDS, AT_ONCE))
def test_worlds_go_through_or_are_refused_in_words(tmp_path, first):
    ends = [end_of(World(tmp_path / str(seed), seed)) for seed in range(first, first + AT_ONCE)]
    assert "evaluate" in ends  # else nothing was tested to the end
