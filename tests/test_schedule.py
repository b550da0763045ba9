"""train/fitting/schedule.py, and what a run says of it. Oracles: the batches that were drawn, counted, and the
learning rate written out."""

import math
import re
import signal

import numpy as np
import pytest
import short_training
from short_training import flags, settings

from common import cli, config
from common.errors import ConfigError, StaleArtefact, Stopped
from train import run_record
from train.datasets import Sampler, load_data
from train.fitting import schedule
from train.fitting.fit import fit
from train.train import main
from train.tuning import shared_study

pytestmark = pytest.mark.usefixtures("no_curves")
AUTO = "training.steps_per_epoch=auto"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return short_training.write_merge(tmp_path_factory.mktemp("merge"))


@pytest.mark.parametrize(
    ("images", "steps"),
    [(1, 10), (656, 10), (5_120, 10), (5_121, 11), (51_200, 100), (256_000, 500), (6_000_000, 500)],
)
def test_an_epoch_is_one_pass_over_the_images_within_bounds(images, steps):
    training = config.load().training
    assert (training.steps_per_epoch, training.batch_size) == ("auto", 512)
    assert schedule.steps_per_epoch(training, images) == steps
    fixed = config.load(None, ["training.steps_per_epoch=7"]).training
    assert schedule.steps_per_epoch(fixed, images) == 7


@pytest.mark.parametrize(("warmup", "total", "used"), [(100, 200, 20), (100, 10_000, 100), (0, 50, 0), (3, 9, 0)])
def test_the_learning_rate_rises_over_a_tenth_of_all_steps_at_most_then_falls_to_0(warmup, total, used):
    training = config.load(None, [f"training.warmup_steps={warmup}"]).training
    found = [schedule.learning_rate_factor(training, step, total) for step in range(total + 1)]
    rising = [(step + 1) / used for step in range(used)]
    falling = [(1 + math.cos(math.pi * step / (total - used))) / 2 for step in range(total - used + 1)]
    np.testing.assert_allclose(found, rising + falling, atol=1e-12)


def test_the_summary_counts_how_often_each_image_was_drawn_until_the_best_epoch(
    root, tmp_path, capsys, monkeypatch, caplog
):
    drawn, draw = {}, Sampler.draw

    def spy(self, step, arms):
        batch = draw(self, step, arms)
        drawn[step] = batch.anchors.numpy()
        return batch

    monkeypatch.setattr(Sampler, "draw", spy)
    more = ("training.epochs=6", "training.batch_size=32", "training.learning_rate=3e-3", AUTO)
    caplog.set_level("INFO", logger="pipeline")
    assert main(flags(root, f"paths.checkpoints_dir={tmp_path}", *more)) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    rows = load_data(config.load(None, settings(root))).train
    steps = math.ceil(len(rows.embeddings) / 32)
    assert steps > 10
    assert len(drawn) == 6 * steps
    assert f"train: {6 * steps * 32:,} triplets in" in told
    epoch, times = re.search(
        r"at epoch (\d+), by which each image was an anchor ([\d.]+) times on average", told
    ).groups()
    until_best = np.concatenate([drawn[step] for step in range(int(epoch) * steps)])
    counts = np.bincount(until_best, minlength=len(rows.embeddings))
    assert float(times) == pytest.approx(counts.mean(), abs=0.005)
    shrinkage = re.search(r"validation mAP@R \(by shrinkage\) .*; (\S+) is chosen", caplog.text)[1]
    assert float(shrinkage) in config.load().training_model.whitening_shrinkage


def test_a_resumed_run_counts_what_is_left(root, tmp_path, capsys, monkeypatch):
    draw = Sampler.draw

    def stopping(self, step, arms):
        monkeypatch.setattr(cli, "_stop_signal", signal.SIGTERM if step == 15 else None)
        return draw(self, step, arms)

    monkeypatch.setattr(Sampler, "draw", stopping)
    more = ("training.epochs=2", "logging.progress_interval_s=1e-9", AUTO)  # 10 to 20 steps each
    with pytest.raises(Stopped):
        main(flags(root, f"paths.checkpoints_dir={tmp_path}", *more))
    monkeypatch.undo()
    capsys.readouterr()
    assert main(flags(root, f"paths.checkpoints_dir={tmp_path}", *more)) == 0
    output = capsys.readouterr()
    totals = set(re.findall(r"^train: [\d,]+ of ([\d,]+) triplets", output.err, re.MULTILINE))
    assert totals == {re.search(r"train: ([\d,]+) triplets in", output.out)[1]}


@pytest.mark.parametrize(("init", "head"), [("whitening", "the learned whitening"), ("random", "random")])
def test_where_no_epoch_is_better_the_last_line_says_what_the_head_is_and_what_to_try(
    init, head, root, tmp_path, capsys
):
    worse = ("training.learning_rate=1e-12", "training.epochs=1", f"training_model.init={init}")
    assert main(flags(root, f"paths.checkpoints_dir={tmp_path}", *worse)) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"at epoch 0: the head is {head}, since no epoch of training was better" in told
    assert all(advice in told for advice in ("training.learning_rate", "training.steps_per_epoch", "more data"))


def test_auto_gives_the_run_of_the_number_that_it_stands_for_and_is_recorded_as_it_is_set(root):
    data = load_data(config.load(None, settings(root)))
    steps = math.ceil(data.train.num_images / 32)
    both = [
        fit(config.load(None, settings(root, "training.epochs=1", "training.batch_size=32", setting)), data)
        for setting in (AUTO, f"training.steps_per_epoch={steps}")
    ]
    one, other = (run.history.drop(columns=["seconds", "triplets_per_second"]) for run in both)
    assert one.equals(other)
    assert both[0].best["config"]["training.steps_per_epoch"] == "auto"


def test_a_run_of_the_former_default_is_told_apart_and_kept_by_setting_it(root, tmp_path, capsys):
    paths = (
        f"paths.checkpoints_dir={tmp_path}",
        "training.epochs=1",
        "training.batch_size=16",
        "training.bandit_groups=2",
    )
    assert main(flags(root, *paths, "training.steps_per_epoch=500")) == 0
    with pytest.raises(StaleArtefact, match=r'training\.steps_per_epoch = 500 \(now "auto"'):
        main(flags(root, *paths, AUTO))
    assert main(flags(root, *paths, "training.steps_per_epoch=500")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_it_can_be_tuned_though_it_is_auto(root):
    space = "tuning.search_space.steps_per_epoch=[5, 40]"
    cfg = config.load(None, settings(root, AUTO, space))
    shared_study.check_search_space(cfg)
    assert shared_study._distribution(cfg, "steps_per_epoch") == shared_study.IntDistribution(5, 40)
    assert config.with_training(cfg, steps_per_epoch=17).training.steps_per_epoch == 17
    ids = run_record.input_ids(cfg)
    assert "training.steps_per_epoch" in run_record.record(cfg, ids).config
    assert "training.steps_per_epoch" not in shared_study.record(cfg).config
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        shared_study.check_search_space(
            config.load(None, settings(root, "tuning.search_space.steps_per_epoch=[0, 9]"))
        )
