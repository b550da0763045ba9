"""One training run, from loaded data to the best checkpoint: of train.py, and of every Optuna trial."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common import cli
from common.devices import resolve_dtype
from common.errors import PipelineError
from common.sections import Config
from publish.model.projection_head import ProjectionHead
from train import run_record
from train.datasets import Batch, TrainingData, TrainRows, relations, step_seed
from train.fitting import checkpoints, history, remine, schedule, tracking
from train.fitting.dropout import replace_dropout
from train.loss import Loss
from train.sampling import samplers
from train.sampling.bandit import DiscountedUcb
from train.sampling.feed import Feed, reading

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class FitResult:
    """The outcome of a run."""

    best: dict  # the content of checkpoint_best.pt; its "epoch" is 0 if the head is still the whitening
    history: pd.DataFrame  # a row per epoch, from epoch 0


@dataclass
class Run:
    """Everything that training changes. checkpoints.py saves it as one dict, and restores it."""

    head: ProjectionHead
    loss: Loss
    optimizer: torch.optim.Optimizer
    bandit: DiscountedUcb
    steps_per_epoch: int
    sums: np.ndarray  # of the current epoch: loss, steps, then triplets by arm and semi-hard triplets by arm
    history: list[dict] = field(default_factory=list)  # a row per finished epoch, without the timings
    timings: list[dict] = field(default_factory=list)  # by row; apart: they differ between identical runs
    best: dict = field(default_factory=dict)  # "epoch", "metrics" and "head" of the best epoch
    mined_with: dict | None = None  # weights of the head that mined the bands; None: the backbone's bands
    arms: np.ndarray | None = None  # (G,): already chosen for the current step
    step: int = 0

    @property
    def epoch(self) -> int:
        """The current epoch; 0 is the validation before training."""
        return len(self.history)


def fit(
    cfg: Config,
    data: TrainingData,
    *,
    run_dir: Path | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    saved: dict | None = None,
    progress: cli.Progress | None = None,
) -> FitResult:
    """Train a head on `data` (see `datasets.load_data`) with the settings of `cfg`.

    With a `run_dir` it keeps checkpoint_{best,last}.pt, history.parquet and curves.png there. `saved`: where it
    continues (see `checkpoints.existing`); without, what is in `run_dir` is kept in former/ until it has finished.
    `on_epoch(epoch, val_map_at_r)` is called after each epoch, including epoch 0 (before training), and may raise
    to end the run. On SIGTERM or SIGUSR2 it saves after the current step and raises Stopped. `progress` counts
    triplets.
    """
    record = run_record.record(cfg, data.inputs)
    store = checkpoints.RunFolder(cfg, data, record, run_dir)
    run = start(cfg, data)
    if run_dir and saved is None:
        checkpoints.set_aside(run_dir)
    finished = saved is not None and saved["resume"]["finished"]
    if saved is not None:
        checkpoints.restore(run, saved)
        store.save(run, finished)  # restores files deleted in the meantime
        log.info("%s %s", run_dir, "is finished" if finished else f"resumes at step {run.step:,}")
    if not finished:
        with tracking.session(cfg, run_dir, record) as tracker:
            train(cfg, data, run, store, tracker, on_epoch, progress)
            if run_dir:
                tracker.log_results(run_dir, store.best(run))
    return FitResult(store.best(run), history.frame(run.history, run.timings))


def train(
    cfg: Config,
    data: TrainingData,
    run: Run,
    store: checkpoints.RunFolder,
    tracker: tracking.Tracker,
    on_epoch: Callable[[int, float], None] | None,
    progress: cli.Progress | None,
) -> None:
    """Run the remaining epochs; see `fit`."""
    training, finished = cfg.training, False
    feed = make_feed(cfg, data, run)
    while not finished:
        began, first_step = time.monotonic(), run.step
        while run.step < run.epoch * run.steps_per_epoch:
            train_step(cfg, data, run, feed, store.run_dir)
            if progress:
                progress.add(training.batch_size)
            if cli.stop_requested():
                store.save(run, finished=False)
                cli.check_stop()
        finish_epoch(cfg, data, run, time.monotonic() - began, run.step - first_step)
        epoch = run.epoch - 1
        finished = epoch >= training.epochs or epoch - run.best["epoch"] >= training.patience
        due = training.remine_epochs and epoch and epoch % training.remine_epochs == 0 and not finished
        if due:
            run.mined_with = checkpoints.weights_of(run.head)
        store.save(run, finished)
        tracker.log({**run.history[-1], **run.timings[-1]}, epoch)
        if on_epoch:
            on_epoch(epoch, run.history[-1]["val_map_at_r"])
        if due:
            feed = make_feed(cfg, data, run)


def start(cfg: Config, data: TrainingData) -> Run:
    """A run before its first step: the head is the whitening, or random, and the bandit has seen nothing."""
    settings, training = cfg.training_model, cfg.training
    torch.manual_seed(step_seed(training.seed, 0, purpose=3))
    input_dim = data.train.embeddings.shape[1]
    head = ProjectionHead(input_dim, settings.hidden_dim, settings.output_dim, settings.dropout)
    if data.train.device.type == "cpu":
        replace_dropout(head.mlp)
    whitening = data.baselines["whitening"]
    with torch.no_grad():
        head.mean.copy_(whitening["mean"])
        if settings.init == "whitening":  # any scale gives the same head; this one matches the MLP's outputs
            head.linear.weight.copy_(whitening["projection"] / whitening["spread"])
    loss = Loss(training.loss, training.margin, training.temperature, training.mining == "semi_hard")
    head.to(data.train.device)
    loss.to(data.train.device)
    available = arms_of(data.train)
    return Run(
        head=head,
        loss=loss,
        optimizer=make_optimizer(cfg, head, loss),
        bandit=DiscountedUcb(available, training.bandit_exploration, training.bandit_discount),
        steps_per_epoch=schedule.steps_per_epoch(training, data.train.num_images),
        sums=np.zeros(2 + 2 * len(available)),
    )


def arms_of(rows: TrainRows) -> np.ndarray:
    """Which arms (B + 1,) can be drawn from: bands that some anchor has, and random."""
    sizes = rows.band_offsets.int().diff(dim=1)
    return np.append((sizes > 0).any(dim=0).cpu().numpy(), True)


def make_feed(cfg: Config, data: TrainingData, run: Run) -> Feed:
    """A feed of the train rows with the backbone's bands, or with those mined in the space of the head with the
    weights `run.mined_with`; updates the arms that the bandit may choose."""
    rows = data.train
    if run.mined_with is not None:
        rows = remine.mine(cfg, rows, run.head, run.mined_with)
        run.bandit.available = arms_of(rows)
    return Feed(rows, cfg.training.batch_size, cfg.training.bandit_groups, cfg.training.seed)


def make_optimizer(cfg: Config, head: ProjectionHead, loss: Loss) -> torch.optim.AdamW:
    """AdamW with a learning rate per part of the head; weight decay for matrices only."""
    training = cfg.training
    matrices = [p for p in head.mlp.parameters() if p.ndim > 1]
    vectors = [p for p in head.mlp.parameters() if p.ndim <= 1]
    groups = [
        (matrices, 1.0, training.weight_decay),
        (vectors, 1.0, 0.0),
        ([head.linear.weight], training.whitening_lr_factor, training.weight_decay),
        ([head.gain, *loss.parameters()], training.gain_lr_factor, 0.0),
    ]
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": 0.0, "full_lr": factor * training.learning_rate, "weight_decay": decay}
            for parameters, factor, decay in groups
        ],
        fused=True,  # one pass over the weights
    )


def train_step(cfg: Config, data: TrainingData, run: Run, feed: Feed, run_dir: Path | None) -> None:
    """Forward, loss, backward, optimiser step, and the next batch (see `Feed`). The step's loss and rewards go
    into `run.sums` and to the bandit."""
    training = cfg.training
    if feed.is_empty:  # the first step of an epoch, or of this process
        draw(cfg, run, feed)
    (batch, embeddings), run.arms = feed.take(), None
    torch.manual_seed(step_seed(training.seed, run.step, purpose=2))  # of the dropout
    # not compiled: that takes a minute and does not speed up matrix products, most of a step on the CPU
    is_bfloat16 = resolve_dtype(training.dtype, data.train.device) == "bfloat16"
    with torch.autocast(data.train.device.type, torch.bfloat16, enabled=is_bfloat16):  # the loss stays in float32
        vectors = run.head.train()(embeddings)
    rows = batch.rows
    related = {"none": rows[:0], "anchors": batch.anchors, "all": rows}[run.loss.relations]
    loss, semi_hard = run.loss(vectors, *relations(data.train, related, rows))
    # not bincount: it waits for the device, before the backward pass is queued
    of_arm = batch.arms == torch.arange(len(run.bandit.available), device=rows.device)[:, None]  # (K, A)
    counts = torch.cat([of_arm.sum(dim=1), (of_arm & semi_hard).sum(dim=1)])
    read_stats = reading(torch.cat([loss.detach().double()[None], counts.double()]))

    factor = schedule.learning_rate_factor(training, run.step, training.epochs * run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = factor * group["full_lr"]
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.head.parameters(), training.grad_clip)
    run.optimizer.step()

    stats = read_stats()  # waits for the forward pass only
    if not np.isfinite(stats[0]):
        _refuse_not_finite(run.step, batch, run_dir)
    credit, reward = np.split(stats[1:], 2)
    if samplers.of_name(training.sampler).learns:
        group_size = training.batch_size / training.bandit_groups
        run.bandit.update(credit / group_size, reward / group_size)
    run.sums += np.concatenate([stats[:1], [1], credit, reward])
    run.step += 1
    if run.step % run.steps_per_epoch:  # the bands may change after an epoch
        draw(cfg, run, feed)


def draw(cfg: Config, run: Run, feed: Feed) -> None:
    """Choose arms, unless a resumed run has done so already, and draw the batch of the current step."""
    if run.arms is None:
        run.arms = samplers.arms_of_step(cfg.training.sampler, run.bandit, run.step, cfg.training.bandit_groups)
    feed.draw(run.step, run.arms)


def finish_epoch(cfg: Config, data: TrainingData, run: Run, seconds: float, steps: int) -> None:
    """Validate, add a row to the history, and keep the head if it is the best so far. `steps`, `seconds`: this
    process's share of the epoch."""
    metrics = data.validation.of_head(run.head)
    value, epoch = metrics["map@r"], run.epoch
    run.history.append(history.row(epoch, metrics, run.sums))
    rate = steps * cfg.training.batch_size / seconds if steps else float("nan")
    run.timings.append({"seconds": seconds, "triplets_per_second": rate})
    run.sums = np.zeros_like(run.sums)
    if not run.best or value > run.best["metrics"]["map@r"]:
        run.best = {"epoch": epoch, "metrics": metrics, "head": checkpoints.weights_of(run.head)}
    log.info("%s", history.as_line(run.history[-1], run.timings[-1], run.best["epoch"]))


def _refuse_not_finite(step: int, batch: Batch, run_dir: Path | None) -> None:
    where = ""
    if run_dir:
        path = run_dir / "bad_batch.pt"
        checkpoints.write(path, {"step": step, "rows": batch.rows.cpu(), "arms": batch.arms.cpu()})
        where = f"; the rows of its batch (anchors, positives, negatives of merged/train) are in {path}"
    raise PipelineError(f"the loss is not finite at step {step:,}{where}\nlower training.learning_rate")
