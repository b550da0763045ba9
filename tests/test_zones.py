"""common/places/zones.py. Oracle: every pair of rows compared by distance."""

from itertools import pairwise

import numpy as np
import pytest

from common.places import geo
from common.places.zones import make_zones, number_buildings, ranges

METRES = 1 / geo.METRES_PER_DEGREE


def lists(csr):
    indptr, indices = csr
    return [indices[first:last].tolist() for first, last in pairwise(indptr)]


def ignored(building, lat, lon, radius_m):
    """For each row the rows of other buildings in its zone."""
    return lists(make_zones(building, lat, lon, radius_m).rows_of(np.arange(len(building)), own=False))


def test_zones_that_one_can_see():
    building = number_buildings(np.array([88, 88, 88, 88, 89]), np.array([1, 1, 2, 3, 3]))
    assert building.tolist() == [0, 0, 1, 2, 3]  # target 3 of data set 89 is another than that of 88
    lat = np.array([0, 0, 20, 40, 40_000]) * METRES
    assert ignored(building, lat, np.zeros(5), 25) == [[2], [2], [0, 1, 3], [2], []]
    zones = make_zones(building, lat, np.zeros(5), 25)
    assert lists(zones.rows_of(np.array([3, 0]), own=False)) == [[2], [2]]
    assert lists(zones.rows_of(np.array([1, 4]), own=True)) == [[0, 1, 2], [4]]


def test_points_on_one_spot_are_in_each_others_zone_though_the_radius_is_0():
    assert ignored(np.array([0, 1, 2]), np.array([0, 0, 1.0]), np.zeros(3), 0.0) == [[1], [0], []]


@pytest.mark.parametrize("seed", range(3))
def test_equals_all_pairs_on_a_random_map(seed):
    rng = np.random.default_rng(seed)
    building = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    lat, lon = (rng.uniform(0, 300 * METRES, 60)[building] for _ in range(2))
    xyz_m = geo.to_xyz_m(lat, lon)
    near = np.linalg.norm(xyz_m[:, None] - xyz_m[None], axis=-1) <= 40
    expected = near & (building[:, None] != building[None])
    assert ignored(building, lat, lon, 40) == [np.flatnonzero(row).tolist() for row in expected]


def test_ranges_one_after_the_other():
    assert ranges(np.array([5, 0, 9]), np.array([7, 0, 12])).tolist() == [5, 6, 9, 10, 11]
    assert len(ranges(np.array([], int), np.array([], int))) == 0
