"""train/evaluate.py with protocol.py and gallery.py. Oracle: loops over queries and pairs, written out."""

import json

import numpy as np
import pytest
import small_merge
import torch

from common import cli, config, geo, parquet
from common.errors import PipelineError, StaleArtefact
from train import evaluate, gallery, protocol

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A configuration with a merge, pictures and a checkpoint; not to be changed by a test."""
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('evaluate')}", "training.bootstrap_samples=60"])
    small_merge.write_merge(cfg)
    small_merge.write_checkpoint(cfg, seed=1)
    return cfg


@pytest.fixture
def own(tmp_path):
    """The same, for a test to spoil."""
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    return cfg, small_merge.write_merge(cfg, buildings=20, cells=5), small_merge.write_checkpoint(cfg)


def run(cfg, *extra) -> int:
    flags = [f"paths.root={cfg.paths.root}", f"training.bootstrap_samples={cfg.training.bootstrap_samples}"]
    return evaluate.main([part for flag in flags for part in ("--set", flag)] + list(extra))


def load(cfg, *splits) -> gallery.Gallery:
    paths = [cfg.paths.merged_dir / f"{split}.parquet" for split in splits]
    return gallery.load(paths, cfg.data.ignore_radius_m)


def slow_ranks(vectors, rows, radius_m, query, positives) -> list[int]:
    """Rank of each positive row among the rows that count, the other positives not standing in its way."""
    building = [(d, t) for d, t in zip(rows.column("dataset_id"), rows.column("target_id"), strict=True)]
    lat, lon = rows.column("target_lat"), rows.column("target_lon")
    scores = vectors @ vectors[query]
    wrong = [
        scores[i]
        for i in range(len(vectors))
        if building[i] != building[query] and geo.distance_m(lat[i], lon[i], lat[query], lon[query]) > radius_m
    ]
    return [1 + sum(score >= scores[p] for score in wrong) for p in positives]


@pytest.mark.parametrize("splits", [("test",), ("test", "train", "val")])
def test_figures_equal_loops_over_queries_and_pairs(merged, splits):
    setting = "all" if len(splits) > 1 else "test"
    cfg = merged.model_copy(update={"training": merged.training.model_copy(update={"gallery": setting})})
    rows = load(cfg, *splits)
    checkpoint = torch.load(cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    with cli.Progress("evaluate", "ranking") as progress:
        figures, trained, _ = protocol.evaluate(cfg, rows, checkpoint, CPU, progress)
    vectors = trained.double().numpy()
    building, heading = rows.zones.building_of_row, rows.column("heading").astype(float)
    firsts, precisions, by_class = [], [], {}
    for query in range(rows.num_queries):
        matches = [i for i in np.flatnonzero(building == building[query]) if i != query]
        alone = slow_ranks(vectors, rows, cfg.data.ignore_radius_m, query, matches)
        ranks = [wrong + place for place, wrong in enumerate(sorted(alone))]  # with its other matches ahead of it
        hits = [place / rank for place, rank in enumerate(ranks, 1) if rank <= len(matches)]
        firsts.append(ranks[0])
        precisions.append(sum(hits) / len(matches))
        for match, rank in zip(matches, alone, strict=True):
            angle = abs(heading[match] - heading[query])
            by_class.setdefault(np.digitize(min(angle, 360 - angle), [30, 60, 90]), []).append(rank)
    found = figures["methods"]["trained"]
    assert found["map@r"]["value"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found["median_rank"]["value"] == np.median(firsts)
    for k in (1, 5, 10, 100, 1000):
        assert found[f"recall@{k}"]["value"] == pytest.approx(np.mean(np.array(firsts) <= k), abs=1e-9)
    assert 0.05 < found["recall@1"]["value"] < 0.95  # else this test would tell little
    for number, entry in enumerate(figures["breakdowns"]["heading_difference_deg"]["classes"]):
        assert entry["pairs"] == len(by_class[number])
        value = entry["methods"]["trained"]["recall@1"]["value"]
        assert value == pytest.approx(np.mean(np.array(by_class[number]) == 1), abs=1e-9)
    histograms = figures["similarity_histograms"]
    assert sum(histograms["matches"]) == figures["counts"]["pairs"] == sum(map(len, by_class.values()))


def test_a_differences_value_is_the_difference_and_its_interval_is_paired(merged):
    assert run(merged, "--overwrite") == 0
    found = json.loads((merged.paths.evaluation_dir / "metrics.json").read_text())
    methods, difference = found["methods"], found["differences"]["whitening-raw"]["map@r"]
    expected = methods["whitening"]["map@r"]["value"] - methods["raw"]["map@r"]["value"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["low"] < difference["value"] < difference["high"]
    assert difference["low"] > 0  # small_merge's noise is what whitening removes


def test_the_angle_between_headings_goes_the_short_way_round():
    assert protocol.heading_difference_deg(
        np.array([350, 10, 0, -90]), np.array([10, 350, 180, 270])
    ).tolist() == [
        20,
        20,
        180,
        0,
    ]


def test_pairs_are_all_ordered_pairs_of_a_building_and_a_sample_is_seeded(merged, monkeypatch):
    rows = load(merged, "test", "train")
    pairs, count = protocol.matching_pairs(rows, seed=0)
    building = rows.zones.building_of_row
    n = rows.num_queries
    expected = [(i, j) for i in range(n) for j in range(len(building)) if i != j and building[i] == building[j]]
    assert [tuple(pair) for pair in pairs] == expected
    monkeypatch.setattr(protocol, "MAX_PAIRS", 50)
    sample, same_count = protocol.matching_pairs(rows, seed=0)
    assert same_count == count == len(expected)
    assert len(np.unique(sample, axis=0)) == 50
    np.testing.assert_array_equal(sample, protocol.matching_pairs(rows, seed=0)[0])


def test_random_pairs_of_a_building_or_its_zone_are_no_non_matches(merged):
    rows = load(merged, "test")
    vectors = protocol.vectors_of("raw", rows, {}, CPU)
    pairs = protocol.matching_pairs(rows, seed=0)[0]
    found = protocol.similarity_histograms(vectors, rows, pairs, merged.data.ignore_radius_m, seed=0)
    share = sum(found["non_matches"]) / protocol.RANDOM_PAIRS
    assert share == pytest.approx(174 / 180, abs=2e-3)  # 3 rows are of the building, 3 of its twin; 3.4 sigma


def test_blocks_of_queries_change_nothing(merged, monkeypatch):
    rows = load(merged, "test")
    checkpoint = torch.load(merged.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    with cli.Progress("evaluate", "ranking") as progress:
        whole, *_ = protocol.evaluate(merged, rows, checkpoint, CPU, progress)
        monkeypatch.setattr(protocol, "_QUERY_BLOCK", 7)
        blocks, *_ = protocol.evaluate(merged, rows, checkpoint, CPU, progress)
    assert whole == blocks


# ------------------------------------------------------------------------------------------- what goes wrong


def test_below_twenty_cells_there_are_no_intervals_and_it_says_so(own, capsys):
    cfg, *_ = own
    assert run(cfg) == 0
    found = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())
    assert found["counts"]["cells"] < 20
    assert found["methods"]["trained"]["map@r"]["low"] is None
    assert found["differences"]["trained-raw"]["recall@1"]["high"] is None
    assert "no intervals" in capsys.readouterr().out
    assert "No intervals" in (cfg.paths.evaluation_dir / "report.html").read_text()


def test_an_embedding_that_is_not_finite_is_named(own):
    cfg, columns, _ = own
    columns["test"]["embedding"][4, 2] = np.nan
    small_merge.write_split(cfg, "test", columns["test"])
    with pytest.raises(PipelineError, match="image 0088_40004 holds NaN"):
        run(cfg)


def test_no_query_with_a_match_is_an_error(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[::3] for name, column in columns["test"].items()})
    with pytest.raises(PipelineError, match="no query has a match"):
        run(cfg)


def test_queries_without_a_match_are_counted_and_left_out(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[2:] for name, column in columns["test"].items()})
    assert run(cfg) == 0
    counts = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())["counts"]
    assert (counts["queries"], counts["queries_without_match"]) == (57, 1)


def test_one_building_gives_an_honest_report(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[:3] for name, column in columns["test"].items()})
    assert run(cfg) == 0
    found = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())
    assert found["methods"]["raw"]["recall@1"] == {"value": 1.0, "low": None, "high": None}
    assert found["counts"]["buildings"] == found["counts"]["cells"] == 1


def test_an_empty_test_split_is_an_error(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[:0] for name, column in columns["test"].items()})
    with pytest.raises(PipelineError, match="has no rows"):
        run(cfg)


@pytest.mark.parametrize(
    ("column", "message"), [("target_id", "building 0088_40000"), ("street_view_id", "panorama 0088_40000")]
)
def test_a_leak_is_refused_by_name(own, column, message):
    cfg, columns, _ = own
    columns["train"][column][:3] = columns["test"][column][0]
    small_merge.write_split(cfg, "train", columns["train"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(PipelineError, match=f"{message} stands in both test.parquet and train.parquet"):
        run(cfg)


def test_a_checkpoint_of_another_merge_is_refused(own):
    cfg, columns, _ = own
    columns["train"]["heading"][0] += 1
    small_merge.write_split(cfg, "train", columns["train"])
    with pytest.raises(StaleArtefact, match=r"checkpoint_best.pt was trained on another train.parquet") as error:
        run(cfg)
    assert str(cfg.paths.merged_dir / "train.parquet") in str(error.value)


def test_splits_of_two_merges_are_refused(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", columns["test"], config={"data.split_by": "building"})
    with pytest.raises(StaleArtefact, match=r'data.split_by = "geo"; this run says "building"'):
        run(cfg)


def test_embeddings_of_another_model_are_refused_naming_both(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", columns["test"], model={**small_merge.MODEL, "name": "other"})
    with pytest.raises(StaleArtefact, match=r"name tiny(.|\n)*name other"):
        run(cfg)


def test_a_checkpoint_that_is_not_there_says_what_makes_it(tmp_path):
    with pytest.raises(PipelineError, match=r"run train/train.py first"):
        run(config.load(None, [f"paths.root={tmp_path}"]))


# -------------------------------------------------------------------------------------------- the command


def test_it_prints_the_table_and_a_second_run_does_nothing(merged, capsys):
    assert run(merged, "--overwrite") == 0
    first = capsys.readouterr().out
    path = merged.paths.evaluation_dir / "metrics.json"
    whitening = json.loads(path.read_text())["methods"]["whitening"]["recall@1"]
    expected = " [".join(f"{100 * whitening[key]:.1f}" for key in ("value", "low"))
    assert f"whitening           {expected}" in first
    assert f"report: {merged.paths.evaluation_dir / 'report.html'}" in first
    before = path.stat().st_mtime_ns
    assert run(merged) == 0
    second = capsys.readouterr().out
    assert "nothing to do" in second
    assert first.splitlines()[:8] == second.splitlines()[:8]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(StaleArtefact, match=r"training.bootstrap_samples = 60; this run says 61"):
        run(merged, "--set", "training.bootstrap_samples=61")


def test_the_same_inputs_and_seed_give_the_same_figures(merged):
    path = merged.paths.evaluation_dir / "metrics.json"
    found = []
    for _ in range(2):
        assert run(merged, "--overwrite") == 0
        found.append(json.loads(path.read_text()))
    first, second = ({**figures, "provenance": figures["provenance"]["id"]} for figures in found)
    assert first == second


def test_a_run_killed_before_metrics_json_is_done_again(merged):
    assert run(merged, "--overwrite") == 0
    (merged.paths.evaluation_dir / "metrics.json").unlink()
    assert run(merged) == 0
    assert (merged.paths.evaluation_dir / "metrics.json").exists()


def test_the_record_names_its_inputs(merged):
    assert run(merged, "--overwrite") == 0
    record = json.loads((merged.paths.evaluation_dir / "metrics.json").read_text())["provenance"]
    assert record["stage"] == "evaluate"
    test = parquet.read_provenance(merged.paths.merged_dir / "test.parquet").id
    assert record["inputs"]["test.parquet"] == test
    assert record["inputs"]["checkpoint_best.pt"] == "checkpoint1"
    assert record["rows"] == {"in": 180, "out": 180}
