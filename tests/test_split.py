"""preprocess/split/split_rules.py, and the cells of common/places/geo.py. Oracle: layouts that one can see, and
what may not leak.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from invented_city import METRE, city, data, images_of

from common.places import geo
from preprocess.split import split_report, split_rules

NONE_OF_1000 = np.zeros(1000, bool)


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


@pytest.mark.parametrize(
    ("lat", "lon"), [(65.0, 180.0), (-17.0, -180.0), (0.0, 179.99995), (89.9999, 30.0), (-90.0, 0.0)]
)
def test_cells_near_reach_over_the_180th_meridian_and_the_poles(lat, lon):
    rng = np.random.default_rng(0)
    # oracle: points on a sphere around this one, by their distance
    xyz = geo.to_xyz_m(lat, lon) + rng.uniform(-150, 150, (4000, 3))
    xyz *= geo.EARTH_RADIUS_M / np.linalg.norm(xyz, axis=1, keepdims=True)
    lats = np.degrees(np.arcsin(xyz[:, 2] / geo.EARTH_RADIUS_M))
    lons = np.degrees(np.arctan2(xyz[:, 1], xyz[:, 0]))
    is_near = geo.distance_m(lat, lon, lats, lons) <= 130.0
    expected = set(geo.cell_ids(lats, lons, 100.0)[is_near].tolist())
    found = {int(ids[0]) for ids in geo.cells_near(np.array([lat]), np.array([lon]), 100.0, 130.0)}
    assert len(expected) > 3
    assert expected <= found
    if abs(lat) < 80:
        assert len(found) <= len(expected) + 4


def test_180_and_minus_180_degrees_are_one_place():
    lat = np.array([0.0, 12.3, -65.0, 90.0])
    east, west = (geo.cell_ids(lat, np.full(4, lon), 1000.0) for lon in (180.0, -180.0))
    assert east.tolist() == west.tolist()


def test_cells_go_to_the_split_that_is_furthest_below_its_ratio():
    cells, found = split_rules.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), 0, NONE_OF_1000)
    assert np.bincount(found).tolist() == [800, 100, 100]
    assert cells.tolist() == list(range(1000))
    again = split_rules.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), 0, NONE_OF_1000)[1]
    other = split_rules.assign_cells(np.arange(1000), np.full(1000, 7), (0.8, 0.1, 0.1), 1, NONE_OF_1000)[1]
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    assert (
        split_rules.assign_cells(np.arange(9), np.ones(9), (0.5, 0.0, 0.5), 0, NONE_OF_1000[:9])[1]
        .tolist()
        .count(split_rules.VAL)
        == 0
    )


def test_buildings_are_split_by_their_images():
    sizes = np.random.default_rng(0).integers(0, 8, 10_000)
    found = split_rules.assign_buildings(sizes, (0.8, 0.1, 0.1), 0, np.zeros(10_000, bool))
    shares = np.bincount(found, sizes) / sizes.sum()
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=1e-3)


def test_a_shared_panorama_stays_in_the_last_split():
    T, V, E = split_rules.TRAIN, split_rules.VAL, split_rules.TEST
    splits, dataset, view = np.array([T, V, T, V, E, T, E]), [1, 1, 1, 1, 1, 1, 2], [1, 1, 2, 3, 3, 4, 4]
    drop = split_rules.shared_with_later_split(splits, np.array(dataset), np.array(view))
    assert drop.tolist() == [True, False, False, True, False, False, False]  # view 4 is another in dataset 2
    assert split_rules.count_in_two_splits(splits, np.array(dataset), np.array(view)) == 2
    assert split_rules.count_in_two_splits(splits[~drop], np.array(dataset)[~drop], np.array(view)[~drop]) == 0


@pytest.mark.parametrize("split_by", ["geo", "building"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks_and_every_drop_is_counted(seed, split_by):
    settings = data(split_cell_m=250, split_by=split_by)
    images = images_of(city(seed))
    found = split_rules.decide(images, settings, seed)
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
    first = split_rules.decide(images_of(frame), data(split_cell_m=250), 0)
    again = split_rules.decide(images_of(frame.sample(frac=1, random_state=9)), data(split_cell_m=250), 0)
    other = split_rules.decide(images_of(frame), data(split_cell_m=250), 1)
    assert np.array_equal(first.split, again.split)
    assert not np.array_equal(first.split, other.split)


@pytest.mark.parametrize("split_by", ["geo", "building"])
def test_images_of_which_none_is_left_before_the_split_are_all_counted(split_by):
    frame = city(buildings=20)
    frame["has_embedding"] = False
    decision = split_rules.decide(images_of(frame), data(split_by=split_by), seed=0)
    assert (decision.split == split_rules.NONE).all()
    assert {reason: n for reason, n in decision.dropped.items() if n} == {"embedding_missing": len(frame)}


def test_no_images_are_split_into_nothing():
    found = split_rules.decide(images_of(city().head(0)), data(), 0)
    assert len(found.split) == 0
    assert sum(found.dropped.values()) == 0


@pytest.mark.parametrize("split_by", ["geo", "building"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_in_test_and_nothing_of_it_anywhere_else(seed, split_by):
    frame = city(seed, side_m=4_000)
    rng = np.random.default_rng(seed)
    # of every tenth building an image is held out; of half of these, no image has an embedding
    frame["has_embedding"] = (frame["target_id"] % 20 > 0) & (rng.random(len(frame)) > 0.1)
    settings, images = data(split_cell_m=250, split_by=split_by), images_of(frame)
    building = pd.DataFrame({"dataset": images.dataset_id, "target": images.target_id})
    held_out = (~building.duplicated() & (building["target"] % 10 == 0)).to_numpy()
    found = split_rules.decide(images, settings, seed, held_out)
    frame = pd.DataFrame({"split": found.split, "building": found.building, "cell": found.cell, "held": held_out})
    for name in ("dataset_id", "street_view_id", "content_hash", "target_lat", "target_lon"):
        frame[name] = getattr(images, name)
    assert (frame["held"] & (found.split == split_rules.NONE)).any()
    trained = frame[frame["split"].isin([split_rules.TRAIN, split_rules.VAL])]
    keys = [["building"], ["dataset_id", "street_view_id"], ["content_hash"]]
    for key in [*keys, *[["cell"]] * (split_by == "geo")]:
        assert trained.merge(frame.loc[frame["held"], key].drop_duplicates()).empty
    if split_by == "geo":  # the nearest other image is beyond the buffer, also of a building that has none left
        apart = geo.distance_m(
            *(trained[name].to_numpy()[:, None] for name in ("target_lat", "target_lon")),
            *(frame.loc[frame["held"], name].to_numpy()[None] for name in ("target_lat", "target_lon")),
        )
        assert apart.min() > settings.split_buffer_m
    assert (frame["held"] & (found.split == split_rules.TEST)).sum() > 0.2 * held_out.sum()
    sizes = np.bincount(found.split[found.split >= 0], minlength=3)
    assert sizes.min() > 0
    report = split_report.summarise(images, found, settings, split_rules.HeldOut(99, held_out))["held_out"]
    assert report["listed"] == 99
    assert report["found"] == held_out.sum()
    assert report["buildings"] == frame.loc[held_out, "building"].nunique()
    assert report["kept_in_test"] == (frame["held"] & (found.split == split_rules.TEST)).sum()
    assert set(report["in_train_or_val"].values()) == {0}
    # without the rule some would be trained on, and the proof would say so
    plain = split_rules.decide(images, settings, seed)
    report = split_report.summarise(images, plain, settings, split_rules.HeldOut(99, held_out))["held_out"]
    assert min(report["in_train_or_val"][what] for what in ("buildings", "panoramas")) > 0


def test_nothing_held_out_changes_nothing():
    images, settings = images_of(city()), data(split_cell_m=250)
    none = np.zeros(len(images), bool)
    assert np.array_equal(
        split_rules.decide(images, settings, 0).split, split_rules.decide(images, settings, 0, none).split
    )


def test_what_is_held_out_counts_towards_the_ratio_of_test():
    held_out, sizes = np.arange(1000) < 50, np.full(1000, 7)
    _, by_cells = split_rules.assign_cells(np.arange(1000), sizes, (0.8, 0.1, 0.1), 0, held_out)
    by_buildings = split_rules.assign_buildings(sizes, (0.8, 0.1, 0.1), 0, held_out)
    for found in (by_cells, by_buildings):
        assert np.bincount(found).tolist() == [800, 100, 100]
        assert (found[held_out] == split_rules.TEST).all()
    more = np.arange(1000) < 300  # than test is to have: nothing is added
    _, by_cells = split_rules.assign_cells(np.arange(1000), sizes, (0.8, 0.1, 0.1), 0, more)
    by_buildings = split_rules.assign_buildings(sizes, (0.8, 0.1, 0.1), 0, more)
    for found in (by_cells, by_buildings):
        assert np.array_equal(found == split_rules.TEST, more)
        assert np.allclose(
            np.bincount(found), [700 * 8 / 9, 700 / 9, 300], atol=1
        )  # val gets its part of the rest
