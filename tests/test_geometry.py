"""preprocess/tars/label_geometry.py. Oracles: a label of the published dataset, the destination formula, a plain
loop.
"""

import math

import numpy as np
import pytest
from test_labels import GENUINE_LABEL

from common.places import geo
from preprocess.tars.label_geometry import count_disagreements, summary
from preprocess.tars.labels import Label, parse_label


def columns(*labels: Label) -> dict[str, tuple]:
    return dict(zip(Label._fields, zip(*labels, strict=True), strict=True))


def label(bearing_deg=30.0, horizontal_m=20.0, up_m=4.0, camera=(48.0, 11.0), **stated) -> Label:
    """A label of a target that lies so from its camera, by the destination formula; then with what is `stated`."""
    lat, lon, bearing = *map(math.radians, camera), math.radians(bearing_deg)
    angle = horizontal_m / geo.EARTH_RADIUS_M
    target_lat = math.asin(math.sin(lat) * math.cos(angle) + math.cos(lat) * math.sin(angle) * math.cos(bearing))
    east = math.sin(bearing) * math.sin(angle) * math.cos(lat)
    target_lon = lon + math.atan2(east, math.cos(angle) - math.sin(lat) * math.sin(target_lat))
    right = Label(
        *(88, 1, 2, 3),
        *(math.degrees(target_lat), (math.degrees(target_lon) + 180) % 360 - 180, 100.0 + up_m),
        *(0.0, 1.0, 0.0, *camera, 100.0),
        *(horizontal_m, bearing_deg, math.degrees(math.atan2(up_m, horizontal_m)), 0.0, False),
    )
    return right._replace(**stated)


def wrong(*labels: Label) -> set[str]:
    counts = count_disagreements(columns(*labels))
    assert counts.pop("labels") == len(labels)
    return {name for name, count in counts.items() if count}


def test_the_published_label_agrees_with_its_positions():
    published = parse_label(GENUINE_LABEL)
    assert wrong(published) == set()
    in_space_m = math.hypot(14.6876, published.target_height - published.camera_height)
    assert wrong(published._replace(distance=in_space_m)) == {"distance"}  # 15.63 m: 6 % more
    assert wrong(published._replace(heading=published.heading + 180)) == {"heading"}  # target to camera
    assert wrong(published._replace(pitch=-published.pitch)) == {"pitch"}
    assert wrong(published._replace(pitch=math.degrees(math.asin(5.3483 / 14.6876)))) == {"pitch"}  # 21.4


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, set()),
        ({"heading": 390.0 - 360}, set()),
        ({"heading": 30.98}, set()),
        ({"heading": 31.02}, {"heading"}),
        ({"pitch": math.degrees(math.atan(0.2)) - 1.02}, {"pitch"}),
        ({"distance": 20.98}, set()),
        ({"distance": 21.02}, {"distance"}),
        ({"distance": 18.98}, {"distance"}),
        ({"camera_lat": -48.0}, {"heading", "pitch", "distance"}),
    ],
)
def test_one_degree_and_five_percent_are_the_limits(stated, expected):
    assert wrong(label(**stated)) == expected


def test_headings_are_compared_modulo_360():
    assert wrong(label(-62.0), label(298.0), label(298.0, heading=-62.0), label(-62.0, heading=298.0)) == set()
    assert wrong(label(0.0, heading=359.5), label(359.5, heading=-0.4), label(180.0, heading=-180.0)) == set()


@pytest.mark.parametrize("camera", [(0.0, 179.99999), (-33.0, -179.99999), (69.0, 18.0), (36.1, -115.17)])
def test_agreement_holds_anywhere(camera):
    every_way = [label(bearing, 15.0, 3.0, camera) for bearing in range(-180, 361, 15)]
    assert wrong(*every_way) == set()


def test_counts_equal_a_loop_over_labels():
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(300):
        bearing, metres, up = rng.uniform(-180, 360), rng.uniform(2, 80), rng.uniform(-5, 20)
        one = label(bearing, metres, up)
        labels.append(
            one._replace(
                heading=one.heading + rng.choice([0, 0.9, -1.1]),
                pitch=one.pitch + rng.choice([0, -0.9, 1.1]),
                distance=one.distance * rng.choice([1, 1.04, 0.94]),
            )
        )
    each = [count_disagreements(columns(one)) for one in labels]
    assert count_disagreements(columns(*labels)) == sum(each[1:], each[0])
    assert 60 < sum(one["heading"] for one in each) < 140
    assert all(set(one.values()) <= {0, 1} for one in each)


def test_no_labels_and_no_disagreements_leave_nothing_to_say():
    nothing = count_disagreements({name: [] for name in Label._fields})
    assert summary(nothing) == summary(count_disagreements(columns(label()))) == ""
    three = count_disagreements(columns(label(), label(heading=0.0), label(heading=90.0, distance=1.0)))
    assert summary(three) == "labels that disagree with their positions: heading 2, pitch 0, distance 1 of 3"
