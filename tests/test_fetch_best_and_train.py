"""train/fetch_best_and_train.py: takes the right trial, trains as train.py does, and says how far it came."""

import made_up_merge
import numpy as np
import pytest
import torch
from conftest import paths_below

from common import config, parquet
from common.errors import PipelineError, StaleArtefact
from train import evaluate, fetch_best_and_train, optuna_worker, train
from train.tuning import shared_study

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = (
    *("tuning.trial_epochs=2", "training.epochs=3", "training.steps_per_epoch=6", "training.batch_size=32"),
    *("training_model.output_dim=16", "training_model.hidden_dim=16", "data.neighbors=20"),
    *("training.warmup_steps=1", "tuning.num_trials=3", "evaluation.bootstrap_samples=20"),
)


def flags(root, *more) -> list[str]:
    return [part for setting in (f"paths.root={root}", *SMALL, *more) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge, its difficulty and a finished study."""
    from difficulty import compute_visual_neighbors

    root = tmp_path_factory.mktemp("fetch")
    made_up_merge.write_merge(paths_below(root).merged_dir, streets=(6, 6, 6))
    compute_visual_neighbors.main(flags(root))
    optuna_worker.main(flags(root))
    return root


def load(root, *more):
    return config.load(None, [f"paths.root={root}", *SMALL, *more])


def checkpoint(root, run="default") -> dict:
    return torch.load(paths_below(root).checkpoints_dir / run / "checkpoint_best.pt", weights_only=True)


def test_the_best_trials_settings_are_trained_in_full_and_compared(root, capsys):
    cfg = load(root)
    best = shared_study.best_trial(shared_study.open_study(cfg, shared_study.record(cfg), create=False))
    assert best.value == max(
        t.value for t in shared_study.open_study(cfg, shared_study.record(cfg), create=False).trials
    )
    assert fetch_best_and_train.main(flags(root)) == 0
    told = capsys.readouterr().out
    found = checkpoint(root)
    assert f"from the {best.value:.4f} of trial {best.number} (2 epochs)" in told
    assert f"validation mAP@R {found['metrics']['map@r']:.4f}, " in told
    for key, value in best.params.items():
        assert found["config"][f"training.{key}"] == value
    assert found["config"]["training.epochs"] == 3
    assert fetch_best_and_train.main(flags(root)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_file_beside_the_checkpoint_repeats_the_run_with_train_py(root, tmp_path):
    fetch_best_and_train.main(flags(root))
    written = paths_below(root).checkpoints_dir / "default" / "config.toml"
    before = written.stat().st_mtime_ns
    assert train.main(["--config", str(written), "--set", "training.run=again"]) == 0
    ours, theirs = checkpoint(root), checkpoint(root, "again")
    for name, tensor in ours["head"].items():
        assert torch.equal(tensor, theirs["head"][name]), name
    assert ours["provenance"]["id"] == theirs["provenance"]["id"]
    folders = [
        {path.name for path in (paths_below(root).checkpoints_dir / run).iterdir()} for run in ("default", "again")
    ]
    assert folders[0] - folders[1] == {"config.toml"}
    histories = [
        parquet.read(paths_below(root).checkpoints_dir / run / "history.parquet") for run in ("default", "again")
    ]
    np.testing.assert_array_equal(*(table["val_map_at_r"] for table in histories))
    fetch_best_and_train.main(flags(root))
    assert written.stat().st_mtime_ns == before


def test_evaluation_takes_its_checkpoint_like_any_other(root, capsys):
    fetch_best_and_train.main(flags(root))
    assert evaluate.main(flags(root)) == 0
    assert "trained - whitening" in capsys.readouterr().out


def test_a_trial_can_be_named(root, capsys):
    cfg = load(root)
    tuning = shared_study.open_study(cfg, shared_study.record(cfg), create=False)
    other = next(t for t in tuning.trials if t.number != shared_study.best_trial(tuning).number)
    named = flags(root, "training.run=named")
    assert fetch_best_and_train.main([*named, "--trial", str(other.number)]) == 0
    assert checkpoint(root, "named")["config"]["training.margin"] == other.params["margin"]
    with pytest.raises(PipelineError, match=r"--trial 99 is not a finished trial; finished: 0, 1, 2"):
        fetch_best_and_train.main([*named, "--trial", "99"])


def test_a_run_of_other_settings_is_refused_and_keeps_its_file(root):
    run = flags(root, "training.run=taken")
    assert train.main(run) == 0
    with pytest.raises(StaleArtefact, match=r"(?s)training\.\w+ = .*\(now .*--set training.run=NAME"):
        fetch_best_and_train.main(run)
    assert not (paths_below(root).checkpoints_dir / "taken" / "config.toml").exists()
    assert fetch_best_and_train.main([*run, "--overwrite"]) == 0
    assert (paths_below(root).checkpoints_dir / "taken" / "config.toml").exists()


def test_trials_that_are_still_to_come_are_told(root, capsys):
    assert fetch_best_and_train.main(flags(root, "tuning.num_trials=10")) == 0
    assert "the study is incomplete: 7 trials remain" in capsys.readouterr().out


def test_without_a_study_it_says_what_makes_one(root, tmp_path):
    with pytest.raises(PipelineError, match=r"journal.log does not exist: run train/optuna_worker.py first"):
        fetch_best_and_train.main(flags(root, f"paths.study_dir={tmp_path}"))


def test_a_configuration_survives_being_written_and_read(root, tmp_path):
    odd = ("logging.wandb_project='a \"quoted\" \\ é'", "slurm.sbatch=['--x=1', '--y']")
    cfg = load(root, *odd, "tuning.search_space.loss={choices=['triplet', 'infonce']}")
    (tmp_path / "config.toml").write_text(config.to_toml(cfg), encoding="utf-8")
    assert config.load(tmp_path / "config.toml") == cfg
