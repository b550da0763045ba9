"""Which views of a photograph, combined how, find a building best? Measured on synthetic streets.

The labelled target projects to a picture's centre. A view is a share of the picture's sides about it, preprocessed
and embedded like a picture of its own. For each arm the views' vectors are combined, learned whitening is fitted
(its shrinkage chosen on validation), and heads are trained over several seeds, each evaluated at its best epoch on
validation. Figures are averaged over the seeds, then over the queries; 95 % intervals are those of evaluate.py,
paired for differences.

There is no arm for the mean of outputs that are not normalized: those of the local backbone all have one length.

Memory: the encoded images of a split, and 7 KB of vectors an image.

Reads    data/<backbone>/merged/{train,val,test}.parquet, data/<backbone>/difficulty/difficulty_metadata.parquet,
         the tars in paths.raw_dir, the backbone
Writes   data/<backbone>/views/<merge>.npz, the vectors of all views;
         checkpoints/<backbone>/views/<arm>-<seed>/, as train.py (what is there is not repeated);
         data/<backbone>/evaluation/<run>/views.json
Command  python tests/benchmarks/compare_views.py [--vectors] [--seeds 3] [--set training.epochs=8]  (make views)
Time     fastest on CPU: first --vectors, then parallel shards with OMP_NUM_THREADS=1, each training its share of
         the runs, then the command without shards for the figures
"""

import argparse
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timing  # noqa: F401 - puts the repository's root on sys.path
import torch

from common import cli, config, devices, files, parquet
from common.imagery import tar_images
from common.imagery.decoding import decode
from common.provenance import digest_of
from common.sections import Config
from generate import backbone
from train import datasets, run_record
from train.datasets import TrainingData
from train.evaluation import bootstrap, gallery, methods
from train.fitting import checkpoints
from train.fitting.fit import fit
from train.linear import baselines, whitening
from train.report.comparison import FIGURES, rank_all

log = logging.getLogger("pipeline")
SPLITS = ("train", "val", "test")
SHARES = (1.0, 0.7, 0.5, 0.35)
DISTANCE = "distance"  # a crop of the same metres of facade: 0.5 at the median distance of the training images
MISAIM = 25 / 640  # standard deviation of a misaimed centre along each axis, as a share of the side
VIEWS = [*map(str, SHARES), DISTANCE, "1.0 misaimed", "0.5 misaimed", "1.0 mirrored", "0.5 mirrored"]
CHUNK = 32  # images


class Arm(NamedTuple):
    """What is compared: VIEWS of which the mean of the unit vectors is taken."""

    name: str
    views: tuple[str, ...]
    weights: tuple[float, ...] | None = None  # of the mean
    is_concatenated: bool = False  # the unit vectors, instead of their mean
    training_views: tuple[str, ...] = ()  # of the training images, if other than those of validation and test


ARMS = [
    *(Arm(f"{share}", (f"{share}",)) for share in SHARES),
    *(
        Arm(" + ".join(views), views)
        for views in (("1.0", "0.5"), ("1.0", "0.35"), ("1.0", "0.5", "0.35"), ("1.0", "0.7", "0.5", "0.35"))
    ),
    Arm("1.0 + 2 × 0.5", ("1.0", "0.5"), weights=(1, 2)),
    Arm("2 × 1.0 + 0.5", ("1.0", "0.5"), weights=(2, 1)),
    Arm("1.0 + 0.5, concatenated", ("1.0", "0.5"), is_concatenated=True),
    Arm("1.0 + 0.5, and their mirror images", ("1.0", "0.5", "1.0 mirrored", "0.5 mirrored")),
    Arm("1.0 + 0.5; training: 1.0 + distance", ("1.0", "0.5"), training_views=("1.0", DISTANCE)),
    Arm("1.0 + distance", ("1.0", DISTANCE)),
    Arm("1.0, misaimed", ("1.0 misaimed",)),
    Arm("1.0 + 0.5, misaimed", ("1.0 misaimed", "0.5 misaimed")),
]
ONE_VIEW, TWO_VIEWS = "1.0", "1.0 + 0.5"  # which all others are paired with
Vectors = dict[str, dict[str, np.ndarray]]  # split -> view -> (rows of the split, D) float32, the pooled outputs


def vectors_of_views(cfg: Config) -> Vectors:
    """The vectors of all VIEWS, in the row order of the merge; made unless there are some of this very merge."""
    merged = [cfg.paths.merged_dir / f"{split}.parquet" for split in SPLITS]
    merge = digest_of(*(parquet.read_provenance(path).id.encode() for path in merged))
    path = cfg.paths.merged_dir.parent / "views" / f"{merge}.npz"
    if not path.exists():
        made = make_vectors(cfg, merged)
        with files.atomic(path) as file:
            np.savez(file, **{f"{split} {view}": made[split][view] for split in SPLITS for view in VIEWS})
    with np.load(path) as saved:
        return {split: {view: saved[f"{split} {view}"] for view in VIEWS} for split in SPLITS}


def make_vectors(cfg: Config, merged: list[Path]) -> Vectors:
    """All VIEWS of all images of the splits, embedded."""
    columns = ["tar_file", "image_offset", "image_size", "distance"]
    tables = dict(zip(SPLITS, (parquet.read(path, columns) for path in merged), strict=True))
    median_m = np.median(tables["train"]["distance"].to_numpy())
    model = backbone.load(cfg.embedding_model, "float32", torch.device("cpu"))
    images, rng, made = tar_images.of_paths(cfg.paths), np.random.default_rng(0), {}
    total = sum(table.num_rows for table in tables.values())
    # as generate/loop.py: torch has a single thread in each of these
    pool = ThreadPoolExecutor(cfg.infrastructure.threads, initializer=torch.set_num_threads, initargs=(1,))
    with pool, cli.Progress("views", "image", total, cfg.logging.progress_interval_s) as progress:
        for split, table in tables.items():
            encoded, starts = images.read(table), range(0, table.num_rows, CHUNK)
            crops = (0.5 * median_m / table["distance"].to_numpy()).clip(0.2, 1)
            aims = rng.normal(0, MISAIM, (table.num_rows, 2)).clip(-4 * MISAIM, 4 * MISAIM)
            parts = []
            for part in pool.map(
                lambda at, *columns: embed_views(model, *(column[at : at + CHUNK] for column in columns)),
                starts,
                *([column] * len(starts) for column in (encoded, crops, aims)),
            ):
                parts.append(part)
                progress.add(len(part))
            made[split] = dict(zip(VIEWS, np.concatenate(parts).swapaxes(0, 1), strict=True))
    return made


def embed_views(model: backbone.Backbone, encoded: list[bytes], crops: np.ndarray, aims: np.ndarray) -> np.ndarray:
    """The pooled outputs (n, VIEWS, D) float32 of n images. `crops` (n,): the share of DISTANCE; `aims` (n, 2): of
    the misaimed centres, along rows and columns, as shares of the sides."""
    cuts = [view for row in zip(encoded, crops, aims, strict=True) for view in cut_views(decode(row[0]), *row[1:])]
    pixels = model.preprocessing(cuts, torch.device("cpu")).unflatten(0, (len(encoded), -1))
    whole, half = VIEWS.index("1.0"), VIEWS.index("0.5")
    pixels = torch.cat([pixels, pixels[:, [whole, half]].flip(-1)], dim=1)
    return model(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).numpy()


def cut_views(picture: np.ndarray, crop: float, aim: np.ndarray) -> list[np.ndarray]:
    """The VIEWS of a picture (H, W, 3) apart from the mirrored ones."""
    height, width = picture.shape[:2]
    (down, right), margin = np.rint(aim * (height, width)).astype(int), max(height, width) // 4
    padded = np.pad(picture, [(margin, margin), (margin, margin), (0, 0)], "edge")  # beyond the frame: its edge
    misaimed = padded[margin + down :, margin + right :][:height, :width]
    return [*(cut(picture, share) for share in (*SHARES, crop)), misaimed, cut(misaimed, 0.5)]


def cut(picture: np.ndarray, share: float) -> np.ndarray:
    """The middle of a picture (H, W, 3), `share` of its sides."""
    height, width = picture.shape[:2]
    h, w = round(height * share), round(width * share)
    top, left = (height - h) // 2, (width - w) // 2
    return picture[top : top + h, left : left + w]


def combine(vectors: dict[str, np.ndarray], arm: Arm, views: tuple[str, ...]) -> np.ndarray:
    """An arm's embeddings of the images whose vectors are given, (N, D) float16 as generate_embeddings.py stores
    them; of a single view the pooled outputs as they are."""
    outputs = np.stack([vectors[view] for view in views])  # (views, N, D)
    if len(views) == 1:
        return outputs[0].astype(np.float16)
    units = outputs / np.linalg.norm(outputs, axis=2, keepdims=True)
    if arm.is_concatenated:
        return np.concatenate(units, axis=1).astype(np.float16)
    return np.average(units, axis=0, weights=arm.weights).astype(np.float16)


def data_of(cfg: Config, data: TrainingData, vectors: Vectors, arm: Arm) -> TrainingData:
    """The training data with an arm's embeddings instead of the backbone's."""
    train = combine(vectors["train"], arm, arm.training_views or arm.views)
    val = combine(vectors["val"], arm, arm.views)
    buildings, device = data.train.building_of_row.cpu().numpy(), data.train.device
    validation = replace(data.validation, embeddings=devices.place(val, device))
    moments = whitening.moments(train, buildings, device)
    return replace(
        data,
        train=replace(data.train, embeddings=devices.place(train, device)),
        validation=validation,
        baselines=baselines.fit(moments, cfg.training_model, validation),
        inputs={**data.inputs, "views": digest_of(train.tobytes(), val.tobytes())},
    )


def judge(cfg: Config, vectors: Vectors, best: dict[tuple[str, int], dict], device: torch.device) -> dict:
    """The figures of all arms on the test split. `best`: the checkpoint of each (arm's name, seed)."""
    rows, seeds = gallery.load(gallery.files_of(cfg), cfg.data.ignore_radius_m), sorted({seed for _, seed in best})
    compared: dict = {}
    for arm in ARMS:
        of_arm = replace(rows, embeddings=combine(vectors["test"], arm, arm.views))
        *_, whitening, _ = methods.of_checkpoint(best[arm.name, 0])  # the same for all seeds
        compared[arm.name, "whitening"] = whitening, of_arm
        compared |= {(arm.name, seed): (methods.of_checkpoint(best[arm.name, seed])[-1], of_arm) for seed in seeds}
    values, cell, weights = rank_all(cfg, compared, device)
    estimates = {
        arm.name: bootstrap.means(np.mean([values[arm.name, seed] for seed in seeds], axis=0), cell, weights)
        for arm in ARMS
    }  # (1 + draws, figures)
    intervals = partial(bootstrap.intervals, names=FIGURES, cell_of_query=cell)
    return {
        "counts": {"queries": len(cell), "cells": weights.shape[1], "seeds": len(seeds)},
        "arms": [
            {
                "name": arm.name,
                "figures": intervals(estimates[arm.name]),
                "whitening": intervals(bootstrap.means(values[arm.name, "whitening"], cell, weights)),
                "minus_one_view": intervals(estimates[arm.name] - estimates[ONE_VIEW]),
                "minus_two_views": intervals(estimates[arm.name] - estimates[TWO_VIEWS]),
                "map@r_by_seed": [float(values[arm.name, seed][:, 0].mean()) for seed in seeds],
                "best_epochs": [best[arm.name, seed]["epoch"] for seed in seeds],
            }
            for arm in ARMS
        ],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(parser)
    parser.add_argument("--shard", type=int, default=0, metavar="I", help="index of this shard (0)")
    parser.add_argument("--num-shards", type=int, default=1, metavar="N", help="number of shards (1)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm (3)")
    parser.add_argument("--vectors", action="store_true", help="make the vectors of the views, and no more")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    vectors = vectors_of_views(cfg)
    if args.vectors:
        return 0

    # train: all arms with one seed, then with the next
    data, best = datasets.load_data(cfg), {}
    runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS][args.shard :: args.num_shards]
    of_arm = {arm: data_of(cfg, data, vectors, arm) for arm in dict.fromkeys(arm for arm, _ in runs)}
    with cli.Progress("views", "run", len(runs), cfg.logging.progress_interval_s) as progress:
        for arm, seed in runs:
            run_dir = cfg.paths.checkpoints_dir / "views" / f"{re.sub(r'[^0-9a-z.]+', '_', arm.name)}-{seed}"
            settings, arm_data = config.with_training(cfg, seed=seed), of_arm[arm]
            saved = checkpoints.existing(run_dir, run_record.record(settings, arm_data.inputs), "")
            checkpoint = fit(settings, arm_data, run_dir=run_dir, saved=saved).best
            best[arm.name, seed] = checkpoint
            map_at_r = checkpoint["metrics"]["map@r"]
            log.info("%s: validation mAP@R %.4f, epoch %d", run_dir.name, map_at_r, checkpoint["epoch"])
            progress.add(1)
    if args.num_shards > 1:
        return progress.summary("once all shards are done, run without --shard for the figures")

    # evaluate, save
    results = judge(cfg, vectors, best, data.train.device)
    target = cfg.paths.evaluation_dir / "views.json"
    files.write_text(target, json.dumps(results, indent=1) + "\n")
    return progress.summary(str(target))


if __name__ == "__main__":
    cli.run(main, resumable=True)
