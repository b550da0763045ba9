"""train/train.py and train/fitting/fit.py: a real short run, what it learns, draws, tells and records. Oracles:
the
whitening that it starts from, and its own steps as a spy sees them.
"""

import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import short_training
import torch
import wandb
from made_up_merge import MODEL
from short_training import flags, settings, train

from common import config, parquet
from common.errors import PipelineError, StaleArtefact
from train.datasets import Sampler, load_data
from train.evaluation import heads
from train.fitting import fit, history
from train.fitting.history import draw
from train.loss import Loss
from train.sampling.bandit import DiscountedUcb
from train.sampling.samplers import arms_of_step
from train.train import main

pytestmark = pytest.mark.usefixtures("no_curves")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge with its difficulty, 60 streets to train on."""
    return short_training.write_merge(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def data(root):
    return load_data(config.load(None, settings(root)))


def test_epoch_0_is_the_whitening_and_the_best_epoch_is_never_worse(root, data, tmp_path):
    result = train(root, data, tmp_path / "run")
    whitening = data.baselines["whitening"]
    assert result.history["val_map_at_r"][0] == pytest.approx(whitening["validation"]["map@r"], abs=1e-3)
    assert result.best["metrics"]["map@r"] == result.history["val_map_at_r"].max()
    assert result.best["epoch"] == result.history["val_map_at_r"].argmax()
    assert len(result.history) == 5
    saved = heads.load_checkpoint(tmp_path / "run" / "checkpoint_best.pt")
    assert saved["epoch"] == result.best["epoch"]
    assert saved["metrics"]["map@r"] == result.best["metrics"]["map@r"]
    assert saved["metrics"]["whitening"] == whitening["validation"]
    assert saved["metrics"]["whitening_shrinkage"] == whitening["shrinkage"]
    assert saved["embedding_model"] == MODEL
    again = data.validation.of_head(heads.head_of(saved))
    assert again["map@r"] == pytest.approx(result.best["metrics"]["map@r"], abs=1e-6)
    baseline = saved["baselines"]["whitening"]
    axes = baseline["mean"], baseline["projection"]
    linear = data.validation.of_vectors(heads.project(data.validation.embeddings, *axes, data.train.device))
    assert linear["map@r"] == pytest.approx(whitening["validation"]["map@r"], abs=1e-6)
    assert {"mean", "projection"} == saved["baselines"]["pca"].keys()


@pytest.mark.parametrize("loss", ["triplet", "infonce", "multi_similarity"])
@pytest.mark.parametrize("sampler", ["uniform", "hard_random", "random"])
def test_every_loss_trains_with_every_sampler(root, data, loss, sampler):
    more = (f"training.loss={loss}", f"training.sampler={sampler}", "training.epochs=1")
    history = train(root, data, None, *more).history
    assert np.isfinite(history["loss"][1])
    shares = history.filter(like="share_").loc[1]
    assert shares.sum() == pytest.approx(1)
    assert (shares["share_random"] == 1) == (sampler == "random")
    if sampler == "hard_random":
        assert shares["share_random"] == 0.5


@pytest.mark.parametrize("loss", ["triplet", "infonce"])
def test_training_learns_what_whitening_cannot(root, data, loss):
    more = ("epochs=2", "steps_per_epoch=25", "batch_size=256", "learning_rate=3e-3", f"loss={loss}")
    result = train(root, data, None, *(f"training.{setting}" for setting in more))
    # mirrored views: see made_up_merge
    assert result.best["metrics"]["map@r"] > result.history["val_map_at_r"][0] + 0.02


def test_rewards_reach_the_sampler(root, data, tmp_path):
    train(root, data, tmp_path, "training.bandit_exploration=0.02", "training.margin=0.3")
    history = parquet.read(tmp_path / "history.parquet").to_pandas()
    arms = [name.removeprefix("share_") for name in history if name.startswith("share_")]
    assert arms == [*(f"band_{b}" for b in range(5)), "random"]
    last = history.iloc[-1]
    shares, rewards = (np.array([last[f"{kind}_{arm}"] for arm in arms]) for kind in ("share", "reward"))
    assert shares.argmax() == np.nanargmax(rewards)  # with little exploration the best arm gets the draws
    assert shares.max() > 0.8
    early = history.iloc[1].filter(like="share_")
    assert early.max() < shares.max()  # it did not know that from the start


def test_a_steps_reward_is_known_before_the_next_step_is_drawn(root, data, monkeypatch):
    calls = []
    for owner, name in ((DiscountedUcb, "choose"), (Sampler, "draw"), (DiscountedUcb, "update")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real, name=name: calls.append(name) or real(*given))
    train(root, data, None, "training.epochs=2")
    assert calls == ["choose", "draw", "update"] * 12  # drawn a step ahead, but never before the reward


def test_the_loss_sees_what_the_bandit_chose(root, data, tmp_path, monkeypatch):
    chosen, drawn, seen = [], [], []

    def spy(owner, name, keep):
        real = getattr(owner, name)

        def spied(self, *arguments):
            result = real(self, *arguments)
            keep(arguments, result)
            return result

        monkeypatch.setattr(owner, name, spied)

    spy(DiscountedUcb, "choose", lambda arguments, arms: chosen.append(arms))
    spy(Sampler, "draw", lambda arguments, batch: drawn.append(batch))
    spy(Loss, "forward", lambda arguments, result: seen.append(arguments[0].detach()))
    more = ("training_model.dropout=0", "training.learning_rate=1e-12", "training.epochs=2")
    history = train(root, data, None, *more).history
    assert len(chosen) == len(drawn) == len(seen) == 12
    rows, triplets = data.train, np.zeros((3, 6))
    head = fit.start(
        config.load(None, settings(root, *more)), data
    ).head  # which that learning rate leaves as it is
    for step, (arms, batch, vectors) in enumerate(zip(chosen, drawn, seen, strict=True)):
        torch.testing.assert_close(vectors, heads.embed(head, rows.embeddings[batch.rows], CPU), atol=1e-5, rtol=0)
        for i, arm in enumerate(np.repeat(arms, 8)):  # 8 groups of 8 anchors
            anchor, negative = int(batch.anchors[i]), int(batch.negatives[i])
            first, last = rows.band_offsets[anchor][arm : arm + 2].tolist() if arm < 5 else (0, 0)
            if first < last:  # else the nearest band that is not empty, or any row: see test_datasets
                assert batch.arms[i] == arm
                assert negative in rows.neighbor_rows[anchor, first:last].tolist()
            triplets[1 + step // 6, int(batch.arms[i])] += 1
    shares = history.filter(like="share_").to_numpy()[1:]
    np.testing.assert_allclose(shares, triplets[1:] / triplets[1:].sum(axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["infonce", "multi_similarity"])
def test_the_loss_contrasts_no_rows_of_one_building_or_within_its_ignore_zone(root, data, monkeypatch, name):
    seen = []
    real_draw, real_loss = Sampler.draw, Loss.forward

    def draw(self, *arguments):
        seen.append([real_draw(self, *arguments)])
        return seen[-1][0]

    def forward(self, vectors, *masks):
        next(step for step in seen if len(step) == 1).append(masks)
        return real_loss(self, vectors, *masks)

    monkeypatch.setattr(Sampler, "draw", draw)
    monkeypatch.setattr(Loss, "forward", forward)
    train(root, data, None, f"training.loss={name}", "training.epochs=1")
    assert len(seen) == 6
    near = 0
    for batch, (positive, negative) in seen:
        rows = batch.rows
        first = rows if name == "multi_similarity" else batch.anchors
        same = data.train.building_of_row[first][:, None] == data.train.building_of_row[rows]
        xyz_m = data.train.xyz_m
        metres = (xyz_m[first][:, None] - xyz_m[rows]).norm(dim=2)
        assert torch.equal(positive, same & (first[:, None] != rows))
        assert torch.equal(negative, ~same & (metres > 25))
        near += int((~same & (metres <= 25)).sum())
    assert near > 0


def test_infonce_learns_its_temperature(root, data, tmp_path):
    more = ("training.loss=infonce", "training.epochs=1")
    train(root, data, tmp_path, *more)
    learned = heads.load_checkpoint(tmp_path / "checkpoint_last.pt")["resume"]["loss"]["log_temperature"]
    assert learned != fit.start(config.load(None, settings(root, *more)), data).loss.log_temperature


def test_bfloat16_trains_as_well(root, data):
    exact, rounded = (train(root, data, None, f"training.dtype={dtype}") for dtype in ("float32", "bfloat16"))
    assert exact.history["loss"][1] != rounded.history["loss"][1]
    assert rounded.best["metrics"]["map@r"] == pytest.approx(exact.best["metrics"]["map@r"], abs=0.01)


def test_random_initialisation_starts_below_whitening(root, data):
    random = train(root, data, None, "training_model.init=random", "training.epochs=1").history
    assert random["val_map_at_r"][0] < data.baselines["whitening"]["validation"]["map@r"] - 0.05


def test_a_hook_may_end_a_run_and_sees_every_epoch(root, data):
    seen = []

    def prune(epoch, value):
        seen.append((epoch, value))
        if epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(root, data, on_epoch=prune)
    assert [epoch for epoch, _ in seen] == [0, 1, 2]


def test_it_stops_early_when_validation_no_longer_improves(root, data):
    more = ("training.learning_rate=1e-12", "training.patience=2", "training.epochs=50")
    assert len(train(root, data, None, *more).history) == 3


def test_another_seed_draws_other_triplets(root, data):
    runs = [train(root, data, None, "training.epochs=1", f"training.seed={seed}").history for seed in (1, 2)]
    assert runs[0]["loss"][1] != runs[1]["loss"][1]
    assert runs[0]["val_map_at_r"][0] == runs[1]["val_map_at_r"][0]  # nothing of validation or baseline moves


def test_the_seed_of_the_split_draws_no_triplets_and_both_are_recorded(root, data, tmp_path):
    runs = [train(root, data, tmp_path / str(seed), "training.epochs=1", f"global.seed={seed}") for seed in (1, 2)]
    assert runs[0].history["loss"][1] == runs[1].history["loss"][1]
    config_of = heads.load_checkpoint(tmp_path / "2" / "checkpoint_last.pt")["config"]
    assert (config_of["global.seed"], config_of["training.seed"]) == (2, 0)
    with pytest.raises(StaleArtefact, match=r"training\.seed = 0 \(now 5"):
        train(root, data, tmp_path / "2", "training.epochs=1", "global.seed=2", "training.seed=5")


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_batch(root, data, tmp_path):
    more = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.sampler=uniform")
    with pytest.raises(PipelineError, match=r"(?s)not finite at step .*lower training\.learning_rate"):
        train(root, data, tmp_path, *more)
    bad = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    arms = arms_of_step("uniform", DiscountedUcb(fit.arms_of(data.train), 0.3, 0.99), bad["step"], 8)
    batch = Sampler(data.train, 64, 8, seed=0).draw(bad["step"], arms)  # the same batch once more
    assert torch.equal(bad["rows"], batch.rows)
    assert torch.equal(bad["arms"], batch.arms)


def test_weights_that_are_not_finite_after_an_epochs_last_step_end_the_run(root, data):
    more = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.steps_per_epoch=1")
    with pytest.raises(PipelineError, match=r"(?s)vectors that are not finite.*lower training\.learning_rate"):
        train(root, data, None, *more)  # the loss of step 0 is that of the whitening


def test_the_command_trains_says_so_and_has_nothing_to_do_the_second_time(root, tmp_path, capsys, caplog):
    paths = (f"paths.checkpoints_dir={tmp_path}", "training.run=mine", "training.epochs=1")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert main(flags(root, *paths)) == 0
    assert "epoch 1: loss" in caplog.text
    assert "learned whitening" in capsys.readouterr().out
    run = tmp_path / "mine"
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoint_best.pt", "checkpoint_last.pt", "history.parquet", "curves.png"}
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(flags(root, *paths)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    (run / "checkpoint_best.pt").unlink()
    assert main(flags(root, *paths)) == 0
    assert (run / "checkpoint_best.pt").exists()
    with pytest.raises(StaleArtefact, match=r"training\.margin = 0\.1 \(now 0\.2"):
        main(flags(root, *paths, "training.margin=0.2"))
    assert main([*flags(root, *paths, "training.margin=0.2"), "--overwrite"]) == 0
    assert heads.load_checkpoint(run / "checkpoint_best.pt")["config"]["training.margin"] == 0.2


def test_a_remade_run_resumes_and_the_former_one_stays_until_it_has_finished(root, data, tmp_path, caplog):
    run, settings = tmp_path / "run", "training.margin=0.2"
    train(root, data, run)
    former = (run / "checkpoint_best.pt").read_bytes()

    def stop(epoch: int, _):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(StaleArtefact):
        train(root, data, run, settings)
    with pytest.raises(KeyboardInterrupt):
        train(root, data, run, settings, redo="stale", on_epoch=stop)
    assert (run / "former" / "checkpoint_best.pt").read_bytes() == former
    assert not parquet.read_provenance(run / "history.parquet").facts["finished"]
    (run / "checkpoint_best.pt").write_bytes(former)  # as if it had been killed between its files
    caplog.clear()
    again = train(root, data, run, settings, redo="stale")
    assert "resumes at step 12" in caplog.text
    assert not (run / "former").exists()
    undisturbed = train(root, data, tmp_path / "other", settings)
    assert torch.equal(again.best["head"]["linear.weight"], undisturbed.best["head"]["linear.weight"])
    steps = len(caplog.records)
    train(root, data, run, settings, redo="stale")  # a finished run that matches
    assert "is finished" in caplog.records[steps].message


def test_missing_and_damaged_files_are_named(root, tmp_path):
    with pytest.raises(
        PipelineError, match=r"train\.parquet does not exist: run preprocess/merge_and_split\.py first"
    ):
        main(flags(tmp_path))
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "checkpoint_last.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(PipelineError, match=r"checkpoint_last\.pt is damaged"):
        main(flags(root, f"paths.checkpoints_dir={tmp_path}"))


def wandb_records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format: blocks of 32 KiB, pieces with
    checksum, length and kind (1: whole, 2: first, 3: middle, 4: last of a record)."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # what is left of a block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def warnings_of_wandb(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("wandb: ")]


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """A home below which nobody can write, root included: a file is in its place."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "XDG_"))]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_home")
def test_wandb_offline_records_settings_epochs_and_what_the_run_came_to(root, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(history, "draw", draw)  # wandb takes no empty file for a picture
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, "secret" * 7)
    result = train(root, data, tmp_path / "run", "logging.wandb_mode=offline", "training.epochs=2")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secretsecret" in path.read_bytes()]
    assert not warnings_of_wandb(caplog)
    assert "WANDB_DATA_DIR" not in os.environ  # it was this run's
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(path))

    def values(items):  # the last of each key
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    epochs = [values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row["val_map_at_r"] for row in epochs] == result.history["val_map_at_r"].tolist()
    summary = values(item for record in records for item in record.summary.update)
    assert summary["best/map@r"] == result.best["metrics"]["map@r"]
    assert summary["best/epoch"] == result.best["epoch"]
    assert summary["curves"]["_type"] == "image-file"
    config_of = values(item for record in records for item in record.run.config.update)
    assert config_of["training.margin"] == 0.1
    (artifact,) = (record.request.log_artifact.artifact if record.HasField("request") else record.artifact
                   for record in records if record.HasField("artifact"))  # fmt: skip
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files.keys() == {"best.json", "config.json", "curves.png", "history.parquet"}
    assert files["history.parquet"].read_bytes() == (tmp_path / "run" / "history.parquet").read_bytes()
    assert json.loads(files["best.json"].read_text())["map@r"] == result.best["metrics"]["map@r"]


def test_wandb_that_cannot_start_is_a_warning(root, data, tmp_path, monkeypatch, caplog):
    def refuse(**_):
        raise wandb.errors.UsageError(
            "No API key configured. Use `wandb login` to log in.\nMore"
        )  # as without a terminal

    monkeypatch.setattr(wandb, "init", refuse)
    train(root, data, tmp_path / "run", "logging.wandb_mode=online", "training.epochs=2")
    (told,) = warnings_of_wandb(caplog)
    assert told == ("wandb: No API key configured. Use `wandb login` to log in.; the run goes on without tracking")
    assert parquet.num_rows(tmp_path / "run" / "history.parquet") == 3


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(("users", "expected"), [({}, 600), ({"WANDB_FINISH_TIMEOUT": "5"}, 5)])
def test_wandb_without_a_network_does_not_keep_a_finished_run(root, data, tmp_path, monkeypatch, users, expected):
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    settings = wandb.Settings()

    def start(**_):
        settings.update_from_env_vars(dict(os.environ))
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", start)
    train(root, data, tmp_path / "run", "logging.wandb_mode=online", "training.epochs=1")
    if "finish_timeout" in wandb.Settings.model_fields:  # wandb 0.27.2 or newer
        assert settings.finish_timeout == expected
    assert os.environ.get("WANDB_FINISH_TIMEOUT") == users.get("WANDB_FINISH_TIMEOUT")


def test_a_run_outlives_wandbs_own_process(root, data, tmp_path, monkeypatch, caplog):
    started, popen = [], subprocess.Popen

    def start(command, *args, **options):
        process = popen(command, *args, **options)
        started.extend([process] if "--port-filename" in command else [])
        return process

    monkeypatch.setattr(subprocess, "Popen", start)

    def kill_it(epoch, _map_at_r):
        if epoch == 1:
            (core,) = started  # wandb's own process
            core.kill()

    train(root, data, tmp_path / "run", "logging.wandb_mode=offline", on_epoch=kill_it)
    assert len(warnings_of_wandb(caplog)) == 1
    assert parquet.num_rows(tmp_path / "run" / "history.parquet") == 5


def test_a_run_that_wandb_is_to_track_needs_wandb(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an ImportError then
    with pytest.raises(PipelineError, match=r'wandb_mode = "offline" needs .*\n.*pip install .*\[tracking\]'):
        main(flags(root, f"paths.checkpoints_dir={tmp_path}", "logging.wandb_mode=offline"))
    train(root, load_data(config.load(None, settings(root))), None, "training.epochs=1")  # not needed otherwise
