"""The rows of the intermediates that photographs become: ids, positions, and which count as one view."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from common.places import geo
from common.schemas import Reject, Rejected
from preprocess.photographs.photo_listing import TEXTS
from preprocess.tars.jpegs import Jpeg

_ENOUGH = 300  # buildings of which a tenth is a test that tells something
FIRST_DATASET, NUM_DATASETS = 1_000, 9_000  # above the numbers of the dataset's tars
_RANGES = {
    "latitude": (Reject.POSITION_OUT_OF_RANGE, -90.0, 90.0),
    "longitude": (Reject.POSITION_OUT_OF_RANGE, -180.0, 180.0),
    "target_latitude": (Reject.POSITION_OUT_OF_RANGE, -90.0, 90.0),
    "target_longitude": (Reject.POSITION_OUT_OF_RANGE, -180.0, 180.0),
    "heading": (Reject.ANGLE_OUT_OF_RANGE, -180.0, 360.0),
}
_UNKNOWN = "target_height camera_height normal_x normal_y normal_z pitch roll".split()
_POSITIONS = (("latitude", "longitude"), ("target_latitude", "target_longitude"))


def dataset_of(name: str) -> int:
    """The dataset's number of a set, which depends on its name alone."""
    return FIRST_DATASET + xxhash.xxh32_intdigest(name.encode()) % NUM_DATASETS


def normalised(rows: pd.DataFrame) -> pd.DataFrame:
    """The listed rows with their ids filled in, names of buildings in one form of Unicode, and positions of 0, 0,
    which cameras without a fix write, as not known."""
    rows = rows.astype(dict.fromkeys(("name", *TEXTS), "string"))
    rows["id"] = rows["id"].fillna(rows["name"])
    rows["building"] = rows["building"].fillna("").str.normalize("NFC").str.strip()
    for lat, lon in _POSITIONS:
        rows.loc[(rows[lat] == 0) & (rows[lon] == 0), [lat, lon]] = np.nan
    return rows


def reject_of(row: Any, used_ids: set[str]) -> Rejected | None:
    """Why a row of `normalised` cannot be used, whatever its image is; its id is added to `used_ids` if it can."""
    if not row.building:
        return Rejected(Reject.BUILDING_MISSING)
    for name, (reason, low, high) in _RANGES.items():
        value = getattr(row, name)
        if not (np.isnan(value) or low <= value <= high):
            return Rejected(reason, f"{name} = {value}")
    for lat, lon in _POSITIONS:
        if np.isnan(getattr(row, lat)) != np.isnan(getattr(row, lon)):
            return Rejected(Reject.POSITION_OUT_OF_RANGE, f"only one of {lat} and {lon}")
    if row.id in used_ids:
        return Rejected(Reject.DUPLICATE_ID, row.id)
    used_ids.add(row.id)
    return None


def columns(name: str, rows: pd.DataFrame, jpegs: Sequence[Jpeg]) -> dict[str, Any]:
    """The columns of the intermediates of a set, from its valid rows, in order, without where an image is.

    A building is where the first of its rows with a target puts it; if none has one, at the mean of its cameras.
    """
    known = _targets(rows)
    target = known.where(known.notna(), _mean_cameras(rows))
    north_m, east_m = geo.offsets_m(
        *(rows[name].to_numpy() for name in _POSITIONS[0]), *(known[name].to_numpy() for name in _POSITIONS[1])
    )
    bearing = pd.Series(np.degrees(np.arctan2(east_m, north_m)), rows.index)
    return {
        **dict.fromkeys(_UNKNOWN, np.full(len(rows), np.nan)),
        "dataset_id": np.full(len(rows), dataset_of(name)),
        "target_id": pd.factorize(rows["building"], sort=True)[0],
        "patch_id": rows.index.to_numpy(),  # the number of the photograph in the listing
        "street_view_id": _views(rows),
        "building_id": (name + "_" + rows["building"]).tolist(),
        "streetview_image_id": (name + "_" + rows["id"]).tolist(),
        "target_lat": target["target_latitude"].to_numpy(),
        "target_lon": target["target_longitude"].to_numpy(),
        "camera_lat": rows["latitude"].to_numpy(),
        "camera_lon": rows["longitude"].to_numpy(),
        "distance": np.hypot(north_m, east_m),
        "heading": rows["heading"].fillna(bearing).to_numpy(),
        "aligned": np.zeros(len(rows), bool),
        "width": [jpeg.width for jpeg in jpegs],
        "height": [jpeg.height for jpeg in jpegs],
        "content_hash": np.array([jpeg.content_hash for jpeg in jpegs], np.uint64),
    }


def notes(columns: dict[str, Any]) -> list[str]:
    """What the summary of an import says about the rows."""
    images = pd.Series(columns["target_id"]).value_counts()
    known = geo.is_known(columns["target_lat"], columns["target_lon"])
    located, single = len(np.unique(columns["target_id"][known])), int((images < 2).sum())
    where = f"positions of {located:,}" if located else "no positions"
    buildings = "building" if len(images) == 1 else "buildings"
    lines = [f"{len(images):,} {buildings}, {where}, as dataset {columns['dataset_id'][0]}"]
    if single:
        lines.append(f"buildings with a single photograph, which merge_and_split.py will drop: {single:,}")
    if len(images) - single < _ENOUGH:
        lines.append(f"three splits need three buildings, better {_ENOUGH} (30 each to validate and to test)")
    return lines


def _targets(rows: pd.DataFrame) -> pd.DataFrame:
    """The position that is given for each row's building, NaN if none is."""
    return rows.groupby("building")[list(_POSITIONS[1])].transform("first")


def _mean_cameras(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean position of the cameras of each row's building, as target; on both sides of 180 degrees, too."""
    buildings = rows["building"]
    first = rows.groupby("building")["longitude"].transform("first")
    east = (rows["longitude"] - first + 180) % 360 - 180
    lat = rows["latitude"].groupby(buildings).transform("mean")
    lon = (first + east.groupby(buildings).transform("mean") + 180) % 360 - 180
    return pd.DataFrame({"target_latitude": lat, "target_longitude": lon})


def _views(rows: pd.DataFrame) -> np.ndarray:
    """(N,) int64: the panorama of each row. Rows without one share a view if they are of one building, camera and
    date, one of which must be given."""
    own = "row " + rows.index.to_series().astype("string")
    given = rows["camera"].notna() | rows["date"].notna()
    session = "of " + rows["building"].str.cat(rows[["camera", "date"]], sep="\t", na_rep="<NA>")
    keys = ("panorama " + rows["panorama"]).fillna(session.where(given, own))
    return pd.factorize(keys)[0]
