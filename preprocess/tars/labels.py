"""The dataset's text labels and file names: their fields, or the reason why they cannot be used.

A name is <DatasetID>_<PatchID>_<StreetViewID>_<TargetID>. A label's `d` line has the target second:

    d DatasetID TargetID PatchID StreetViewID  target_lat target_lon target_height  normal_x normal_y normal_z
      camera_lat camera_lon camera_height  distance heading pitch roll

on one line, separated by blanks; an `a` line, if there is one, gives the alignment. Other lines are not read.
label_geometry.py defines distance, heading and pitch.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from common.schemas import Reject, Rejected

_NUM_IDS, _NUM_FIELDS = 4, 17
_ID_LIMIT = 2**63  # ids are stored as int64, the dataset's as int32
_FLOAT32_LIMIT = 3.4028235e38  # larger numbers would be stored as inf
_RANGES = {
    "target_lat": (Reject.POSITION_OUT_OF_RANGE, -90.0, 90.0),
    "target_lon": (Reject.POSITION_OUT_OF_RANGE, -180.0, 180.0),
    "camera_lat": (Reject.POSITION_OUT_OF_RANGE, -90.0, 90.0),
    "camera_lon": (Reject.POSITION_OUT_OF_RANGE, -180.0, 180.0),
    "heading": (Reject.ANGLE_OUT_OF_RANGE, -180.0, 360.0),  # both conventions occur
    "pitch": (Reject.ANGLE_OUT_OF_RANGE, -90.0, 90.0),
    "roll": (Reject.ANGLE_OUT_OF_RANGE, -180.0, 180.0),
    "distance": (Reject.DISTANCE_OUT_OF_RANGE, 1e-3, 10_000.0),
}
NAME_FORM = "not <DatasetID>_<PatchID>_<StreetViewID>_<TargetID>, four whole numbers, before the suffix"
_NAME = re.compile("_".join(["([0-9]{1,19})"] * 4))


class Ids(NamedTuple):
    dataset_id: int
    target_id: int
    patch_id: int
    street_view_id: int


class Label(NamedTuple):
    """The fields of a label: the columns of the intermediates with the same names. Degrees and metres."""

    dataset_id: int
    target_id: int
    patch_id: int
    street_view_id: int
    target_lat: float
    target_lon: float
    target_height: float
    normal_x: float
    normal_y: float
    normal_z: float
    camera_lat: float
    camera_lon: float
    camera_height: float
    distance: float  # horizontal
    heading: float
    pitch: float
    roll: float
    aligned: bool


def parse_name(stem: str) -> Ids | None:
    """The ids in a file's name without its suffix; None if it is not four ids."""
    match = _NAME.fullmatch(stem)
    if match is None:
        return None
    dataset_id, patch_id, street_view_id, target_id = map(int, match.groups())
    ids = Ids(dataset_id, target_id, patch_id, street_view_id)
    return ids if _can_be_stored(ids) else None


def parse_label(content: bytes) -> Label | Rejected:
    """The fields of a label file, or why it is rejected. Never raises."""
    if not content.strip():
        return Rejected(Reject.LABEL_EMPTY)
    try:
        lines = [line.split() for line in content.decode("ascii").splitlines()]
    except UnicodeDecodeError:
        return Rejected(Reject.LABEL_MALFORMED, "not text")
    kinds = [fields[0] if fields else "" for fields in lines]
    if kinds.count("d") != 1:
        return Rejected(Reject.LABEL_MALFORMED, f"{kinds.count('d')} `d` lines")
    _, *fields = lines[kinds.index("d")]
    if len(fields) != _NUM_FIELDS:
        return Rejected(Reject.LABEL_MALFORMED, f"{len(fields)} numbers in the `d` line, not {_NUM_FIELDS}")
    try:
        ids, numbers = list(map(int, fields[:_NUM_IDS])), list(map(float, fields[_NUM_IDS:]))
    except ValueError as error:
        return Rejected(Reject.LABEL_MALFORMED, str(error)[:200])
    if not _can_be_stored(ids) or "_" in "".join(fields):  # which Python takes for a digit separator
        return Rejected(Reject.LABEL_MALFORMED, "an id that is negative, too large or not a plain number")
    label = Label._make((*ids, *numbers, "a" in kinds))
    return _out_of_range(label) or label


def _can_be_stored(ids: Sequence[int]) -> bool:
    """`ids`: the dataset's first."""
    return min(ids) >= 0 and max(ids) < _ID_LIMIT and ids[0] < 2**31


def _out_of_range(label: Label) -> Rejected | None:
    """The first number that is out of range, if there is one."""
    for name, value in zip(label._fields[_NUM_IDS:_NUM_FIELDS], label[_NUM_IDS:], strict=False):
        if not abs(value) <= _FLOAT32_LIMIT:  # true of nan too
            return Rejected(Reject.NOT_FINITE, f"{name} = {value}")
    for name, (reason, low, high) in _RANGES.items():
        value = getattr(label, name)
        if not low <= value <= high:
            return Rejected(reason, f"{name} = {value}")
    return None
