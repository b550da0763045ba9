"""train/evaluation/metrics_json.py: the schema of metrics.json refuses what does not fit it, and says where."""

import json

import pytest
from invented_metrics import FIGURE, FOUND

from common.errors import PipelineError
from train.evaluation import metrics_json


def changed(key: str, value):
    """FOUND with one value, at a dotted place, set (or left out, if it is None)."""
    found = json.loads(json.dumps(FOUND))
    *parents, last = key.split(".")
    place = found
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


def test_what_fits_is_written_and_read_back(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(metrics_json.to_json(FOUND))
    assert metrics_json.read(path) == FOUND


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("format", 0, "format"),
        ("methods.raw.map@r", None, r"methods.raw.map@r: .*required"),
        ("methods.raw.recall@2", FIGURE, r"methods.raw.recall@2: .*not permitted"),
        ("breakdowns.views.classes.0.methods.raw.recall@10", FIGURE, r"classes.0.methods.raw.recall@10"),
        ("methods.raw.map@r.value", "0.5", "methods.raw.map@r.value"),
        (
            "building_level.half_to_half.methods.raw.map@r",
            FIGURE,
            r"half_to_half.methods.raw.map@r: .*not permitted",
        ),
        ("building_level", None, "building_level: .*required"),
        ("counts.queries", -1, "counts.queries"),
        ("counts.queries", None, "counts.queries"),
        ("leakage.buildings.in_two_splits", 3, "leakage.buildings.in_two_splits"),
        ("surplus", 1, "surplus"),
        ("gallery", "train", "gallery"),
        ("provenance.config", None, "provenance.config: .*required"),
        ("provenance.surplus", 1, "provenance.surplus: .*Unexpected"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(tmp_path, key, value, where):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(changed(key, value)))
    with pytest.raises(PipelineError, match=where):
        metrics_json.read(path)


def test_a_file_of_another_format_is_refused_by_name_with_the_way_out(tmp_path):
    found = json.loads(json.dumps(FOUND)) | {
        "format": 1,
        "told": FOUND["descriptions"],
    }  # as the first format had it
    del found["descriptions"]
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(
        PipelineError, match=r"metrics\.json .*\(format: .*\)\nevaluate again: python train/evaluate.py --remake"
    ):
        metrics_json.read(tmp_path / "metrics.json")


def test_infinity_is_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics_json.to_json(changed("methods.raw.map@r.value", float("inf")))


MANY = {"edges": [-1.0, 0.0, 1.0], "matches": [4_000, 6_000], "non_matches": [9_000, 1_000]}


@pytest.mark.parametrize(
    ("key", "value", "alike"),
    [
        ("methods.raw.map@r.value", 0.1259, True),  # 0.1 points: what another machine's rounding may do
        ("methods.raw.map@r.value", 0.1261, False),
        ("methods.raw.map@r.low", None, False),
        ("counts.matches", 3, False),
        ("similarity_histograms.matches", [4_001, 5_999], True),  # a pair at the edge of its bin
        ("similarity_histograms.matches", [4_100, 5_900], False),  # 1 % of them
        ("subject.run", "other", True),  # reported, but not a figure
        ("descriptions.raw", "other words", True),
        ("provenance.inputs", {"test.parquet": "other"}, True),
    ],
)
def test_figures_that_differ_by_rounding_are_alike(tmp_path, key, value, alike):
    one = changed("similarity_histograms", MANY)
    other = json.loads(json.dumps(one))
    *parents, last = key.split(".")
    place = other
    for parent in parents:
        place = place[parent]
    place[last] = value
    for name, found in (("one", one), ("other", other)):
        (tmp_path / name).write_text(json.dumps(found))
    text, same = metrics_json.check(tmp_path / "one", tmp_path / "other")
    assert same == alike
    assert f"{0 if alike else 1} of 177 figures" in text
    assert ("run: default, other" in text) == (key == "subject.run")
    assert ("test.parquet: None, other" in text) == (key == "provenance.inputs")


def test_a_missing_or_truncated_file_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"gone.json does not exist: run train.evaluate.py first"):
        metrics_json.read(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text(metrics_json.to_json(FOUND)[:100])
    with pytest.raises(PipelineError, match=r"cut.json is damaged"):
        metrics_json.read(tmp_path / "cut.json")
