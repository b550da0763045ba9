"""Buildings as runs of rows, and the ignore zone: rows of other buildings that may show the same facade.

A building is one target point on a facade. Points a few metres apart are often on one building, so rows of other
buildings within the zone's radius count neither as positives nor as negatives of a row. A building without a
position has no zone.
"""

from typing import NamedTuple

import numpy as np

from common.places import geo

# (indptr (n + 1,) int64, indices int64): row i has indices[indptr[i]:indptr[i + 1]]
Csr = tuple[np.ndarray, np.ndarray]


class Zones(NamedTuple):
    """Which rows belong to each of M buildings, and which buildings lie within the radius of each."""

    building_of_row: np.ndarray  # (N,) int32, 0..M-1, ascending
    starts: np.ndarray  # (M + 1,) int64: building b is the rows starts[b]:starts[b + 1]
    indptr: np.ndarray  # (M + 1,) int64
    buildings: np.ndarray  # int32: the zone of b and itself is buildings[indptr[b]:indptr[b + 1]], ascending

    def rows_of(self, rows: np.ndarray, *, own: bool) -> Csr:
        """The rows in the zone of each of `rows`, ascending, with or without its `own` building (8 bytes each)."""
        own_building = self.building_of_row[rows]
        first, last = self.indptr[own_building], self.indptr[own_building + 1]
        zone = self.buildings[ranges(first, last)]
        of_row = np.repeat(np.arange(len(rows)), last - first)
        if not own:
            other = zone != own_building[of_row]
            zone, of_row = zone[other], of_row[other]
        sizes = self.starts[zone + 1] - self.starts[zone]
        per_row = np.bincount(of_row, weights=sizes, minlength=len(rows)).astype(np.int64)
        return np.concatenate([[0], np.cumsum(per_row)]), ranges(self.starts[zone], self.starts[zone + 1])


def number_buildings(*ids: np.ndarray) -> np.ndarray:
    """Building numbers 0..M-1, (N,) int32, from the columns of their ids. A building's rows must be contiguous."""
    new = np.zeros(len(ids[0]), bool)
    for column in ids:
        column = np.asarray(column)
        new[1:] |= column[1:] != column[:-1]
    return np.cumsum(new, dtype=np.int32)


def make_zones(building_of_row: np.ndarray, lat: np.ndarray, lon: np.ndarray, radius_m: float) -> Zones:
    """The zones of all buildings. `lat`, `lon`: each row's target, in degrees (equal for a building's rows).

    Memory: about 24 bytes for each pair of buildings within the radius (`geo.within`).
    """
    building_of_row = np.asarray(building_of_row, np.int32)
    firsts = np.flatnonzero(np.diff(building_of_row, prepend=-1))
    starts = np.append(firsts, len(building_of_row)).astype(np.int64)
    indptr, buildings = geo.within(np.asarray(lat)[firsts], np.asarray(lon)[firsts], radius_m)
    return Zones(building_of_row, starts, indptr, buildings)


def too_few_outside(radius_m: float) -> str:
    """What to do if a building has no others outside its zone."""
    return "lower data.ignore_radius_m, or use more of the map" if radius_m else "use more buildings"


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The concatenation of the ranges first[i]..last[i]-1, int64."""
    sizes = np.asarray(last, np.int64) - first
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - sizes), sizes)
