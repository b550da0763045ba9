"""common/places/geo.py. Oracle: the haversine formula, and all pairs by brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.places import geo


def haversine_m(lat1, lon1, lat2, lon2):
    lat1, lon1, lat2, lon2 = map(np.radians, (lat1, lon1, lat2, lon2))
    h = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    return 2 * geo.EARTH_RADIUS_M * np.arcsin(np.sqrt(h))


def test_a_degree_of_latitude_is_111_km_and_one_of_longitude_half_that_at_60_north():
    assert abs(geo.METRES_PER_DEGREE - 111_195) < 1
    assert abs(geo.distance_m(60.0, 10.0, 60.0, 10.001) - 55.6) < 0.1


@given(st.floats(-85, 85), st.floats(-180, 180), st.floats(-0.005, 0.005), st.floats(-0.005, 0.005))
def test_distances_equal_haversine(lat, lon, dlat, dlon):
    expected = haversine_m(lat, lon, lat + dlat, lon + dlon)
    # atol: float64 positions of 6.4e6 m resolve 1e-9 m, haversine's own cancellation is larger
    assert np.isclose(geo.distance_m(lat, lon, lat + dlat, lon + dlon), expected, rtol=1e-6, atol=1e-4)


def test_within_equals_all_pairs_in_several_cities_and_across_the_date_line():
    rng = np.random.default_rng(0)
    centres = np.array([(48.85, 2.35), (-33.87, 151.21), (0.0, 179.9999)])[rng.integers(0, 3, 300)]
    lat, lon = (centres + rng.uniform(-5e-4, 5e-4, (300, 2))).T
    lon = (lon + 180) % 360 - 180
    indptr, indices = geo.within(lat, lon, 25.0)
    near = haversine_m(lat[:, None], lon[:, None], lat[None], lon[None]) <= 25.0
    for i in range(300):
        assert indices[indptr[i] : indptr[i + 1]].tolist() == np.flatnonzero(near[i]).tolist()


def test_within_of_nothing_and_of_one_point():
    assert [len(part) for part in geo.within(np.empty(0), np.empty(0), 25.0)] == [1, 0]
    assert geo.within(np.array([1.0]), np.array([2.0]), 0.0)[1].tolist() == [0]


def test_identical_points_are_within_zero_metres_of_each_other():
    assert geo.within(np.ones(3), np.ones(3), 0.0)[1].tolist() == [0, 1, 2] * 3


def test_cells_are_about_as_large_as_asked_and_points_of_one_cell_lie_together():
    rng = np.random.default_rng(1)
    lat, lon = 48.8 + rng.uniform(0, 0.02, 20_000), 2.3 + rng.uniform(0, 0.02, 20_000)
    cells = geo.cell_ids(lat, lon, 200.0)
    for cell in np.unique(cells):
        inside = cells == cell
        height = np.ptp(lat[inside]) * geo.METRES_PER_DEGREE
        width = np.ptp(lon[inside]) * geo.METRES_PER_DEGREE * np.cos(np.radians(48.81))
        assert height <= 200.1
        assert width <= 200.1
    area_m2 = 0.02**2 * geo.METRES_PER_DEGREE**2 * np.cos(np.radians(48.81))
    assert area_m2 / 200**2 <= len(np.unique(cells)) <= 1.35 * area_m2 / 200**2  # the rim's cells are cut


@given(st.floats(-90, 90), st.floats(-180, 180), st.floats(1, 1e5))
def test_a_cell_depends_on_the_point_alone(lat, lon, cell_m):
    alone = geo.cell_ids(np.array([lat]), np.array([lon]), cell_m)[0]
    among_others = geo.cell_ids(np.array([10.0, lat]), np.array([20.0, lon]), cell_m)[1]
    assert alone == among_others
