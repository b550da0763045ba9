"""train/compare.py: the command on a small merge. Oracle: the evaluation's own figures of the same checkpoint."""

import json

import made_up_merge
import numpy as np
import pytest
import torch
from conftest import paths_below

from common import cli, config
from common.errors import ConfigError, PipelineError, StaleArtefact
from difficulty import compute_visual_neighbors
from train import compare, evaluate
from train.evaluation import gallery, heads, methods, protocol
from train.fitting import history
from train.report import comparison

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = (
    *("training.epochs=2", "training.steps_per_epoch=25", "training.batch_size=128", "training.warmup_steps=1"),
    "training.learning_rate=1e-2",
    *("training_model.output_dim=16", "training_model.hidden_dim=16", "data.neighbors=20"),
    "evaluation.bootstrap_samples=50",
)


def flags(root, *more):
    return [part for setting in (f"paths.root={root}", *SMALL, *more) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge that was compared, with one seed."""
    folder = tmp_path_factory.mktemp("compare")
    made_up_merge.write_merge(paths_below(folder).merged_dir, streets=(12, 6, 24))
    compute_visual_neighbors.main(flags(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "draw", lambda path, table: path.touch())  # 12 pictures that nobody looks at
        assert compare.main([*flags(folder), "--seeds", "1"]) == 0
    return folder


def read(root):
    return json.loads((paths_below(root).evaluation_dir / "comparison.json").read_text())


def test_every_sampler_and_loss_has_a_run_of_each_seed_and_its_files(root):
    found = read(root)
    assert len({(row["sampler"], row["loss"], row["mining"]) for row in found["combinations"]}) == 13
    runs = {path.name for path in (paths_below(root).checkpoints_dir / "compare").iterdir()}
    mining = {"none": "", "semi_hard": "-semi_hard"}
    names = {f"{row['sampler']}-{row['loss']}{mining[row['mining']]}-0" for row in found["combinations"]}
    assert runs == names
    markdown = (paths_below(root).evaluation_dir / "comparison.md").read_text()
    assert markdown.strip() == comparison.as_markdown(found)
    assert (paths_below(root).evaluation_dir / "comparison.png").stat().st_size > 0


def test_figures_and_intervals_equal_those_of_the_evaluation(root):
    where = ("paths.checkpoints_dir=checkpoints/{backbone}/compare", "training.run=ucb-infonce-0")
    cfg = config.load(None, [f"paths.root={root}", *SMALL, *where])
    task = methods.task_of_run(cfg, [], evaluate.STAGE)
    rows = gallery.load(task.paths, cfg.data.ignore_radius_m)
    with cli.Progress("test", "ranking") as quiet:
        theirs = protocol.evaluate(cfg, rows, task.methods, torch.device("cpu"), quiet).figures
    found = read(root)
    ours = next(r for r in found["combinations"] if (r["sampler"], r["loss"]) == ("ucb", "infonce"))
    assert ours["best_epochs"] != [0]  # else it would be the whitening, and no difference tested
    for name in comparison.FIGURES:
        for end in ("value", "low", "high"):
            assert found["whitening"][name][end] == pytest.approx(theirs["methods"]["whitening"][name][end])
            assert ours["figures"][name][end] == pytest.approx(theirs["methods"]["trained"][name][end])
            difference = theirs["differences"]["trained-whitening"][name][end]
            assert ours["minus_whitening"][name][end] == pytest.approx(difference, abs=1e-12)  # paired


def test_the_control_is_compared_with_itself_as_nothing(root):
    for row in read(root)["combinations"]:
        if row["sampler"] == comparison.CONTROL:
            assert {f["low"] for f in row["minus_control"].values()} == {0.0}
        assert np.mean(row["by_seed"]["map@r"]) == pytest.approx(row["figures"]["map@r"]["value"])


def test_run_again_it_shows_the_table_and_trains_nothing(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in paths_below(root).checkpoints_dir.rglob("*.pt")}
    assert compare.main([*flags(root), "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing to do" in shown
    assert "learned whitening" in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(StaleArtefact, match="epochs"):
        compare.main([*flags(root, "training.epochs=3"), "--seeds", "1"])


@pytest.fixture
def two(monkeypatch):
    """Two combinations in place of all."""
    chosen = [comparison.Combination(sampler, "triplet") for sampler in ("ucb", comparison.CONTROL)]
    monkeypatch.setattr(comparison, "combinations", lambda: chosen)


def test_more_seeds_are_other_runs_and_those_there_are_kept(root, tmp_path, two):
    before = {
        path: path.stat().st_mtime_ns for path in paths_below(root).checkpoints_dir.rglob("checkpoint_best.pt")
    }
    arguments = flags(root, f"paths.evaluation_dir={tmp_path}")
    assert compare.main([*arguments, "--seeds", "2"]) == 0
    runs = [paths_below(root).checkpoints_dir / "compare" / f"ucb-triplet-{seed}" for seed in (0, 1)]
    checkpoints = [heads.load_checkpoint(run / "checkpoint_last.pt") for run in runs]
    assert [checkpoint["config"]["training.seed"] for checkpoint in checkpoints] == [0, 1]
    assert not np.array_equal(*(checkpoint["head"]["linear.weight"] for checkpoint in checkpoints))
    assert len(before) == 13
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(row["by_seed"]["map@r"]) for row in found["combinations"]] == [2, 2]


def test_shards_share_the_runs_and_the_command_without_them_makes_the_table(root, tmp_path, capsys, two):
    arguments, runs = flags(root, f"paths.checkpoints_dir={tmp_path}", f"paths.evaluation_dir={tmp_path}"), {}
    for shard in range(2):
        assert compare.main([*arguments, "--seeds", "1", "--shard", str(shard), "--num-shards", "2"]) == 0
        assert "1 runs in, 1 out" in capsys.readouterr().out
        assert not (tmp_path / "comparison.json").exists()
        runs[shard] = list(tmp_path.rglob("history.parquet"))
    assert (len(runs[0]), len(runs[1])) == (1, 2)
    assert compare.main([*arguments, "--seeds", "1"]) == 0
    of_two, of_all = (json.loads((folder / "comparison.json").read_text())["combinations"]
                      for folder in (tmp_path, paths_below(root).evaluation_dir))  # fmt: skip
    assert of_two == [row for row in of_all if row in of_two]
    assert len(of_two) == 2


def test_a_damaged_table_is_named(root, tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(PipelineError, match=r"comparison\.json is damaged .*rerun train/compare.py"):
        compare.main([*flags(root, f"paths.evaluation_dir={tmp_path}"), "--seeds", "1"])


def test_differences_whose_interval_excludes_0_are_bold():
    def figure(low, high):
        return {"value": 0.1, "low": low, "high": high}

    cells = [
        comparison.difference(figure(*ends)) for ends in ((0.05, 0.2), (-0.2, -0.0001), (-0.1, 0.2), (None, None))
    ]
    assert cells == ["**+10.0 [+5.0, +20.0]**", "**+10.0 [-20.0, -0.0]**", "+10.0 [-10.0, +20.0]", "+10.0"]


def test_no_seeds_are_refused(root):
    with pytest.raises(ConfigError, match="--seeds"):
        compare.main([*flags(root), "--seeds", "0"])
