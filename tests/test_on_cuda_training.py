"""Training on a simulated CUDA device, which draws the CPU's random numbers and computes with its kernels. Oracle:
the same run on the CPU, bit for bit. Without dropout, which the CPU has its own of.
"""

import numpy as np
import pytest
import short_training
import simulated_cuda
import torch

from common import cli, config, devices
from common.errors import Stopped
from train.datasets import load_data
from train.evaluation import heads
from train.fitting import fit
from train.loss import LOSSES
from train.sampling.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("no_curves")
SAME = ("training.dtype=float32", "training_model.dropout=0")
SHORT = ("training.epochs=1", "training.steps_per_epoch=4")
REMINED = ("training.epochs=3", "training.steps_per_epoch=4", "training.remine_epochs=1", "training.loss=infonce")
SEMI_HARD = ("training.mining=semi_hard", "training.sampler=uniform")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge with its difficulty, 60 streets to train on."""
    return short_training.write_merge(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def data(root):
    return load(root)


@pytest.fixture(scope="module")
def remined(root, data):
    """A run on the CPU with bands mined anew after each epoch."""
    return train(root, data, *REMINED)


def load(root, *more):
    """The data, on the device if one is installed."""
    return load_data(config.load(None, short_training.settings(root, *more)))


def train(root, data, *more, **options) -> fit.FitResult:
    return short_training.train(root, data, options.pop("run_dir", None), *SAME, *more, **options)


def assert_same(ours: fit.FitResult, theirs: fit.FitResult) -> None:
    timed = ["seconds", "triplets_per_second"]
    for name in ours.history.columns.drop(timed):
        np.testing.assert_array_equal(ours.history[name], theirs.history[name], err_msg=name)
    assert ours.best["epoch"] == theirs.best["epoch"]
    for name, weights in theirs.best["head"].items():
        assert torch.equal(ours.best["head"][name], weights), name


@pytest.fixture(params=["on the device", "on the host"])
def home(request, monkeypatch):
    """Where the embeddings, the neighbours and the bands are."""
    monkeypatch.setattr(devices, "fits", lambda size, device: request.param == "on the device")
    return request.param


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_every_sampler_as_on_the_cpu(root, data, loss):
    runs = [(*SHORT, f"training.loss={loss}", f"training.sampler={sampler}") for sampler in SAMPLERS]
    expected = [train(root, data, *run) for run in runs]
    with simulated_cuda.installed() as cuda:
        there = load(root)
        for run, result in zip(runs, expected, strict=True):
            assert_same(train(root, there, *run), result)
        assert not cuda.races


def test_semi_hard_negatives_are_mined_as_on_the_cpu(root, data):
    expected = train(root, data, *SHORT, *SEMI_HARD)
    with simulated_cuda.installed() as cuda:
        assert_same(train(root, load(root), *SHORT, *SEMI_HARD), expected)
        assert not cuda.races


def test_bands_are_mined_anew_as_on_the_cpu(cuda, root, remined, home):
    there = load(root)
    assert there.train.embeddings.device.type == ("cuda" if home == "on the device" else "cpu")
    assert_same(train(root, there, *REMINED), remined)


class StopAt(cli.Progress):
    """A signal after so many steps."""

    def __init__(self, step: int, monkeypatch):
        super().__init__("train", "triplet")
        self.left, self.monkeypatch = step, monkeypatch

    def add(self, *_):
        self.left -= 1
        if not self.left:
            self.monkeypatch.setattr(cli, "_stop_signal", 12)


@pytest.mark.parametrize(("first", "then"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_stopped_run_resumes_on_either_device(cuda, root, data, remined, tmp_path, monkeypatch, first, then):
    of_device = {"cpu": data, "cuda": load(root)}
    with pytest.raises(Stopped) as stopped:  # within an epoch, with bands mined anew
        train(root, of_device[first], *REMINED, run_dir=tmp_path, progress=StopAt(6, monkeypatch))
    torch.cuda.synchronize()  # the batch that was drawn ahead goes with the process
    del stopped
    monkeypatch.setattr(cli, "_stop_signal", None)
    saved = heads.load_checkpoint(tmp_path / "checkpoint_last.pt")
    assert saved["resume"]["step"] == 6
    assert {weights.device.type for weights in saved["head"].values()} == {"cpu"}
    assert_same(train(root, of_device[then], *REMINED, run_dir=tmp_path), remined)


def test_it_trains_in_bfloat16_with_dropout_as_on_a_gpu(cuda, root):
    more = ("training.epochs=2", "training.steps_per_epoch=10", "training.sampler=uniform")
    there = load(root)
    losses = {
        dtype: short_training.train(root, there, None, *more, f"training.dtype={dtype}").history["loss"][2]
        for dtype in ("auto", "float32")
    }
    assert losses["auto"] != losses["float32"]
    assert losses["auto"] == pytest.approx(losses["float32"], rel=0.02)  # bfloat16 has 8 bits


# The most that a step within an epoch may cost with the defaults (bfloat16, dropout): kernels, and waits.
KERNELS = {"triplet": 176, "triplet, semi-hard": 197, "infonce": 218, "multi_similarity": 204}
GATHERED_BY_THE_HOST = {"on the device": 0, "on the host": 3}  # instead of by kernels
WAITS = {
    "on the device": {
        "copy from pageable memory": 1,  # the arms, by the stream that draws
        "event.synchronize": 1,  # the rewards, when all of the step is queued
    },
    "on the host": {
        "copy to the host": 4,  # which rows of the bands, of the neighbours (two indices) and of the embeddings
        "copy from pageable memory": 3,  # the arms, the bands, the neighbours
        "event.synchronize": 1,
    },
}


@pytest.mark.parametrize("loss", KERNELS)
def test_a_step_costs_no_more_kernels_and_waits(cuda, root, monkeypatch, home, loss):
    costs, step = [], fit.train_step

    def counted(*arguments):
        cuda.reset()
        step(*arguments)
        costs.append(cuda.reset())

    monkeypatch.setattr(fit, "train_step", counted)
    name, _, mining = loss.partition(", ")
    more = ["training.epochs=1", f"training.loss={name}", *(SEMI_HARD if mining else [])]
    short_training.train(root, load(root), None, *more)
    for cost in costs[1:-1]:  # the first draws its own batch, the last none for the next epoch
        assert cost.launches <= KERNELS[loss] - GATHERED_BY_THE_HOST[home]
        assert cost.waits == WAITS[home]
