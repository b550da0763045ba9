"""train/evaluate.py with protocol.py and gallery.py. Oracle: loops over queries and pairs, written out."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import small_evaluation
import small_merge
import torch
from small_evaluation import load, run

from common import cli, config, files, parquet, schemas
from common.errors import PipelineError, StaleArtefact
from common.places import geo
from train import evaluate
from train.evaluation import breakdowns, gallery, methods, metrics, protocol

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A configuration with a merge, pictures and a checkpoint; not to be changed by a test."""
    root = tmp_path_factory.mktemp("evaluate")
    cfg = config.load(None, [f"paths.root={root}", "evaluation.bootstrap_samples=60"])
    small_merge.write_merge(cfg)
    small_merge.write_checkpoint(cfg, seed=1)
    return cfg


@pytest.fixture(scope="module")
def evaluated(merged):
    """(What the command printed, what it wrote into metrics.json) of `merged`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(merged) == 0
    return printed.getvalue(), json.loads((merged.paths.evaluation_dir / "metrics.json").read_text())


@pytest.fixture
def own(tmp_path):
    """(Configuration, columns by split, checkpoint) of a merge for a test to spoil."""
    return small_evaluation.write(tmp_path)


def slow_ranks(vectors, rows, radius_m, query, positives) -> list[int]:
    """Rank of each positive row among the rows that count, the other positives not standing in its way."""
    building = [(d, t) for d, t in zip(rows.column("dataset_id"), rows.column("target_id"), strict=True)]
    lat, lon = rows.column("target_lat"), rows.column("target_lon")
    scores, far_m = vectors @ vectors[query], geo.distance_m(lat, lon, lat[query], lon[query])
    wrong = [scores[i] for i in range(len(vectors)) if building[i] != building[query] and far_m[i] > radius_m]
    return [1 + sum(score >= scores[p] for score in wrong) for p in positives]


def slow_figures(alone_by_query: list[list[int]]) -> dict:
    """Means over the queries that have ranks: of their positives, the other positives not standing in its way."""
    recall_at_1, recall_at_5, precisions = [], [], []
    for alone in filter(None, alone_by_query):
        ranks = [wrong + place for place, wrong in enumerate(sorted(alone))]  # with its better positives ahead
        recall_at_1.append(ranks[0] <= 1)
        recall_at_5.append(ranks[0] <= 5)
        hits = [place / rank for place, rank in enumerate(ranks, 1) if rank <= len(ranks)]
        precisions.append(sum(hits) / len(ranks))
    return {"recall@1": np.mean(recall_at_1), "recall@5": np.mean(recall_at_5), "map@r": np.mean(precisions)}


def slow_classes(rows, query: int, match: int) -> dict[str, str]:
    """The class of a pair in each breakdown, in plain words."""
    heading, distance, pitch = (rows.column(name).astype(float) for name in ("heading", "distance", "pitch"))
    angle = abs(heading[match] - heading[query]) % 360
    angle, far = min(angle, 360 - angle), max(distance[query], distance[match])
    height = distance[query] * math.tan(math.radians(pitch[query]))  # distances are horizontal
    views = int((rows.zones.building_of_row == rows.zones.building_of_row[query]).sum())
    return {
        "heading_difference_deg": next((f"{a}-{a + 30}" for a in (0, 30, 60) if a <= angle < a + 30), "over 90"),
        "camera_distance_m": "0-10" if far < 10 else "10-20" if far < 20 else "20-40" if far < 40 else "over 40",
        "target_height_m": "below 0" if height < 0 else "0-2" if height < 2 else "2-5" if height < 5 else "over 5",
        "views": str(views) if views < 6 else "6 or more",
        "dataset": f"{rows.column('dataset_id')[query]:04d}",
    }  # fmt: skip


def evaluate_run(cfg, rows):
    checkpoint = torch.load(cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    with cli.Progress("evaluate", "ranking") as progress:
        found = protocol.evaluate(cfg, rows, methods.of_checkpoint(checkpoint), CPU, progress)
    assert progress.rows_in == protocol.num_rankings(rows) * len(found.matches)  # of images and of buildings
    return found


@pytest.mark.parametrize("splits", [("test",), ("test", "train", "val")])
def test_figures_equal_loops_over_queries_and_pairs(merged, splits):
    rows = load(merged, *splits)
    figures, trained, *_ = evaluate_run(merged, rows)
    vectors, building = trained.double().numpy(), rows.zones.building_of_row
    all_ranks, by_class = [], {}
    for query in range(rows.num_queries):
        matches = [i for i in np.flatnonzero(building == building[query]) if i != query]
        ranks = slow_ranks(vectors, rows, merged.data.ignore_radius_m, query, matches)
        all_ranks.append(ranks)
        for match, rank in zip(matches, ranks, strict=True):
            for name, label in slow_classes(rows, query, match).items():
                by_class.setdefault((name, label), {}).setdefault(query, []).append(rank)
    found, expected = figures["methods"]["trained"], slow_figures(all_ranks)
    assert 0.05 < found["recall@1"]["value"] < 0.95  # else this test would prove little
    for key, value in expected.items():
        assert found[key]["value"] == pytest.approx(value, abs=1e-9)
    firsts = np.array([min(ranks) for ranks in all_ranks])
    assert found["median_rank"]["value"] == np.median(firsts)
    for k in (10, 100, 1000):
        assert found[f"recall@{k}"]["value"] == pytest.approx(np.mean(firsts <= k), abs=1e-9)
    curve = figures["recall_curve"]
    assert curve["methods"]["trained"] == pytest.approx([np.mean(firsts <= k) for k in curve["k"]])
    classes = {
        (name, entry["class"]): entry
        for name, breakdown in figures["breakdowns"].items()
        for entry in breakdown["classes"]
        if entry["queries"]
    }
    assert classes.keys() == by_class.keys()
    for key, ranks_of_query in by_class.items():
        assert classes[key]["queries"] == len(ranks_of_query)
        assert classes[key]["matches"] == sum(map(len, ranks_of_query.values()))
        for figure, value in slow_figures(list(ranks_of_query.values())).items():
            assert classes[key]["methods"]["trained"][figure]["value"] == pytest.approx(value, abs=1e-9)
    assert sum(figures["similarity_histograms"]["matches"]) == sum(map(len, all_ranks))


def test_a_differences_value_is_the_difference_and_its_interval_is_paired(evaluated):
    found = evaluated[1]
    methods, difference = found["methods"], found["differences"]["whitening-raw"]["map@r"]
    expected = methods["whitening"]["map@r"]["value"] - methods["raw"]["map@r"]["value"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["low"] < difference["value"] < difference["high"]
    assert difference["low"] > 0  # small_merge's noise is what whitening removes


def test_the_angle_between_headings_goes_the_short_way_round():
    found = breakdowns.heading_difference_deg(np.array([350, 10, 0, -90]), np.array([10, 350, 180, 270]))
    assert found.tolist() == [20, 20, 180, 0]


def test_a_class_is_not_won_by_the_easy_matches_of_another():
    # query 0 has an easy match (row 1, nothing ahead of it) and a hard one (row 2, 7 wrong rows ahead)
    wrong = np.array([3]), np.ones(1, np.float32)
    matches = metrics.Matches(
        1, np.array([0, 0]), np.array([1, 2]), np.array([0, 7]), np.ones(2, np.float32), *wrong
    )
    split = breakdowns.Breakdown("", ["easy", "hard", "none"], np.array([0, 1]))
    easy, hard, none = protocol.by_class(split, {"m": matches}, np.zeros(1, int), np.ones((1, 1)))["classes"]
    assert easy["methods"]["m"]["recall@5"]["value"] == 1
    assert hard["methods"]["m"]["recall@5"]["value"] == 0  # 1 if the easy match stayed a positive
    assert none["methods"] == {}
    assert none["queries"] == 0


def test_random_pairs_of_a_building_or_its_zone_are_no_non_matches(merged):
    rows = load(merged, "test")
    vectors = torch.nn.functional.normalize(torch.from_numpy(rows.embeddings).float(), dim=1)
    found = protocol.similarity_histograms(vectors, rows, np.array([-1, 1.0]), merged.data.ignore_radius_m, seed=0)
    share = sum(found["non_matches"]) / protocol.RANDOM_PAIRS
    assert share == pytest.approx(174 / 180, abs=2e-3)  # 3 rows are of the building, 3 of its twin; 3.4 sigma
    assert found["matches"][0] == found["matches"][-1] == 1


def test_blocks_of_queries_change_nothing(merged, monkeypatch):
    rows = load(merged, "test")
    whole, *_ = evaluate_run(merged, rows)
    monkeypatch.setattr(protocol, "_QUERY_BLOCK", 7)
    blocks, *_ = evaluate_run(merged, rows)
    assert whole == blocks


def test_blocks_of_queries_list_no_more_junk_than_memory_allows(merged, monkeypatch):
    rows = load(
        merged, "test", "train"
    )  # 180 queries, each with 6 rows in its zone: its own building and its twin
    assert [len(block) for block in protocol._query_blocks(rows, 16)] == [180]
    monkeypatch.setattr(protocol, "_LISTED_BYTES", 2**20)
    blocks = protocol._query_blocks(rows, 33)
    assert np.concatenate(blocks).tolist() == list(range(180))
    assert {len(block) for block in blocks} <= {5, 6}  # of 30 or 36 MB
    assert [len(block) for block in protocol._query_blocks(rows, 1)] == [
        1
    ] * 180  # one does not fit, and is ranked
    monkeypatch.setattr(protocol, "_QUERY_BLOCK", 4)
    assert max(len(block) for block in protocol._query_blocks(rows, 33)) == 4


# ----------------------------------------------------------------------------------------------------- the command


def test_it_prints_the_table_and_a_second_run_does_nothing(merged, evaluated, capsys):
    first, found = evaluated
    path = merged.paths.evaluation_dir / "metrics.json"
    whitening = found["methods"]["whitening"]["recall@1"]
    expected = " [".join(f"{100 * whitening[key]:.1f}" for key in ("value", "low"))
    assert f"whitening           {expected}" in first
    assert f"report: {merged.paths.evaluation_dir / 'report.html'}" in first
    before = path.stat().st_mtime_ns
    assert run(merged) == 0
    second = capsys.readouterr().out
    assert "nothing to do" in second
    assert first.splitlines()[:17] == second.splitlines()[:17]
    half = found["building_level"]["half_to_half"]["methods"]["whitening"]["recall@1"]
    of_buildings = [line for line in first.splitlines() if line.startswith("whitening  ")][1]
    assert f"{100 * half['value']:.1f} [{100 * half['low']:.1f}" in of_buildings
    assert path.stat().st_mtime_ns == before
    with pytest.raises(StaleArtefact, match=r"evaluation.bootstrap_samples = 60 \(now 61"):
        run(merged, "--set", "evaluation.bootstrap_samples=61")


def test_every_query_is_in_queries_parquet_with_its_best_match_and_its_best_wrong_image(merged, evaluated):
    rows, name = load(merged, "test"), "whitening"
    checkpoint = torch.load(merged.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    whitening = next(method for method in methods.of_checkpoint(checkpoint) if method.name == name)
    path = merged.paths.evaluation_dir / "queries.parquet"
    found = parquet.read(path)
    assert found.schema.names == schemas.queries(["raw", "pca", "whitening", "trained"]).names
    assert found.select(["streetview_image_id", "building_id", "cell_id", "tar_file"]).equals(
        rows.table.select(["streetview_image_id", "building_id", "cell_id", "tar_file"]).combine_chunks()
    )
    scores = whitening.vectors(rows, CPU).double().numpy()
    scores = scores @ scores.T
    np.fill_diagonal(scores, -np.inf)
    ids, building = rows.column("streetview_image_id"), rows.column("building_id")
    lat, lon = rows.column("target_lat"), rows.column("target_lon")
    for query, row in enumerate(found.to_pylist()):
        same = building == building[query]
        near = geo.distance_m(lat, lon, lat[query], lon[query]) <= merged.data.ignore_radius_m
        match, wrong = (np.where(which, scores[query], -np.inf) for which in (same, ~same & ~near))
        assert row[f"match_{name}"] == ids[match.argmax()]
        assert row[f"match_cosine_{name}"] == pytest.approx(match.max(), abs=1e-5)
        assert row[f"wrong_{name}"] == ids[wrong.argmax()]
        assert row[f"wrong_cosine_{name}"] == pytest.approx(wrong.max(), abs=1e-5)
        assert row[f"rank_{name}"] == 1 + np.sum(wrong >= match.max())
    precision = found[f"map_at_r_{name}"].to_numpy().mean()
    assert precision == pytest.approx(evaluated[1]["methods"][name]["map@r"]["value"], abs=1e-6)
    record = parquet.read_provenance(path)
    assert (record.stage, record.inputs) == ("evaluate", evaluated[1]["provenance"]["inputs"])


def test_a_query_without_a_match_or_without_a_wrong_image_is_in_queries_parquet_too(own):
    cfg, columns, _ = own
    test = {name: column[:7] for name, column in columns["test"].items()}  # two twins, and one image of another
    small_merge.write_split(cfg, "test", test)
    assert run(cfg) == 0
    found = parquet.read(cfg.paths.evaluation_dir / "queries.parquet").to_pylist()
    assert len(found) == 7
    alone = found[6]
    assert (alone["rank_raw"], alone["map_at_r_raw"], alone["match_raw"]) == (0, 0.0, "")
    assert math.isnan(alone["match_cosine_raw"])
    assert alone["wrong_raw"] in test["streetview_image_id"][:6]
    assert {row["wrong_raw"] for row in found[:6]} == {test["streetview_image_id"][6]}
    small_merge.write_split(cfg, "test", {name: column[:6] for name, column in test.items()})
    assert run(cfg, "--remake") == 0
    only_twins = parquet.read(cfg.paths.evaluation_dir / "queries.parquet").to_pylist()[0]
    assert only_twins["wrong_raw"] == ""
    assert math.isnan(only_twins["wrong_cosine_raw"])
    assert only_twins["rank_raw"] == 1


def test_an_evaluation_without_queries_parquet_is_done_again(own):
    cfg, *_ = own
    assert run(cfg) == 0
    path = cfg.paths.evaluation_dir / "queries.parquet"
    path.unlink()
    assert not evaluate.STAGE.is_done(cfg)
    assert run(cfg) == 0
    assert path.exists()


def test_a_run_killed_before_metrics_json_is_done_again_with_the_same_figures(merged, evaluated):
    path = merged.paths.evaluation_dir / "metrics.json"
    path.unlink()
    assert run(merged) == 0
    first, second = (
        {**found, "provenance": found["provenance"]["id"]}
        for found in (evaluated[1], json.loads(path.read_text()))
    )
    assert first == second


def test_figures_of_other_settings_are_not_redone_because_the_report_was_deleted(own):
    cfg, *_ = own
    assert run(cfg) == 0
    (cfg.paths.evaluation_dir / "report.html").unlink()
    with pytest.raises(StaleArtefact, match=r"\(now 7"):
        run(cfg, "--set", "evaluation.bootstrap_samples=1000", "--set", "global.seed=7")
    assert run(cfg) == 0
    assert (cfg.paths.evaluation_dir / "report.html").exists()


def test_a_run_killed_between_its_two_files_leaves_none_that_says_it_is_done(own, monkeypatch):
    cfg, *_ = own
    assert run(cfg) == 0
    write = files.write_text

    def die_at_the_second(path, text):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(files, "write_text", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, "--overwrite", "--set", "global.seed=7")
    assert not (cfg.paths.evaluation_dir / "metrics.json").exists()  # else a run with seed 0 would do nothing


def test_the_record_names_its_inputs(merged, evaluated):
    record = evaluated[1]["provenance"]
    assert record["stage"] == "evaluate"
    test = parquet.read_provenance(merged.paths.merged_dir / "test.parquet").id
    assert record["inputs"]["test.parquet"] == test
    assert record["inputs"]["checkpoint_best.pt"] == "checkpoint1"
    assert record["config_hash"]
    assert record["rows"] == {"in": 180, "out": 180}


def test_a_split_of_buildings_does_not_claim_streets_that_training_never_saw(own, merged, evaluated):
    cfg, columns, _ = own
    for split, of_split in columns.items():
        small_merge.write_split(cfg, split, of_split, config={"data.split_by": "building"})
    small_merge.write_checkpoint(cfg)
    assert run(cfg) == 0
    for evaluation, seen in ((merged, False), (cfg, True)):
        page = (evaluation.paths.evaluation_dir / "report.html").read_text()
        assert ("on streets that it never saw" in page) == (not seen)
        assert ("perhaps others on the same streets" in page) == seen


def test_a_damaged_split_report_is_refused_before_anything_is_ranked(own, monkeypatch):
    cfg, *_ = own
    files.write_text(files.beside(cfg.paths.merged_dir, "report") / "split_report.json", '{"kept": ')
    monkeypatch.setattr(protocol, "evaluate", None)  # calling it would be a TypeError
    with pytest.raises(PipelineError, match=r"split_report\.json is damaged"):
        run(cfg)


def test_evaluating_changes_no_embedding(merged):
    rows = load(merged, "test")
    single = gallery.Gallery(rows.num_queries, rows.table, rows.embeddings.astype(np.float32), rows.zones)
    before = single.embeddings.copy()
    methods.raw(single, CPU)
    np.testing.assert_array_equal(single.embeddings, before)  # float32 on the host: the same memory, if not copied


def test_check_compares_the_figures_of_two_files(merged, evaluated, tmp_path, capsys):
    path = merged.paths.evaluation_dir / "metrics.json"
    other = tmp_path / "other.json"
    found = json.loads(path.read_text())
    found["provenance"]["created"] = "another day"
    other.write_text(json.dumps(found))
    capsys.readouterr()
    assert evaluate.main(["--check", str(path), str(other)]) == 0
    assert "0 of 1," in capsys.readouterr().out
    below_root = path.relative_to(merged.paths.root)
    assert run(merged, "--check", str(below_root), str(other)) == 0
    del found["methods"]["pca"]
    other.write_text(json.dumps(found))
    assert evaluate.main(["--check", str(path), str(other)]) == 0
    assert f"only in {path}: 21 figures, the first is methods.pca.recall@1.value" in capsys.readouterr().out
    found["methods"]["trained"]["recall@1"]["value"] += 0.02
    found["provenance"]["config"]["global.seed"] = 7
    other.write_text(json.dumps(found))
    assert evaluate.main(["--check", str(path), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "global.seed: 0, 7" in printed
    assert "(+2.00)" in printed
    assert "methods.trained.recall@1.value" in printed


def test_the_same_head_under_another_runs_name_gets_a_report_of_its_own(own):
    cfg, *_ = own
    place = ("--set", "paths.evaluation_dir=evaluation")  # by default each run has its own
    run(cfg, *place)
    (cfg.paths.checkpoints_dir / "default").rename(cfg.paths.checkpoints_dir / "best")
    with pytest.raises(StaleArtefact, match=r'training.run = "default" \(now "best"'):
        run(cfg, *place, "--set", "training.run=best")
