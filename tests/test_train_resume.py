"""train/fitting/fit.py, checkpoints.py and remine.py: a real short run stopped, killed and resumed, with bands
mined anew;
and the curves that it leaves. Oracle: the undisturbed run.
"""

import dataclasses
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import short_training
import torch
import warm
from PIL import Image
from short_training import flags, settings

from common import cli, config, parquet
from common.errors import Stopped
from train.datasets import load_data, relations
from train.evaluation import heads
from train.fitting import checkpoints, remine
from train.fitting.history import draw
from train.sampling.bandit import DiscountedUcb
from train.train import main

pytestmark = pytest.mark.usefixtures("no_curves")
REMINE = ("training.remine_epochs=2",)
INFONCE = "training.loss=infonce"  # the default, which has a temperature to keep
LONGER = (INFONCE, "training.steps_per_epoch=150", "training.patience=9")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge with its difficulty, 60 streets to train on."""
    return short_training.write_merge(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def data(root):
    return load_data(config.load(None, settings(root)))


def train(root, data, run_dir=None, *more, **options):
    return short_training.train(root, data, run_dir, INFONCE, *more, **options)


def assert_same_checkpoints(ours, theirs):
    """Equal in everything but the times, of the epochs and of writing, and the commit (one may come meanwhile)."""
    ours, theirs = (heads.load_checkpoint(path / "checkpoint_last.pt") for path in (ours, theirs))
    for saved in (ours, theirs):
        for name in ("created", "git_commit", "seconds"):
            saved["provenance"].pop(name)
        saved["resume"].pop("timings")
    assert_equal(ours, theirs, "")


def assert_equal(ours, theirs, where):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), where  # NaN is where nothing was trained


@pytest.fixture(scope="module")
def undisturbed(root, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(root, data, folder)
    return folder


@pytest.fixture(scope="module")
def remined(root, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remined")
    train(root, data, folder, *REMINE)
    return folder


def test_bands_are_mined_in_the_heads_space(root, data):
    cfg = config.load(None, settings(root))
    head = train(root, data).best["head"]
    rows = remine.mine(cfg, data.train, heads.head_of(head_checkpoint(cfg, data, head)), head)
    vectors = heads.embed(heads.head_of(head_checkpoint(cfg, data, head)), data.train.embeddings, CPU)
    vectors = vectors.half().double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    _, negative = relations(data.train, *[torch.arange(len(vectors))] * 2)
    similarities = np.where(negative, vectors @ vectors.T, -np.inf)
    best = -np.sort(-similarities, axis=1)[:, :30]  # brute force
    found = rows.neighbor_rows.numpy()
    assert (found >= 0).all()
    np.testing.assert_allclose(np.take_along_axis(similarities, found.astype(int), axis=1), best, atol=1e-12)
    ratio = (1 - best) / (1 - best[:, 9:10])
    share = (rows.band_offsets.int().diff(dim=1).sum(dim=0) / ratio.size).numpy()
    np.testing.assert_allclose(share, 0.2, atol=0.01)  # the edges are percentiles, of the new ratios
    assert (found[:, 0] != data.train.neighbor_rows[:, 0].numpy()).mean() > 0.1  # the old space has others


def test_a_band_that_mining_leaves_empty_is_not_chosen_any_more(root, data, monkeypatch):
    real, chosen = remine.mine, []

    def mine(*arguments):
        rows = real(*arguments)
        offsets = rows.band_offsets.clone()
        offsets[:, 2] = offsets[:, 1]  # band 2 takes what was in band 1
        return dataclasses.replace(rows, band_offsets=offsets)

    def choose(self, groups, real=DiscountedUcb.choose):
        chosen.append(real(self, groups))
        return chosen[-1]

    monkeypatch.setattr(remine, "mine", mine)
    monkeypatch.setattr(DiscountedUcb, "choose", choose)
    train(root, data, None, *REMINE)
    before, after = np.concatenate(chosen[:12]), np.concatenate(chosen[12:])  # of two epochs each
    assert set(before) == {0, 1, 2, 3, 4, 5}
    assert set(after) == {0, 2, 3, 4, 5}


def head_checkpoint(cfg, data, head):
    sizes = {"input_dim": data.train.embeddings.shape[1], "dropout": cfg.training_model.dropout}
    return {"head": head, "hidden_dim": 48, "output_dim": 16, **sizes}


def test_mining_anew_changes_what_is_drawn_from_the_epoch_after_on(root, data, undisturbed, remined):
    plain, mined = (
        parquet.read(f / "history.parquet").to_pandas()["loss"].to_numpy() for f in (undisturbed, remined)
    )
    assert plain[1:3].tolist() == mined[1:3].tolist()  # remine_epochs = 2: first after epoch 2
    assert plain[3] != mined[3]


@pytest.mark.parametrize("steps", [[1], [12], [13, 15, 23]])  # before, at, and after the mining of epoch 2
def test_stopped_and_resumed_with_mined_bands_ends_bit_identical(
    root, data, remined, tmp_path, monkeypatch, steps
):
    stopped_at(root, data, tmp_path, monkeypatch, steps, *REMINE)
    assert_same_checkpoints(tmp_path, remined)


def test_a_signal_while_mining_leaves_everything_saved(root, data, remined, tmp_path, monkeypatch):
    real = remine.mine

    def stopped(*arguments):
        monkeypatch.setattr(cli, "_stop_signal", 12)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(remine, "mine", stopped)
        with pytest.raises(Stopped):
            train(root, data, tmp_path, *REMINE)
    monkeypatch.setattr(cli, "_stop_signal", None)
    train(root, data, tmp_path, *REMINE)
    assert_same_checkpoints(tmp_path, remined)


@pytest.mark.parametrize("steps", [[1], [6], [3, 4, 17]])  # in the first epoch, at its end, several times
def test_stopped_by_a_signal_and_resumed_ends_bit_identical(root, data, undisturbed, tmp_path, monkeypatch, steps):
    stopped_at(root, data, tmp_path, monkeypatch, steps)
    assert_same_checkpoints(tmp_path, undisturbed)
    history = [parquet.read(folder / "history.parquet").to_pandas() for folder in (tmp_path, undisturbed)]
    timed = ["seconds", "triplets_per_second"]
    pd.testing.assert_frame_equal(*(table.drop(columns=timed) for table in history))


def stopped_at(root, data, folder, monkeypatch, steps, *more):
    """A run in `folder` that is stopped after these steps, each time resumed, and then ends."""

    class Signals(cli.Progress):
        taken = 0

        def add(self, *_):
            Signals.taken += 1
            if Signals.taken in steps:
                monkeypatch.setattr(cli, "_stop_signal", 12)

    for _ in steps:
        with pytest.raises(Stopped):
            train(root, data, folder, *more, progress=Signals("train", "triplet"))
        monkeypatch.setattr(cli, "_stop_signal", None)
    train(root, data, folder, *more)


def stop_train(folder, root, at):
    """train.py in a process of its own, sent SIGUSR2 soon after the epoch `at` was told."""
    training = warm.Warm("train/train.py", *flags(root, *LONGER, f"paths.checkpoints_dir={folder}"))
    while training.process.is_alive() and f"epoch {at}:" not in training.told_so_far("stderr"):
        time.sleep(0.01)
    time.sleep(0.1)  # in the middle of the next epoch
    if training.process.is_alive():
        os.kill(training.process.pid, signal.SIGUSR2)
    done = training.finish()
    assert done.returncode == cli.EXIT_STOPPED, done.stderr


def test_stopped_by_sigusr2_three_times_exits_with_85_and_ends_bit_identical(root, tmp_path):
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    steps = []
    for epoch in (0, 1, 3):
        stop_train(stopped, root, at=epoch)
        steps.append(heads.load_checkpoint(stopped / "default" / "checkpoint_last.pt")["resume"]["step"])
    assert 0 < steps[0] <= 150 < steps[1] <= 300 < 450 < steps[2] <= 600
    for folder in (stopped, undisturbed):
        assert main(flags(root, *LONGER, f"paths.checkpoints_dir={folder}")) == 0
    assert_same_checkpoints(stopped / "default", undisturbed / "default")


def test_killed_between_its_files_and_run_again_ends_bit_identical(root, data, undisturbed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real, calls = checkpoints.write, []

    def write(path, content):
        calls.append(path.name)
        if len(calls) == 6:  # checkpoint_best.pt of epoch 2 is written, checkpoint_last.pt is not
            raise Killed
        real(path, content)

    monkeypatch.setattr(checkpoints, "write", write)
    with pytest.raises(Killed):
        train(root, data, tmp_path)
    assert calls[-1] == "checkpoint_last.pt"
    monkeypatch.setattr(checkpoints, "write", real)
    train(root, data, tmp_path)
    assert_same_checkpoints(tmp_path, undisturbed)


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_one_before(tmp_path, full_disk):
    path = tmp_path / "checkpoint_last.pt"
    checkpoints.write(path, {"epoch": 1})
    with full_disk(10_000), pytest.raises(OSError, match="File too large") as caught:
        checkpoints.write(path, {"epoch": 2, "head": torch.zeros(10_000)})
    assert caught.value.filename == str(path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_the_curves_are_a_picture(undisturbed, tmp_path):
    draw(tmp_path / "curves.png", parquet.read(undisturbed / "history.parquet").to_pandas())
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1000, 700)
        assert len(picture.getcolors(1 << 16)) > 10  # lines of many arms
