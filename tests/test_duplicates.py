"""preprocess/duplicates/duplicate_rules.py and duplicate_sheet.py. Oracle: the rules as loops over images, and
visible layouts.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from invented_city import city, data, images_of, u64

from preprocess.duplicates import duplicate_rules
from preprocess.split import duplicate_sheet, split_rules

ALL = 2**64 - 1


def test_of_three_in_a_row_the_middle_one_goes():
    # 0 and 4 bits apart, 4 and 8 bits apart, 0 and 8 not: the third is like the second, but that is gone
    hashes = u64([0b0, 0b1111, 0b11111111])
    assert duplicate_rules.within_buildings(np.zeros(3, int), hashes, hashes, 4).tolist() == [-1, 0, -1]


def test_both_hashes_must_be_near_and_other_buildings_do_not_count():
    building = np.array([0, 0, 1, 1, 2])
    phash, dhash = u64([0, 1, 0, 0, 0]), u64([0, ALL, 0, 0, 0])
    assert duplicate_rules.within_buildings(building, phash, dhash, 4).tolist() == [-1, -1, -1, 2, -1]


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
    found = duplicate_rules.within_buildings(building, phash, dhash, 2)
    assert np.array_equal(found, slow_within(building, phash, dhash, 2))
    assert 0 < (found >= 0).sum() < 120


def test_a_building_of_many_equal_pictures_keeps_one():
    same = u64(np.full(100_000, 7))
    like = duplicate_rules.within_buildings(np.zeros(100_000, int), same, same, 4)
    assert like[0] == -1
    assert (like[1:] == 0).all()


def test_equal_bytes_far_apart_are_dropped_and_near_ones_kept():
    xyz = np.array([[0, 0, 0], [20, 0, 0], [40, 0, 0], [900, 0, 0]], float)
    building, content = np.array([0, 0, 1, 2, 3, 3]), u64([5, 6, 5, 6, 7, 7])
    # 5: buildings 0 and 1, 20 m; 6: buildings 0 and 2, 40 m; 7: one building
    drop = duplicate_rules.across_buildings(building, content, xyz, 25)
    assert drop.tolist() == [False, True, False, True, False, False]
    chain = duplicate_rules.across_buildings(np.array([1, 0, 2]).argsort(), u64([5, 5, 5]), xyz[[1, 0, 2]], 25)
    assert chain.tolist() == [True, True, True]  # each within 25 m of the first, but two of them 40 m apart


def test_one_picture_at_a_hundred_thousand_buildings_of_one_place_costs_nothing():
    n = 100_000  # labels of 0/0, say: all pairs of them would take 800 GB
    xyz = np.zeros((n, 3))
    assert not duplicate_rules.across_buildings(np.arange(n), u64(np.full(n, 7)), xyz, 25).any()
    xyz[n // 2 :, 0] = 20
    xyz[-1, 0] = -10  # 30 m from those
    assert duplicate_rules.across_buildings(np.arange(n), u64(np.full(n, 7)), xyz, 25).all()


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
    assert np.array_equal(duplicate_rules.across_buildings(building, content, xyz, 25), expected)
    assert 0 < expected.sum() < 150


def test_lookalikes_share_hashes_but_not_bytes_with_another_building():
    building, content, phash = np.array([0, 0, 1, 2, 3]), u64([1, 2, 3, 4, 4]), u64([8, 8, 8, 9, 9])
    assert duplicate_rules.count_lookalikes(building, content, phash, phash) == 3


# ------------------------------------------------------------------------------------------------------- the sheet


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
    found = split_rules.decide(images, data(split_cell_m=250), 0)
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
    found = split_rules.decide(images, data(split_cell_m=250), 0)
    groups = [g for g in duplicate_sheet.largest_groups(images, found) if images.target_id[g.rows[0]] == 7]
    assert [images.patch_id[group.rows].tolist() for group in groups] == [
        [9_000, 9_003, 9_004, 9_005, 9_008],  # each group with the picture that was kept first
        [9_001, 9_002, 9_006, 9_007],
    ]
    assert [group.size for group in groups] == [4, 3]
