"""preprocess/labels.py. Oracle: the numbers that the label was written from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schemas import Reject
from preprocess.labels import Ids, Label, Rejected, parse_label, parse_name

GOOD = [88, 1234, 567, 9, 40.7, -73.9, 12.5, 0.1, -0.9, 0.0, 40.71, -73.91, 14.0, 15.2, 359.0, -3.5, 0.0]


def line(**changes) -> bytes:
    values = [changes.get(name, value) for name, value in zip(Label._fields, GOOD, strict=False)]
    return ("d " + " ".join(map(str, values)) + "\n").encode()


def test_the_target_is_second_in_a_label_and_last_in_a_name():
    assert parse_label(line())[:4] == (88, 1234, 567, 9)
    assert parse_name("0088_567_9_1234") == Ids(dataset_id=88, target_id=1234, patch_id=567, street_view_id=9)


def test_an_a_line_before_or_after_makes_it_aligned():
    assert not parse_label(line()).aligned
    assert parse_label(line() + b"a 1 2 3\n").aligned
    assert parse_label(b"a 1 2 3\r\n" + line()).aligned


finite32 = st.floats(-1e6, 1e6)


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4),
    st.lists(finite32, min_size=7, max_size=7),
    st.tuples(st.floats(-90, 90), st.floats(-180, 180), st.floats(-90, 90), st.floats(-180, 180)),
    st.tuples(st.floats(0.01, 10_000), st.floats(-180, 360), st.floats(-90, 90), st.floats(-180, 180)),
    st.sampled_from([" ", "\t", "  \t "]),
    st.sampled_from(["{!r}", "{:.17e}"]),
)
def test_what_was_written_is_read(ids, free, positions, last, blank, number):
    lat, lon, camera_lat, camera_lon = positions
    numbers = [lat, lon, free[0], *free[1:4], camera_lat, camera_lon, free[4], *last]
    text = blank.join(["d", *map(str, ids), *(number.format(value) for value in numbers)])
    assert parse_label(text.encode()) == Label(*ids, *numbers, aligned=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reject.LABEL_EMPTY),
        (b" \n\t\r\n", Reject.LABEL_EMPTY),
        (b"a 1 2 3\n", Reject.LABEL_MALFORMED),
        (line() + line(), Reject.LABEL_MALFORMED),  # which one counts?
        (line(roll=""), Reject.LABEL_MALFORMED),
        (line(patch_id="5.0"), Reject.LABEL_MALFORMED),
        (line(patch_id="1_0"), Reject.LABEL_MALFORMED),  # Python's int() takes it
        (line(patch_id=-1), Reject.LABEL_MALFORMED),
        (line(patch_id=2**63), Reject.LABEL_MALFORMED),
        (line(patch_id="9" * 5000), Reject.LABEL_MALFORMED),
        (line(dataset_id=2**31), Reject.LABEL_MALFORMED),
        (bytes(500), Reject.LABEL_MALFORMED),
        ("d é".encode(), Reject.LABEL_MALFORMED),
        (line(target_lat="nan"), Reject.NOT_FINITE),
        (line(target_height="1e39"), Reject.NOT_FINITE),  # inf as float32
        (line(camera_lat=-90.1), Reject.POSITION_OUT_OF_RANGE),
        (line(heading=360.1), Reject.ANGLE_OUT_OF_RANGE),
        (line(pitch=91), Reject.ANGLE_OUT_OF_RANGE),
        (line(distance=0.0), Reject.DISTANCE_OUT_OF_RANGE),
        (line(distance=10_001), Reject.DISTANCE_OUT_OF_RANGE),
    ],
)
def test_every_bad_label_has_its_reason(content, reason):
    assert parse_label(content).reason is reason


@given(st.one_of(st.binary(), st.text().map(str.encode), st.binary().map(lambda tail: line()[:40] + tail)))
def test_no_bytes_make_it_raise(content):
    assert isinstance(parse_label(content), (Label, Rejected))


@pytest.mark.parametrize(
    "stem", ["cover", "0088_1_2", "0088_1_2_3_4", "._0088_1_2_3", "0088_1_2_x", "0088_1_2_-3"]
)
def test_other_names_are_not_ids(stem):
    assert parse_name(stem) is None


@given(st.text())
def test_no_name_makes_it_raise(stem):
    assert parse_name(stem) is None or stem.count("_") == 3
