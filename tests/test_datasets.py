"""train/datasets.py. Oracles: the definitions, checked pair by pair, and counts of many draws."""

import numpy as np
import pytest
import torch
from conftest import paths_below
from made_up_merge import MODEL, write_merge

from common import config
from common.errors import PipelineError, StaleArtefact
from common.places import geo
from common.places.zones import make_zones
from difficulty import compute_visual_neighbors
from train import datasets, run_record
from train.datasets import Sampler, make_rows, negatives_of, positives_of, random_rows, relations, restrict
from train.linear import whitening

CPU = torch.device("cpu")
METRES = 1 / geo.METRES_PER_DEGREE


def rows_of(sizes, north_m, panoramas=None, neighbors=None, offsets=None, radius_m=25.0):
    """TrainRows of buildings with so many images each, at so many metres north."""
    building = np.repeat(np.arange(len(sizes)), sizes)
    n = len(building)
    columns = {
        "street_view_id": np.arange(n) if panoramas is None else np.asarray(panoramas),
        "target_lat": np.asarray(north_m, np.float64)[building] * METRES,
        "target_lon": np.zeros(n),
    }
    neighbors = np.full((n, 4), -1, np.int32) if neighbors is None else np.asarray(neighbors, np.int32)
    offsets = np.zeros((n, 4), np.uint8) if offsets is None else np.asarray(offsets, np.uint8)
    return make_rows(np.zeros((n, 2), np.float16), neighbors, offsets, building, columns, radius_m, CPU)


def uniform(n, seed=0):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts(values, n):
    return torch.bincount(values, minlength=n) / len(values)


def test_positives_come_from_another_panorama_if_there_is_one():
    #             building 0         building 1: one panorama
    rows = rows_of([4, 3], [0, 1000], panoramas=[7, 9, 7, 8, 5, 5, 5])
    for anchor, expected in {0: [1, 3], 2: [1, 3], 1: [0, 2, 3], 3: [0, 1, 2], 4: [5, 6], 5: [4, 6]}.items():
        drawn = positives_of(rows, torch.full((3000,), anchor), uniform(3000))
        shares = counts(drawn, 7)
        assert shares.nonzero().squeeze(1).tolist() == expected
        np.testing.assert_allclose(shares[expected], 1 / len(expected), atol=0.04)  # 3000 draws: sd 0.009


def test_random_negatives_are_uniform_over_what_lies_outside_the_zone():
    # buildings at 0, 10, 500, 20 and 900 m north: 0, 1 and 3 are each other's zone, and not neighbours by number
    rows = rows_of([2, 3, 2, 4, 2], [0, 10, 500, 20, 900])
    allowed = {0: [5, 6, 11, 12], 5: [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12], 12: list(range(11))}
    for anchor, expected in allowed.items():
        drawn = random_rows(rows, torch.full((20_000,), anchor), uniform(20_000))
        shares = counts(drawn, 13)
        assert shares.nonzero().squeeze(1).tolist() == expected
        np.testing.assert_allclose(shares[expected], 1 / len(expected), atol=0.02)
    edge = torch.tensor([1 - 2.0**-53] * 3, dtype=torch.float64)  # the largest number below 1 that is drawn
    assert random_rows(rows, torch.tensor([0, 5, 12]), edge).tolist() == [12, 12, 10]


def test_random_negatives_equal_the_zones_on_a_random_map():
    rng = np.random.default_rng(0)
    sizes, north_m = rng.integers(2, 6, 80), rng.uniform(0, 1_500, 80)
    rows = rows_of(sizes, north_m)
    zones = make_zones(
        rows.building_of_row.numpy(), north_m[rows.building_of_row] * METRES, np.zeros(sizes.sum()), 25
    )
    for anchor in rng.integers(0, sizes.sum(), 30):
        forbidden = zones.rows_of(np.array([anchor]), own=True)[1]
        drawn = random_rows(rows, torch.full((20_000,), int(anchor)), uniform(20_000, int(anchor)))
        assert sorted(set(drawn.tolist())) == np.setdiff1d(np.arange(sizes.sum()), forbidden).tolist()


def test_negatives_come_from_the_band_or_the_nearest_that_is_not_empty_and_are_credited_to_it():
    neighbors = [[10, 11, 12, 13], [10, 11, 12, 13], [-1] * 4, [10, -1, -1, -1]] + [[-1] * 4] * 10
    offsets = [[0, 1, 3, 4], [0, 2, 2, 4], [0, 0, 0, 0], [0, 0, 1, 1]] + [[0] * 4] * 10  # three bands
    rows = rows_of([2] * 7, np.arange(7) * 1000, neighbors=neighbors, offsets=offsets)
    cases = {  # (anchor, arm): (the negatives that can be drawn, the band credited)
        (0, 0): ([10], 0),
        (0, 1): ([11, 12], 1),
        (0, 2): ([13], 2),
        (1, 1): ([10, 11], 0),  # empty: of the two nearest the harder
        (1, 2): ([12, 13], 2),
        (3, 0): ([10], 1),
        (3, 2): ([10], 1),
    }
    for (anchor, arm), (expected, credited) in cases.items():
        anchors, arms = torch.full((200,), anchor), torch.full((200,), arm)
        negatives, arm_of = negatives_of(rows, anchors, arms, uniform(200), uniform(200, 1))
        assert sorted(set(negatives.tolist())) == expected
        assert set(arm_of.tolist()) == {credited}
    for anchor, arm in ((2, 0), (0, 3)):  # without neighbours, and the arm `random` itself
        negatives, arm_of = negatives_of(
            rows, torch.full((500,), anchor), torch.full((500,), arm), uniform(500), uniform(500, 1)
        )
        assert set(arm_of.tolist()) == {3}
        assert len(set(negatives.tolist())) == 12


def test_batches_are_valid_triplets_with_every_building_once_per_pass():
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 6, 50)
    rows = rows_of(sizes, np.arange(50) * 12.0)
    sampler = Sampler(rows, batch_size=20, groups=5, seed=3)
    anchors = torch.cat([sampler.draw(step, np.full(5, 3)).anchors for step in range(5)])
    assert (torch.bincount(rows.building_of_row[anchors]) == 2).all()  # 100 anchors: two passes over 50 buildings
    for step in range(5):
        batch = sampler.draw(step, np.full(5, 3))
        a, p, n = (rows.building_of_row[side] for side in (batch.anchors, batch.positives, batch.negatives))
        assert (a == p).all()
        assert (batch.anchors != batch.positives).all()
        assert ((a - n).abs() * 12 > 25).all()


def test_a_step_draws_the_same_whatever_was_drawn_before():
    rows = rows_of([2] * 30, np.arange(30) * 100.0)
    one, other = (Sampler(rows, 16, 4, seed=5) for _ in range(2))
    for step in range(7):
        one.draw(step, np.full(4, 3))
    for ours, theirs in zip(
        vars(one.draw(7, np.full(4, 3))).values(), vars(other.draw(7, np.full(4, 3))).values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not torch.equal(one.draw(8, np.full(4, 3)).rows, one.draw(7, np.full(4, 3)).rows)


def test_more_anchors_than_buildings_and_groups_that_do_not_divide_the_batch():
    sampler = Sampler(rows_of([2, 2, 2], [0, 1000, 2000]), batch_size=10, groups=4, seed=0)
    assert sampler.draw(3, np.full(4, 3)).anchors.shape == (10,)
    assert torch.bincount(sampler.group_of_anchor).tolist() == [3, 2, 3, 2]


def test_relations_are_those_of_buildings_images_and_the_zone():
    rows = rows_of([2, 2, 2], [0, 10, 1000])
    batch = torch.tensor([0, 1, 2, 4, 0])
    positive, negative = relations(rows, batch, batch)
    assert positive.int().tolist() == [
        [0, 1, 0, 0, 0],  # the same image again is no positive
        [1, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
    ]
    assert negative.int().tolist() == [  # row 2 is 10 m from rows 0 and 1
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [1, 1, 1, 0, 1],
        [0, 0, 0, 1, 0],
    ]
    for of_two, of_all in zip(relations(rows, batch[1:3], batch), (positive, negative), strict=True):
        assert torch.equal(of_two, of_all[1:3])


def test_restriction_renumbers_neighbours_and_shrinks_their_bands():
    neighbors = np.array([[2, 4, 5, 3], [0, 4, -1, -1], [0, 1, 5, -1]] + [[0] * 4] * 3)
    offsets = np.array([[0, 1, 3, 4], [0, 1, 2, 2], [0, 0, 2, 3]] + [[0] * 4] * 3, np.uint8)
    found, bands = restrict(neighbors, offsets, np.array([0, 2, 5]))
    assert found.tolist() == [[1, 2, -1, -1], [0, 2, -1, -1], [0, 0, 0, 0]]
    assert bands.tolist() == [[0, 1, 2, 2], [0, 0, 1, 2], [0, 0, 0, 0]]


def test_buildings_of_one_image_and_a_zone_that_holds_everything_are_errors():
    with pytest.raises(PipelineError, match="single image"):
        rows_of([2, 1], [0, 1000])
    with pytest.raises(PipelineError, match="ignore_radius_m"):
        rows_of([2, 2], [0, 10])


@pytest.fixture
def settings(tmp_path):
    write_merge(paths_below(tmp_path).merged_dir)
    chosen = [
        f"paths.root={tmp_path}",
        "data.neighbors=20",
        "training_model.output_dim=8",
        "training.val_max_queries=50",
    ]
    compute_visual_neighbors.main([flag for setting in chosen for flag in ("--set", setting)])
    return chosen


def test_loading_takes_a_seeded_sample_of_queries_and_of_buildings(settings, monkeypatch):
    cfg = config.load(None, settings)
    data = datasets.load_data(cfg)
    assert len(data.validation.query_rows) == 50
    assert data.embedding_model == MODEL
    assert data.inputs == run_record.input_ids(cfg)
    chosen = data.baselines["whitening"]
    tried = chosen["map@r_by_shrinkage"]
    assert set(tried) == set(cfg.training_model.whitening_shrinkage)
    assert tried[chosen["shrinkage"]] == chosen["validation"]["map@r"] == max(tried.values())
    assert len(set(tried.values())) > 1
    part = datasets.load_data(config.load(None, [*settings, "training.sample_buildings=40"]))
    assert len(part.train.starts) == 41
    assert part.validation.query_rows.tolist() == data.validation.query_rows.tolist()
    near = part.train.neighbor_rows
    assert near.max() < len(part.train.embeddings)
    valid = (near >= 0).sum(dim=1)
    assert torch.equal(valid, part.train.band_offsets[:, -1].long())
    kept = torch.from_numpy(datasets.sample_of_buildings(data.train.building_of_row.numpy(), 40, cfg.global_.seed))
    whole = data.train.neighbor_rows[kept]
    for i in range(0, len(kept), 17):  # what is left of the neighbours, in the same order
        expected = [row for row in whole[i].tolist() if row in set(kept.tolist())]
        assert kept[near[i][: valid[i]].long()].tolist() == expected
    monkeypatch.setattr(whitening, "moments", None)  # those of both samples are stored
    assert datasets.load_data(cfg).baselines["whitening"]["map@r_by_shrinkage"] == tried
    sampled = datasets.load_data(config.load(None, [*settings, "training.sample_buildings=40"])).baselines["pca"]
    assert torch.equal(sampled["projection"], part.baselines["pca"]["projection"])
    assert not torch.equal(sampled["projection"], data.baselines["pca"]["projection"])


def test_difficulty_of_another_merge_or_of_other_settings_is_refused(settings, tmp_path):
    with pytest.raises(StaleArtefact, match=r"difficulty_metadata\.parquet was made with data\.neighbors = 20"):
        run_record.input_ids(config.load(None, [*settings, "data.neighbors=30"]))
    write_merge(paths_below(tmp_path).merged_dir, seed=1)
    with pytest.raises(StaleArtefact, match=r"made from an earlier version of train\.parquet"):
        run_record.input_ids(config.load(None, settings))


def test_splits_of_two_merges_are_refused_and_an_empty_one_is_told(settings, tmp_path):
    other = tmp_path / "other"
    write_merge(other, seed=1)
    (other / "val.parquet").rename(paths_below(tmp_path).merged_dir / "val.parquet")
    with pytest.raises(StaleArtefact, match=r"train\.parquet come from different merge runs: val .*seed"):
        run_record.input_ids(config.load(None, settings))
    write_merge(paths_below(tmp_path).merged_dir, streets=(12, 0, 6))
    with pytest.raises(PipelineError, match=r"val\.parquet has no rows: check data\.train_ratio"):
        datasets.load_data(config.load(None, settings))


def test_a_head_wider_than_the_backbone_is_refused(settings):
    with pytest.raises(PipelineError, match="output_dim = 100 exceeds the embeddings' 24"):
        datasets.load_data(config.load(None, [*settings, "training_model.output_dim=100"]))
