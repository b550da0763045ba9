"""Distances in metres, neighbours within a radius, and cells of the map.

The Earth is a sphere of radius 6,371,008.8 m. Over the distances that matter (the ignore zone, 25 m; the buffer
between splits, 50 m) this differs from the WGS84 ellipsoid by less than 0.6 %.

A position that is not known is NaN: it is near nothing, and its cell holds nothing else.
"""

import math
from collections.abc import Iterator

import numpy as np

EARTH_RADIUS_M = 6_371_008.8
METRES_PER_DEGREE = np.pi * EARTH_RADIUS_M / 180.0
OWN_CELLS = 1 << 62  # ids from here on are of no square of the map (see `cells_of_buildings`)
_CELL_COLUMNS = 1 << 32  # more columns than the equator has cells of 1 cm


def to_xyz_m(lat_deg: np.ndarray, lon_deg: np.ndarray) -> np.ndarray:
    """Positions on the sphere, (N, 3) float64, in metres. Straight-line distances between points less than 1 km
    apart equal ground distances to within 1e-9 (relative), in any number of cities.
    """
    lat, lon = np.radians(np.asarray(lat_deg, np.float64)), np.radians(np.asarray(lon_deg, np.float64))
    return EARTH_RADIUS_M * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def distance_m(lat1_deg, lon1_deg, lat2_deg, lon2_deg) -> np.ndarray:
    """Straight-line distances in metres, elementwise (shapes broadcast)."""
    return np.linalg.norm(to_xyz_m(lat1_deg, lon1_deg) - to_xyz_m(lat2_deg, lon2_deg), axis=-1)


def offsets_m(lat1_deg, lon1_deg, lat2_deg, lon2_deg) -> tuple[np.ndarray, np.ndarray]:
    """How far the second points are north and east of the first, in metres, elementwise. On a plane: for points up
    to about 10 km apart.
    """
    lat = np.asarray(lat2_deg) - lat1_deg
    lon = (np.asarray(lon2_deg) - lon1_deg + 180) % 360 - 180
    return METRES_PER_DEGREE * lat, METRES_PER_DEGREE * lon * np.cos(np.radians(np.asarray(lat1_deg) + lat / 2))


def is_known(lat_deg: np.ndarray, lon_deg: np.ndarray) -> np.ndarray:
    """(N,) bool: which positions are known."""
    return ~(np.isnan(lat_deg) | np.isnan(lon_deg))


def within(lat_deg: np.ndarray, lon_deg: np.ndarray, radius_m: float) -> tuple[np.ndarray, np.ndarray]:
    """All points within `radius_m` (inclusive) of each of N points, including itself, as a CSR pair.

    Returns (indptr (N + 1,) int64, indices (P,) int32): the neighbours of point i are
    `indices[indptr[i]:indptr[i + 1]]`, ascending. Memory: about 24 bytes for each of the P pairs.
    """
    from scipy.sparse import coo_matrix
    from scipy.spatial import cKDTree

    n, known = len(lat_deg), np.flatnonzero(is_known(lat_deg, lon_deg))
    points = to_xyz_m(lat_deg, lon_deg)[known]
    pairs = np.empty((0, 2), np.int64)
    if len(known):
        pairs = cKDTree(points).query_pairs(radius_m, output_type="ndarray")
        pairs = pairs if len(known) == n else known[pairs]
    everyone = np.arange(n)
    rows = np.concatenate([everyone, pairs[:, 0], pairs[:, 1]])
    columns = np.concatenate([everyone, pairs[:, 1], pairs[:, 0]])
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(n, n)).tocsr()
    graph.sort_indices()
    return graph.indptr.astype(np.int64), graph.indices.astype(np.int32)


def cell_ids(lat_deg: np.ndarray, lon_deg: np.ndarray, cell_m: float) -> np.ndarray:
    """The cell of about `cell_m` x `cell_m` metres that contains each point, (N,) int64.

    row = floor(lat * m_per_degree / cell_m); column = floor(lon * m_per_degree * cos(latitude of the row's
    centre) / cell_m); id = row * 2^32 + column + 2^31. All points of a row share one cosine, so its cells do not
    overlap; the id depends on the point alone, so it agrees between runs and tars.
    """
    row = np.floor(np.asarray(lat_deg, np.float64) * METRES_PER_DEGREE / cell_m)
    lon = np.asarray(lon_deg, np.float64)
    lon = np.where(lon >= 180, lon - 360, np.where(lon < -180, lon + 360, lon))  # 180 and -180 are one meridian
    return _cell_id(row, np.floor(lon * _cells_per_degree(row, cell_m)))


def cells_of_buildings(lat_deg: np.ndarray, lon_deg: np.ndarray, cell_m: float) -> np.ndarray:
    """`cell_ids` of M buildings, (M,) int64; one without a position is a cell by itself: OWN_CELLS + number."""
    known = is_known(lat_deg, lon_deg)
    cells = OWN_CELLS + np.arange(len(known))
    cells[known] = cell_ids(lat_deg[known], lon_deg[known], cell_m)
    return cells


def cells_near(lat_deg: np.ndarray, lon_deg: np.ndarray, cell_m: float, radius_m: float) -> Iterator[np.ndarray]:
    """The cells at least partly within `radius_m` of each of N points: arrays (N,) int64 of ids as in `cell_ids`.
    Together they contain all such cells of every point, some repeatedly, and no others, except within ten radii of
    a pole.
    """
    lat, lon = np.asarray(lat_deg, np.float64), np.asarray(lon_deg, np.float64)
    y = lat * METRES_PER_DEGREE / cell_m  # in cells, like everything below
    own, own_row, reach = cell_ids(lat, lon, cell_m), np.floor(y), radius_m / cell_m
    to_pole = np.cos(np.radians(lat)) * EARTH_RADIUS_M / radius_m if radius_m else np.full(len(lat), np.inf)
    # near a pole the meridians meet: the angle under which the circle is seen from there, or all around
    angle = np.degrees(np.arcsin(np.minimum(1.0, 1.0 / np.maximum(to_pole, 1.0))))
    angle = np.where(to_pole > 1, angle, 180.0)
    for step in range(-math.ceil(reach), math.ceil(reach) + 1):
        row = own_row + step
        away = np.maximum(0.0, np.maximum(row - y, y - (row + 1)))
        row = np.where(away <= reach, row, own_row)
        half_width = np.sqrt(np.maximum(reach**2 - away**2, 0.0))  # also 0 where the row is out of reach
        per_degree = _cells_per_degree(row, cell_m)
        half_width = np.where(to_pole > 10, half_width, angle * per_degree)
        edge = 180 * per_degree
        for turn in (0, -360, 360):  # the second and third: what lies beyond the 180th meridian
            x = (lon + turn) * per_degree
            first = np.floor(np.maximum(x - half_width, -edge))
            last = np.floor(np.minimum(x + half_width, np.nextafter(edge, 0)))
            for offset in range(int(np.max(last - first, initial=-1)) + 1):
                yield np.where(first + offset <= last, _cell_id(row, first + offset), own)


def cell_corners(ids: np.ndarray, cell_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes in degrees of the cells' lower-left and upper-right corners: two (N, 2) arrays."""
    row = np.asarray(ids) // _CELL_COLUMNS
    column = np.asarray(ids) % _CELL_COLUMNS - _CELL_COLUMNS // 2
    lat = np.stack([row, row + 1], axis=-1) * (cell_m / METRES_PER_DEGREE)
    return lat, np.stack([column, column + 1], axis=-1) / _cells_per_degree(row, cell_m)[:, None]


def _cells_per_degree(row: np.ndarray, cell_m: float) -> np.ndarray:
    """The number of cells per degree of longitude in a row, at its centre's latitude."""
    row_lat = np.radians(np.clip((row + 0.5) * cell_m / METRES_PER_DEGREE, -90.0, 90.0))
    return METRES_PER_DEGREE * np.cos(row_lat) / cell_m


def _cell_id(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return row.astype(np.int64) * _CELL_COLUMNS + column.astype(np.int64) + _CELL_COLUMNS // 2
