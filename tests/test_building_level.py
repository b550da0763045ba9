"""train/evaluation/building_level.py. Oracle: loops over queries and buildings in numpy, with means made anew."""

import numpy as np
import pytest
import small_merge
import torch
from small_evaluation import load

from common import cli, config
from common.places import zones
from train.evaluation import building_level, metrics
from train.evaluation.building_level import TIE, half_to_half, image_to_building, mean_vectors

CPU, PROGRESS = torch.device("cpu"), cli.Progress("evaluate", "ranking")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def in_a_row(sizes, metres_apart: float = 12.0) -> zones.Zones:
    """Buildings of so many images along a street, with zones of 25 m: two on either side."""
    building = np.repeat(np.arange(len(sizes)), sizes)
    return zones.make_zones(building, building * metres_apart / 111_195.0, np.zeros(len(building)), 25.0)


def slow_rank(query: np.ndarray, own: np.ndarray, others: dict[int, np.ndarray]) -> int:
    """Of `own` among the vectors of other buildings that count; those as similar come before it."""
    return 1 + sum(float(query @ other - query @ own) >= -TIE for other in others.values())


def far(around: zones.Zones, building: int) -> list[int]:
    """The buildings outside the zone of one."""
    zone = around.buildings[around.indptr[building] : around.indptr[building + 1]]
    return sorted(set(range(len(around.starts) - 1)) - set(zone.tolist()))


def slow_images(vectors: np.ndarray, around: zones.Zones, num_queries: int) -> list[int]:
    rows_of = [np.arange(*ends) for ends in zip(around.starts[:-1], around.starts[1:], strict=True)]
    means = [unit(vectors[rows].mean(axis=0)) for rows in rows_of]
    ranks = []
    for query in range(num_queries):
        building = int(around.building_of_row[query])
        others = [row for row in rows_of[building] if row != query]
        ranks.append(
            slow_rank(
                vectors[query], unit(vectors[others].mean(axis=0)), {b: means[b] for b in far(around, building)}
            )
            if others
            else 0
        )
    return ranks


@pytest.mark.parametrize("seed", range(3))
def test_images_find_their_buildings_as_in_a_loop(seed, monkeypatch):
    monkeypatch.setitem(metrics._LARGEST_TILE, "cpu", (13, 1024))  # many tiles of queries
    monkeypatch.setattr(building_level, "_BLOCK_ROWS", 7)  # and of images; some buildings are larger
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, 60)
    around = in_a_row(sizes)
    vectors = unit(rng.normal(size=(60, 8))[around.building_of_row] + rng.normal(size=(sizes.sum(), 8)))
    vectors = vectors.astype(np.float32)
    num_queries = int(around.starts[40])  # the other 20 buildings are distractors
    found = image_to_building(torch.from_numpy(vectors), around, num_queries, 16, CPU, PROGRESS)
    expected = slow_images(vectors.astype(np.float64), around, num_queries)
    assert found.tolist() == expected
    assert 0.05 < np.mean(np.array(expected) == 1) < 0.95
    assert (found == 0).any() == (sizes[:40] == 1).any()


def test_the_query_does_not_help_its_own_building():
    # building 0: images at 0 and 80 degrees, a mean at 40; its rival stands at 60
    degrees = np.radians([0, 80, 60, 60])
    vectors = torch.from_numpy(np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32))
    around = in_a_row([2, 2], metres_apart=100.0)
    assert image_to_building(vectors, around, 2, 16, CPU, PROGRESS).tolist() == [
        2,
        2,
    ]  # 1, 2 with the query in the mean
    near = in_a_row([2, 2], metres_apart=10.0)
    assert image_to_building(vectors, near, 2, 16, CPU, PROGRESS).tolist() == [1, 1]  # the rival is in the zone


def test_buildings_that_look_the_same_come_before_the_right_one():
    sizes = [2, 4, 1, 2]
    vectors = torch.eye(4)[torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1])]  # three of the four look the same
    around = in_a_row(sizes, metres_apart=100.0)
    expected = [3, 3, 3, 3, 3, 3, 0, 1, 1]
    assert image_to_building(vectors, around, 9, 16, CPU, PROGRESS).tolist() == expected
    assert half_to_half(vectors, around, 9, 0, 16, CPU, PROGRESS).tolist() == [3, 3, 0, 1]


@pytest.mark.parametrize("alike", [300, 2])  # a model that gives all the same vector; twins
def test_ties_count_against_the_right_building_despite_rounding(alike):
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 9, 300)
    looks = unit(rng.normal(size=(300 // alike, 96))).astype(np.float32)
    around = in_a_row(sizes, metres_apart=100.0)
    vectors = torch.from_numpy(looks[around.building_of_row % len(looks)])
    assert set(image_to_building(vectors, around, len(vectors), 16, CPU, PROGRESS)) == {alike}
    assert set(half_to_half(vectors, around, len(vectors), 0, 16, CPU, PROGRESS)) == {alike}


@pytest.mark.parametrize("seed", range(3))
def test_halves_find_the_other_halves_as_in_a_loop(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, 60)
    around = in_a_row(sizes)
    vectors = unit(rng.normal(size=(60, 8))[around.building_of_row] + 1.3 * rng.normal(size=(sizes.sum(), 8)))
    num_queries = int(around.starts[40])
    halves = []
    order = np.random.default_rng(seed).random(len(vectors))  # a building's images by it: the first half asks
    for first, last in zip(around.starts[:-1], around.starts[1:], strict=True):
        rows = first + np.argsort(order[first:last])
        halves.append((rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    larger = [unit(vectors[rows].mean(axis=0)) for _, rows in halves]
    expected = [
        slow_rank(unit(vectors[rows].mean(axis=0)), larger[b], {other: larger[other] for other in far(around, b)})
        if len(rows)
        else 0
        for b, (rows, _) in enumerate(halves[:40])
    ]
    single = torch.from_numpy(vectors.astype(np.float32))
    found = half_to_half(single, around, num_queries, seed, 16, CPU, PROGRESS)
    assert found.tolist() == expected
    assert 0.05 < np.mean(np.array(expected) == 1) < 0.95
    assert (
        half_to_half(single, around, num_queries, seed + 1, 16, CPU, PROGRESS).tolist() != expected
    )  # other halves


def test_means_are_those_of_numpy_and_opposites_cancel():
    rng = np.random.default_rng(0)
    vectors, sizes = unit(rng.normal(size=(12, 5))), np.array([1, 4, 2, 5])
    rows = rng.permutation(12)
    means, lengths = mean_vectors(torch.from_numpy(vectors.astype(np.float32)), rows, sizes, CPU)
    sums = np.stack([vectors[part].sum(axis=0) for part in np.split(rows, np.cumsum(sizes)[:-1])])
    np.testing.assert_allclose(means, unit(sums), atol=1e-6)
    np.testing.assert_allclose(lengths, np.linalg.norm(sums, axis=1), atol=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert mean_vectors(opposite, np.arange(2), np.array([2]), CPU)[0].tolist() == [[0.0, 0.0]]  # not NaN


@pytest.mark.parametrize("splits", [("test",), ("test", "train", "val")])
def test_figures_are_shares_of_the_test_splits_queries_in_any_gallery(tmp_path, splits):
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    small_merge.write_merge(cfg, buildings=30, cells=5)
    rows = load(cfg, *splits)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rows.embeddings).float(), dim=1)
    ranks = {"raw": building_level.rank(vectors, rows, 0, 16, CPU, PROGRESS)}
    assert building_level.num_rankings(rows) == 90 + 30
    cells = np.unique(rows.column("cell_id")[: rows.num_queries])
    found = building_level.figures(ranks, rows, cells, np.ones((1, len(cells))), [("trained", "raw")])
    assert found["buildings"] == 30 * len(splits)
    assert found["image_to_building"]["queries"] == 90
    assert found["half_to_half"]["queries"] == 30
    expected = np.array(slow_images(vectors.numpy().astype(np.float64), rows.zones, rows.num_queries))
    figures = found["image_to_building"]["methods"]["raw"]
    for k in (1, 5, 10):
        assert figures[f"recall@{k}"]["value"] == pytest.approx(np.mean(expected <= k))
    assert figures["median_rank"]["value"] == np.median(expected)
    assert found["image_to_building"]["differences"] == {}
    of_halves = ranks["raw"].half_to_half
    assert found["half_to_half"]["methods"]["raw"]["recall@1"]["value"] == pytest.approx(np.mean(of_halves == 1))
    assert 0.05 < np.mean(expected == 1) < 0.95
