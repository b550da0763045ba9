"""train/evaluate.py with protocol.py and gallery.py. Oracle: loops over queries and pairs, written out."""

import contextlib
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_merge
import torch

from common import cli, config, files, geo, parquet
from common.errors import PipelineError, StaleArtefact
from train import breakdowns, evaluate, gallery, methods, metrics, protocol, results

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A configuration with a merge, pictures and a checkpoint; not to be changed by a test."""
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('evaluate')}", "training.bootstrap_samples=60"])
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
    height = distance[query] * np.sin(pitch[query] / 180 * np.pi)
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
        return protocol.evaluate(cfg, rows, methods.of_checkpoint(checkpoint), CPU, progress)


@pytest.mark.parametrize("splits", [("test",), ("test", "train", "val")])
def test_figures_equal_loops_over_queries_and_pairs(merged, splits):
    rows = load(merged, *splits)
    figures, trained, _ = evaluate_run(merged, rows)
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
    assert 0.05 < found["recall@1"]["value"] < 0.95  # else this test would tell little
    for key, value in expected.items():
        assert found[key]["value"] == pytest.approx(value, abs=1e-9)
    firsts = np.array([min(ranks) for ranks in all_ranks])
    assert found["median_rank"]["value"] == np.median(firsts)
    for k in (10, 100, 1000):
        assert found[f"recall@{k}"]["value"] == pytest.approx(np.mean(firsts <= k), abs=1e-9)
    curve = figures["recall_curve"]
    assert curve["methods"]["trained"] == pytest.approx([np.mean(firsts <= k) for k in curve["k"]])
    told = {
        (name, entry["class"]): entry
        for name, breakdown in figures["breakdowns"].items()
        for entry in breakdown["classes"]
        if entry["queries"]
    }
    assert told.keys() == by_class.keys()
    for key, ranks_of_query in by_class.items():
        assert told[key]["queries"] == len(ranks_of_query)
        assert told[key]["matches"] == sum(map(len, ranks_of_query.values()))
        for figure, value in slow_figures(list(ranks_of_query.values())).items():
            assert told[key]["methods"]["trained"][figure]["value"] == pytest.approx(value, abs=1e-9)
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
    matches = metrics.Matches(1, np.array([0, 0]), np.array([1, 2]), np.array([0, 7]), np.ones(2, np.float32))
    split = breakdowns.Breakdown("", ["easy", "hard", "none"], np.array([0, 1]))
    easy, hard, none = breakdowns.figures(split, {"m": matches}, np.zeros(1, int), np.ones((1, 1)))["classes"]
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
    assert sum(found["similarity_histograms"]["non_matches"]) == 0


def test_one_image_is_an_error(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[:1] for name, column in columns["test"].items()})
    with pytest.raises(PipelineError, match="no query has a match"):
        run(cfg)


def test_embeddings_of_another_dimension_are_refused(own):
    cfg, columns, _ = own
    columns["test"]["embedding"] = columns["test"]["embedding"][:, :10]
    small_merge.write_split(cfg, "test", columns["test"], model={**small_merge.MODEL, "dim": 10})
    with pytest.raises(StaleArtefact, match=r"dim 24(.|\n)*dim 10"):
        run(cfg)


def test_an_empty_test_split_is_an_error(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", {name: column[:0] for name, column in columns["test"].items()})
    with pytest.raises(PipelineError, match="has no rows"):
        run(cfg)


@pytest.mark.parametrize(
    ("column", "message"), [("target_id", "building 0088_40000"), ("street_view_id", "panorama 0088_40000")]
)
def test_a_building_or_panorama_of_test_in_train_is_refused_by_name(own, column, message):
    cfg, columns, _ = own
    columns["train"][column][:3] = columns["test"][column][0]
    small_merge.write_split(cfg, "train", columns["train"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(PipelineError, match=f"{message} stands in both test.parquet and train.parquet"):
        run(cfg)


def test_a_panorama_in_train_and_val_is_refused_too(own):
    cfg, columns, _ = own
    columns["val"]["street_view_id"][5] = columns["train"]["street_view_id"][1]
    small_merge.write_split(cfg, "val", columns["val"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(PipelineError, match=r"panorama 0088_1 stands in both train.parquet and val.parquet"):
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


@pytest.mark.parametrize("content", [{"head": {}}, [1], np.random.default_rng(0)])
def test_a_checkpoint_of_another_program_is_refused(own, content):
    cfg, _, path = own
    torch.save(content, path)
    with pytest.raises(PipelineError, match=r"checkpoint_best.pt is no checkpoint of train/train.py"):
        run(cfg)


def test_a_checkpoint_whose_inside_is_broken_is_refused(own):
    cfg, _, path = own
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3")
    with pytest.raises(PipelineError, match=r"checkpoint_best.pt is damaged \(.*\): delete it and train again"):
        run(cfg)


def test_a_head_that_gives_nan_is_told(own):
    cfg, _, path = own
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["head"]["gain"] = torch.full_like(checkpoint["head"]["gain"], torch.nan)
    torch.save(checkpoint, path)
    with pytest.raises(PipelineError, match=r"trained .* gives vectors that are not finite"):
        run(cfg)


def test_a_checkpoint_that_is_not_there_says_what_makes_it(tmp_path):
    with pytest.raises(PipelineError, match=r"run train/train.py first"):
        run(config.load(None, [f"paths.root={tmp_path}"]))


# -------------------------------------------------------------------------------------------- the command


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
    assert first.splitlines()[:8] == second.splitlines()[:8]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(StaleArtefact, match=r"training.bootstrap_samples = 60; this run says 61"):
        run(merged, "--set", "training.bootstrap_samples=61")


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
    with pytest.raises(StaleArtefact, match=r"this run says 7"):
        run(cfg, "--set", "training.bootstrap_samples=1000", "--set", "global.seed=7")
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
        assert ("it may have seen others of their streets" in page) == seen


def test_a_damaged_report_of_the_split_is_told_before_anything_is_ranked(own, monkeypatch):
    cfg, *_ = own
    (cfg.paths.merged_dir / "split_report.json").write_text('{"kept": ')
    monkeypatch.setattr(protocol, "evaluate", None)  # calling it would be a TypeError
    with pytest.raises(PipelineError, match=r"split_report\.json is damaged"):
        run(cfg)


# ------------------------------------------------------------------------------------ further rows, other files


def published(cfg, folder, checkpoint_path):
    """A folder as publish/convert_to_hf.py writes it, but for the backbone."""
    from safetensors.torch import save_file

    from common import provenance

    checkpoint = torch.load(checkpoint_path, weights_only=True)
    folder.mkdir(parents=True)
    sizes = {key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    (folder / "config.json").write_text(json.dumps(sizes))
    weights = {f"head.{name}": tensor for name, tensor in checkpoint["head"].items()}
    save_file({**weights, "backbone.weight": torch.zeros(3)}, folder / "model.safetensors")
    trained_on = {"inputs": checkpoint["provenance"]["inputs"], "embedding_model": checkpoint["embedding_model"]}
    made = provenance.record("convert_to_hf", {}, {}).finished("published1", {}, {"trained_on": trained_on})
    (folder / "provenance.json").write_text(json.dumps(made.to_dict()))
    return folder


def other_vectors(path, columns, **changes):
    """A file of another model's vectors as another program would write it: plain lists, in another order."""
    frame = pd.DataFrame({name: list(column) for name, column in {**columns, **changes}.items()})
    frame.sample(frac=1, random_state=0).to_parquet(path)
    return path


def test_checkpoints_published_folders_and_files_are_further_rows(own, tmp_path):
    cfg, columns, first = own
    second = small_merge.write_checkpoint(small_merge.of_run(cfg, "second"), seed=3)
    folder = published(cfg, tmp_path / "hub" / "model", second)
    file = other_vectors(tmp_path / "theirs.parquet", columns["test"])
    assert run(cfg) == 0
    assert run(cfg, "--compare", str(second), str(first.parent), str(folder), str(file)) == 0
    alone = results.read(cfg.paths.evaluation_dir / "metrics.json")
    found = results.read(cfg.paths.evaluation_dir / "compared" / "metrics.json")
    assert list(found["methods"]) == ["raw", "pca", "whitening", "trained", "second", "default", "model", "theirs"]
    for name in alone["methods"]:
        assert found["methods"][name] == alone["methods"][name]
    assert found["methods"]["default"] == found["methods"]["trained"]  # the same head
    assert found["methods"]["model"] == found["methods"]["second"] != found["methods"]["trained"]
    assert found["methods"]["theirs"] == found["methods"]["raw"]  # the same vectors
    assert found["differences"]["trained-default"]["map@r"]["value"] == 0
    assert found["provenance"]["inputs"]["model"] == "published1"
    page = (cfg.paths.evaluation_dir / "compared" / "report.html").read_text()
    assert "the published model in" in page


def test_what_cannot_be_compared_is_told(own, tmp_path):
    cfg, columns, first = own
    folder = published(cfg, tmp_path / "model", first)
    few = {name: column[:50] for name, column in columns["test"].items()}
    twice = {
        **columns["test"],
        "streetview_image_id": ["0088_40000", *columns["test"]["streetview_image_id"][:-1]],
    }
    for path, message in (
        (other_vectors(tmp_path / "few.parquet", few), "no vector of image 0088_40050, and of 9 more"),
        (other_vectors(tmp_path / "twice.parquet", twice), "twice.parquet holds image 0088_40000 twice"),
        (tmp_path / "gone.pt", "gone.pt does not exist"),
        (cfg.paths.root, "neither a run's folder nor one that publish/convert_to_hf.py wrote"),
    ):
        with pytest.raises(PipelineError, match=message):
            run(cfg, "--compare", str(path))
    with pytest.raises(PipelineError, match=r"names .* twice"):
        run(cfg, "--compare", *[str(folder)] * 40)
    columns["train"]["heading"][0] += 1
    small_merge.write_split(cfg, "train", columns["train"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(StaleArtefact, match=r"model was trained on another train.parquet"):
        run(cfg, "--compare", str(folder))


def test_a_file_of_vectors_is_judged_by_the_same_protocol(own, tmp_path):
    cfg, columns, _ = own
    assert run(cfg) == 0
    path = tmp_path / "theirs.parquet"
    vectors = columns["test"]["embedding"].astype(np.float64)
    frame = pd.read_parquet(cfg.paths.merged_dir / "test.parquet")  # these two lines stand in the README
    frame.assign(embedding=list(vectors)).to_parquet(path)
    elsewhere = config.load(None, [f"paths.root={tmp_path / 'elsewhere'}"])  # no merge, no checkpoint
    assert run(elsewhere, "--embeddings", str(path)) == 0
    ours = results.read(cfg.paths.evaluation_dir / "metrics.json")
    theirs = results.read(elsewhere.paths.evaluation_dir / "theirs" / "metrics.json")
    assert theirs["methods"] == {"raw": ours["methods"]["raw"]}
    assert theirs["leakage"] is None
    assert "theirs.parquet" in (elsewhere.paths.evaluation_dir / "theirs" / "report.html").read_text()


def test_a_split_by_itself_is_known_by_its_record(own, tmp_path):
    cfg, *_ = own
    path = cfg.paths.merged_dir / "val.parquet"
    assert run(cfg, "--embeddings", "data/merged/val.parquet") == 0  # as the README says
    found = results.read(cfg.paths.evaluation_dir / "val" / "metrics.json")
    assert found["provenance"]["inputs"] == {"val.parquet": parquet.read_provenance(path).id}
    assert found["counts"]["queries"] == 60


def test_a_file_that_cannot_be_judged_says_why(own, tmp_path):
    cfg, columns, _ = own
    test, path = columns["test"], tmp_path / "theirs.parquet"
    wrong = {
        "no column pitch": lambda frame: frame.drop(columns="pitch"),
        "image 0088_40001 has 3 dimensions, those before it 24": lambda frame: frame.assign(
            embedding=[*frame["embedding"][:1], np.zeros(3, np.float16), *frame["embedding"][2:]]
        ),
        "image 0088_40002 holds NaN": lambda frame: frame.assign(
            embedding=[*frame["embedding"][:2], np.full(24, np.inf, np.float16), *frame["embedding"][3:]]
        ),
        "image 0088_40000 has no embedding": lambda frame: frame.assign(embedding=[None, *frame["embedding"][1:]]),
        "do not stand together": lambda frame: frame.sample(frac=1, random_state=0),
        "column heading has rows that are empty": lambda frame: frame.assign(heading=np.nan),
        "no query has a match": lambda frame: frame.iloc[::3],
        "has no rows": lambda frame: frame.iloc[:0],
        "embedding holds double, not lists": lambda frame: frame.assign(embedding=1.0),
        "embedding holds list<element: string>, not": lambda frame: frame.assign(embedding=[["1"]] * len(frame)),
        "embeddings have no dimensions": lambda frame: frame.assign(embedding=[np.zeros(0)] * len(frame)),
        "column heading holds .*string, not float": lambda frame: frame.assign(heading="north"),
        "column target_id holds double, not int64": lambda frame: frame.assign(target_id=frame["target_id"] + 0.5),
    }
    for message, spoil in wrong.items():
        spoil(pd.DataFrame({name: list(column) for name, column in test.items()})).to_parquet(path)
        with pytest.raises(PipelineError, match=message):
            run(cfg, "--embeddings", str(path))
    for gone in (tmp_path / "gone.parquet", tmp_path):
        with pytest.raises(PipelineError, match=rf"{gone} does not exist, or is no file"):
            run(cfg, "--embeddings", str(gone))


def test_types_of_other_programs_are_read_as_ours(own, tmp_path):
    cfg, columns, _ = own
    assert run(cfg) == 0
    frame = pd.DataFrame({name: list(column) for name, column in columns["test"].items()})
    frame = frame.assign(dataset_id=frame["dataset_id"].astype(float), patch_id=0, image_size=1.0)  # as by a join
    table = pa.Table.from_pandas(frame, preserve_index=False)
    place = table.schema.get_field_index("embedding")
    table = table.set_column(
        place, "embedding", table["embedding"].cast(pa.large_list(pa.float64()))
    )  # as by polars
    pq.write_table(table, tmp_path / "theirs.parquet")
    assert run(cfg, "--embeddings", str(tmp_path / "theirs.parquet")) == 0
    ours = results.read(cfg.paths.evaluation_dir / "metrics.json")
    theirs = results.read(cfg.paths.evaluation_dir / "theirs" / "metrics.json")
    assert theirs["methods"]["raw"] == ours["methods"]["raw"]
    assert theirs["breakdowns"]["dataset"]["classes"][0]["class"] == "0088"


def test_other_vectors_in_a_file_of_the_same_name_and_size_are_noticed(own, tmp_path):
    cfg, columns, _ = own
    test, path, sizes = columns["test"], tmp_path / "theirs.parquet", set()
    for sign in (1, -1):
        frame = pd.DataFrame({name: list(column) for name, column in test.items()})
        frame = frame.assign(embedding=list(sign * test["embedding"]))
        frame.to_parquet(path, compression=None, use_dictionary=False, write_statistics=False)
        sizes.add(path.stat().st_size)
        if sign == 1:
            assert run(cfg, "--embeddings", str(path)) == 0
    assert len(sizes) == 1
    with pytest.raises(StaleArtefact, match=r"made from another theirs.parquet"):
        run(cfg, "--embeddings", str(path))


def test_files_of_another_dimension_are_not_ranked_together(own):
    cfg, columns, _ = own
    columns["train"]["embedding"] = columns["train"]["embedding"][:, :10]
    small_merge.write_split(cfg, "train", columns["train"])
    with pytest.raises(PipelineError, match=r"train.parquet: .* 0088_0 has 10 dimensions, those before it 24"):
        load(cfg, "test", "train")


def test_evaluating_changes_no_embedding(merged):
    rows = load(merged, "test")
    single = gallery.Gallery(rows.num_queries, rows.table, rows.embeddings.astype(np.float32), rows.zones)
    before = single.embeddings.copy()
    methods._raw(single, CPU)
    np.testing.assert_array_equal(single.embeddings, before)  # float32 on the host: the same memory, if not copied


def test_check_tells_whether_two_files_have_the_same_figures(merged, evaluated, tmp_path, capsys):
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
    told = capsys.readouterr().out
    assert "global.seed: 0, 7" in told
    assert "(+2.00)" in told
    assert "methods.trained.recall@1.value" in told


def test_the_same_head_under_another_runs_name_gets_a_report_of_its_own(own):
    cfg, *_ = own
    run(cfg)
    (cfg.paths.checkpoints_dir / "default").rename(cfg.paths.checkpoints_dir / "best")
    with pytest.raises(StaleArtefact, match=r'training.run = "default"; this run says "best"'):
        run(cfg, "--set", "training.run=best")
