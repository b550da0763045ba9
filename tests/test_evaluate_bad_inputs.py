"""train/evaluate.py on unusual splits and checkpoints, or ones that do not match: what it reports for each."""

import json
import zipfile

import numpy as np
import pytest
import small_evaluation
import small_merge
import torch
from small_evaluation import load, run

from common import config
from common.errors import PipelineError, StaleArtefact

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def own(tmp_path):
    """(Configuration, columns by split, checkpoint) of a merge for a test to spoil."""
    return small_evaluation.write(tmp_path)


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
    with pytest.raises(PipelineError, match="image 0088_40004 holds a value that is missing, not finite"):
        run(cfg)


@pytest.mark.parametrize("length", [0.0, 1e-13])
def test_an_embedding_without_a_direction_is_named(own, length):
    """Such rows would be ranked by their lengths."""
    cfg, columns, _ = own
    columns["test"]["embedding"][4] *= length
    small_merge.write_split(cfg, "test", columns["test"])
    with pytest.raises(PipelineError, match="the embedding of image 0088_40004 is zero, or too short"):
        run(cfg)


def test_a_position_that_is_none_is_refused(own):
    cfg, columns, _ = own
    columns["test"]["target_lat"][4] = 999
    small_merge.write_split(cfg, "test", columns["test"])
    with pytest.raises(PipelineError, match=r"column target_lat holds 999\.0, in place of degrees"):
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
    with pytest.raises(PipelineError, match=f"{message} is in both test.parquet and train.parquet"):
        run(cfg)


def test_a_panorama_in_train_and_val_is_refused_too(own):
    cfg, columns, _ = own
    columns["val"]["street_view_id"][5] = columns["train"]["street_view_id"][1]
    small_merge.write_split(cfg, "val", columns["val"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(PipelineError, match=r"panorama 0088_1 is in both train.parquet and val.parquet"):
        run(cfg)


def test_a_checkpoint_of_another_merge_is_refused(own):
    cfg, columns, _ = own
    columns["train"]["heading"][0] += 1
    small_merge.write_split(cfg, "train", columns["train"])
    with pytest.raises(
        StaleArtefact, match=r"checkpoint_best.pt was trained on an earlier version of .*train.parquet"
    ) as error:
        run(cfg)
    assert str(cfg.paths.merged_dir / "train.parquet") in str(error.value)


def test_splits_of_two_merges_are_refused(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", columns["test"], config={"data.split_by": "building"})
    with pytest.raises(StaleArtefact, match=r'data.split_by = "geo" \(now "building"'):
        run(cfg)


def test_embeddings_of_another_model_are_refused_naming_both(own):
    cfg, columns, _ = own
    small_merge.write_split(cfg, "test", columns["test"], model={**small_merge.MODEL, "name": "other"})
    with pytest.raises(StaleArtefact, match=r"name tiny(.|\n)*name other"):
        run(cfg)


def test_a_checkpoint_older_than_views_is_of_the_whole_image(own):
    cfg, columns, _ = own  # the checkpoint's model names no views
    small_merge.write_split(cfg, "test", columns["test"], model={**small_merge.MODEL, "views": [1.0, 0.5]})
    with pytest.raises(StaleArtefact, match=r"views \[1.0\](.|\n)*views \[1.0, 0.5\]"):
        run(cfg)
    small_merge.write_split(cfg, "test", columns["test"], model={**small_merge.MODEL, "views": [1.0]})
    assert run(cfg) == 0


@pytest.mark.parametrize("content", [{"head": {}}, [1], np.random.default_rng(0)])
def test_a_checkpoint_of_another_program_is_refused(own, content):
    cfg, _, path = own
    torch.save(content, path)
    with pytest.raises(
        PipelineError, match=r"checkpoint_best.pt is not a checkpoint of this version of train/train.py"
    ):
        run(cfg)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dim": 7},
        {"baselines": {}},
        {"baselines": []},
        {"provenance": {}},
        {"dropout": "much"},
        {"head": []},
    ],
)
def test_a_checkpoint_of_another_version_is_refused(own, change):
    cfg, _, path = own
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(PipelineError, match=r"is not a checkpoint of this version of train/train.py\nrerun train"):
        run(cfg)


def test_a_checkpoint_whose_inside_is_broken_is_refused(own):
    cfg, _, path = own
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3")
    with pytest.raises(PipelineError, match=r"checkpoint_best.pt is damaged \(.*\)\nrerun train/train\.py"):
        run(cfg)


def test_a_head_that_yields_nan_is_refused(own):
    cfg, _, path = own
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["head"]["gain"] = torch.full_like(checkpoint["head"]["gain"], torch.nan)
    torch.save(checkpoint, path)
    with pytest.raises(PipelineError, match=r"trained .* yields vectors that are not finite"):
        run(cfg)


def test_a_missing_checkpoint_names_the_script_that_writes_it(tmp_path):
    with pytest.raises(PipelineError, match=r"run train/train.py first"):
        run(config.load(None, [f"paths.root={tmp_path}"]))


def test_files_of_another_dimension_are_not_ranked_together(own):
    cfg, columns, _ = own
    columns["train"]["embedding"] = columns["train"]["embedding"][:, :10]
    small_merge.write_split(cfg, "train", columns["train"])
    with pytest.raises(PipelineError, match="0088_0 has 10 dimensions; the rows before it have 24"):
        load(cfg, "test", "train")
