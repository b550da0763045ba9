"""preprocess/tars/labels.py. Oracles: the numbers that a label was written from; a parser by regular
expressions.
"""

import re
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.schemas import Reject
from preprocess.tars.labels import Ids, Label, Rejected, parse_label, parse_name

GOOD = [88, 1234, 567, 9, 40.7, -73.9, 12.5, 0.1, -0.9, 0.0, 40.71, -73.91, 14.0, 15.2, 359.0, -3.5, 0.0]

GENUINE_NAME = "0000075_0038536_0000003_0006132"  # of the published dataset, as is the label
GENUINE_LABEL = (
    b"d 75 6132 38536 3 3.611326736278057e+01 -1.151703076311115e+02 6.481528000000000e+02 "
    b"-2.939905000000000e-02 -9.995678000000000e-01  0.000000000000000e+00 3.611320610005831e+01 "
    b"-1.151701627748344e+02 6.428045040000000e+02 1.468759559608981e+01 -6.236738248856333e+01 "
    b"2.000843336507016e+01 0.000000000000000e+00\n"
)


def line(**changes) -> bytes:
    values = [changes.get(name, value) for name, value in zip(Label._fields, GOOD, strict=False)]
    return ("d " + " ".join(map(str, values)) + "\n").encode()


def test_the_target_is_second_in_a_label_and_last_in_a_name():
    assert parse_label(line())[:4] == (88, 1234, 567, 9)
    assert parse_name("0088_567_9_1234") == Ids(dataset_id=88, target_id=1234, patch_id=567, street_view_id=9)


def test_a_published_label_and_its_zero_padded_name_are_read():
    ids = Ids(dataset_id=75, target_id=6132, patch_id=38536, street_view_id=3)
    assert parse_name(GENUINE_NAME) == ids
    assert parse_label(GENUINE_LABEL) == Label(
        *ids,
        *(36.11326736278057, -115.1703076311115, 648.1528),
        *(-0.02939905, -0.9995678, 0.0),
        *(36.11320610005831, -115.1701627748344, 642.804504),
        *(14.68759559608981, -62.36738248856333, 20.00843336507016, 0.0),
        aligned=False,
    )


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


BLANKS = st.text(" \t", min_size=1, max_size=3)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
OTHER_LINES = st.sampled_from(["", "a 1 2 3", "  a 0.5", "p 1 2", "dd 1", "# d", "ab 3"])
IDS = st.builds(lambda zeros, n: "0" * zeros + str(n), st.integers(0, 4), st.integers(0, 2**31 - 1))


def written(low: float, high: float):
    """A number between the two, as one of the ways to write it; in full where a shorter one leaves them."""
    ways = ["{!r}", "{:+.6f}", "{:e}", "{:.12E}", "{:.3g}", "{:.0f}."]

    def write(value: float, way: str) -> str:
        text = way.format(value)
        return text if low <= Decimal(text) <= high else repr(value)

    return st.builds(write, st.floats(low, high), st.sampled_from(ways))


def by_regular_expression(text: str) -> dict | None:
    """A label's fields as the dataset's page describes the format; None where there is no `d` line as it does."""
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    blank = r"[ \t]+"
    d_line = rf"[ \t]*d((?:{blank}\d+){{4}})((?:{blank}{number}){{13}})[ \t]*"
    lines = re.split(r"\r\n|\n|\r", text)
    found = [match for match in (re.fullmatch(d_line, line) for line in lines) if match]
    if len(found) != 1:
        return None
    ids, numbers = re.findall(r"\d+", found[0][1]), re.findall(number, found[0][2])
    order = ["dataset_id", "target_id", "patch_id", "street_view_id"]
    order += ["target_lat", "target_lon", "target_height", "normal_x", "normal_y", "normal_z"]
    order += ["camera_lat", "camera_lon", "camera_height", "distance", "heading", "pitch", "roll"]
    values = [Decimal(text) for text in ids + numbers]
    return dict(zip(order, values, strict=True)) | {
        "aligned": any(re.match(r"[ \t]*a([ \t]|$)", x) for x in lines)
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.data())
def test_another_parser_reads_the_same_from_valid_labels(data):
    bounds = [(-90, 90), (-180, 180), *[(-1e6, 1e6)] * 4, (-90, 90), (-180, 180), (-1e6, 1e6)]
    bounds += [(0.01, 10_000), (-180, 360), (-90, 90), (-180, 180)]
    fields = [data.draw(IDS) for _ in range(4)] + [data.draw(written(*pair)) for pair in bounds]
    d_line = data.draw(st.sampled_from(["", " "])) + "d" + "".join(data.draw(BLANKS) + field for field in fields)
    before, after = data.draw(OTHER_LINES), data.draw(OTHER_LINES)
    text = before + data.draw(ENDS) + d_line + data.draw(ENDS) + after + data.draw(st.sampled_from(["", "\n"]))
    expected = by_regular_expression(text)
    assert expected is not None
    found = parse_label(text.encode())._asdict()
    assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in expected.items()}


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
