"""Every sampler with every loss, over several training seeds: which beats learned whitening, and by how much?

All runs have the same data, steps and validation; each is judged at its best epoch on validation, which may be
epoch 0, the whitening. A query's figures are averaged over the seeds, then over the queries; the 95 % intervals
come from the evaluation's bootstrap over cells of the map, paired for the differences. They tell how far the
figures would move on other streets, not with other seeds: `by_seed` in the JSON has those.

Reads    data/merged/{train,val,test}.parquet, data/difficulty/difficulty_metadata.parquet
Writes   checkpoints/compare/<sampler>-<loss>-<seed>/, as train.py; a run that is there already is not repeated;
         data/evaluation/comparison.{json,md,png}
Command  python train/compare.py [--seeds 3] [--set training.epochs=8]
Time     36 runs of 300 steps of 512 triplets, 192 to 128 dimensions: 15 minutes on two CPU cores, as two shards
         at once with OMP_NUM_THREADS=1 (small products gain little from a second thread); a shard trains its part
         of the runs, and the command without shards then makes the table
"""

import json
import logging
import sys
from pathlib import Path
from typing import NamedTuple, get_args

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError

log = logging.getLogger("pipeline")
FIGURES = ("map@r", "recall@1")
CONTROL = "hard_random"  # half the hardest band, half random: the plain way that a sampler has to beat


class Combination(NamedTuple):
    """What is compared."""

    sampler: str
    loss: str


def main(argv=None) -> int:
    parser = cli.parser(__doc__, shards=True)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each combination (3)")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    if args.seeds < 1:
        raise ConfigError("--seeds takes a number of runs, 1 or more")
    import torch

    from common import config, files, parquet, provenance
    from train import checkpoints, datasets, gallery
    from train.fit import fit
    from train.study import with_training

    # settings, and what is there already
    inputs = datasets.input_ids(cfg) | {"test.parquet": provenance.identity(cfg.paths.merged_dir / "test.parquet")}
    shared = checkpoints.record(cfg, inputs).config
    varied = ("training.sampler", "training.loss", "training.seed")
    shared = {key: value for key, value in shared.items() if key not in varied}
    shared |= config.values(cfg, "training.gallery", "training.bootstrap_samples")
    made = provenance.record("compare", {**shared, "seeds": args.seeds}, inputs)
    target = cfg.paths.evaluation_dir / "comparison.json"
    if target.exists() and not args.overwrite:
        there = json.loads(target.read_text())
        parquet.refuse_stale(target, provenance.Provenance(**there["provenance"]), made, "all of its runs")
        print(as_markdown(there))
        return cli.nothing_to_do("compare", str(target))
    gallery.refuse_leaks(cfg.paths.merged_dir)

    # train: data are loaded once for all runs
    data, best = datasets.load_data(cfg), {}
    fields = type(cfg.training).model_fields
    combinations = [
        Combination(sampler, loss)
        for loss in get_args(fields["loss"].annotation)
        for sampler in get_args(fields["sampler"].annotation)
    ]
    runs = [(combination, seed) for combination in combinations for seed in range(args.seeds)]
    runs = runs[args.shard :: args.num_shards]
    with cli.Progress("compare", "run", len(runs), cfg.logging.progress_interval_s) as progress:
        for combination, seed in runs:
            settings = with_training(cfg, **combination._asdict(), seed=seed)
            run_dir = cfg.paths.checkpoints_dir / "compare" / f"{combination.sampler}-{combination.loss}-{seed}"
            result = fit(settings, data, run_dir=run_dir, resume=not args.overwrite)
            best[combination, seed] = result.best
            log.info("%s, %s, seed %d: validation mAP@R %.4f, epoch %d",
                     *combination, seed, result.best_value, result.best_epoch)  # fmt: skip
            progress.add(1)
    if args.num_shards > 1:
        return progress.summary("without --shard it makes the table, once all of them are done")

    # judge, write
    device = torch.device("cpu") if data.device.type == "cpu" else data.device
    found = judge(cfg, best, device)
    found["provenance"] = made.finished(provenance.digest_of(json.dumps(found)), {"in": len(runs)}).to_dict()
    files.write_text(target.with_suffix(".md"), as_markdown(found) + "\n")
    draw(found, target.with_suffix(".png"))
    files.write_text(target, json.dumps(found, indent=1) + "\n")
    print(as_markdown(found))
    return progress.summary(str(target))


def judge(cfg, best: dict, device) -> dict:
    """The figures of all combinations on the test split. `best`: the checkpoint of each (combination, seed)."""
    import numpy as np

    from train import bootstrap, gallery, methods

    names = gallery.SPLITS if cfg.training.gallery == "all" else gallery.SPLITS[:1]
    rows = gallery.load([cfg.paths.merged_dir / f"{name}.parquet" for name in names], cfg.data.ignore_radius_m)
    whitening, _ = methods.of_checkpoint(next(iter(best.values())))[-2:]
    base, asked = values_of(cfg, whitening, rows, device)
    values = {
        run: values_of(cfg, methods.of_checkpoint(checkpoint)[-1], rows, device)[0]
        for run, checkpoint in best.items()
    }  # each (queries with a match, figures)
    cells, cell_of_query = np.unique(rows.column("cell_id")[: rows.num_queries][asked], return_inverse=True)
    weights = bootstrap.draw_weights(len(cells), cfg.training.bootstrap_samples, cfg.global_.seed)

    def estimate(of_queries: np.ndarray) -> np.ndarray:  # (1 + draws, figures)
        return bootstrap.means(of_queries, cell_of_query, weights)

    effective_cells = bootstrap.effective_cells(cell_of_query)

    def intervals(estimates: np.ndarray) -> dict:
        return {name: bootstrap.interval(estimates[:, i], effective_cells) for i, name in enumerate(FIGURES)}

    combinations = list(dict.fromkeys(combination for combination, _ in best))
    seeds = sorted({seed for _, seed in best})
    estimates = {c: estimate(np.mean([values[c, seed] for seed in seeds], axis=0)) for c in combinations}
    return {
        "counts": {"queries": int(asked.sum()), "cells": len(cells), "seeds": len(seeds)},
        "whitening": intervals(estimate(base)),
        "combinations": [
            {
                **c._asdict(),
                "figures": intervals(estimates[c]),
                "minus_whitening": intervals(estimates[c] - estimate(base)),
                "minus_control": intervals(estimates[c] - estimates[Combination(CONTROL, c.loss)]),
                "by_seed": {n: [float(values[c, s][:, i].mean()) for s in seeds] for i, n in enumerate(FIGURES)},
                "best_epochs": [best[c, seed]["epoch"] for seed in seeds],
            }
            for c in combinations
        ],
    }  # fmt: skip


def values_of(cfg, method, rows, device) -> tuple:
    """(The figures of each query with a match, (n, len(FIGURES)) float64; which queries have one, (Q,) bool)."""
    import numpy as np

    from train import metrics, protocol

    with cli.Progress("compare", "ranking") as quiet:
        matches = protocol.rank(method.vectors(rows, device), rows, cfg.infrastructure.search_memory_mb, quiet)
    per_query = metrics.per_query(matches)
    answered = per_query.select(per_query.has_match)
    return np.stack([answered.average_precision_at_r, answered.best_rank <= 1], axis=1), per_query.has_match


def as_markdown(found: dict) -> str:
    """The table, a row per combination; differences whose interval excludes 0 are bold."""
    counts = found["counts"]
    lines = [
        f"{counts['queries']:,} queries in {counts['cells']} cells, {counts['seeds']} seeds; %, 95 % intervals.",
        "",
        "| loss | sampler | mAP@R | Recall@1 | mAP@R - whitening | mAP@R - hard_random | best epochs |",
        "|---|---|---|---|---|---|---|",
        f"| | learned whitening | {_cell(found['whitening']['map@r'])} | {_cell(found['whitening']['recall@1'])} "
        "| | | |",
    ]
    for row in found["combinations"]:
        figures, control = row["figures"], row["minus_control"]["map@r"]
        lines.append(
            f"| {row['loss']} | {row['sampler']} | {_cell(figures['map@r'])} | {_cell(figures['recall@1'])} "
            f"| {_difference(row['minus_whitening']['map@r'])} "
            f"| {'' if row['sampler'] == CONTROL else _difference(control)} "
            f"| {', '.join(map(str, row['best_epochs']))} |"
        )
    return "\n".join(lines)


def _cell(figure: dict) -> str:
    if figure["low"] is None:
        return f"{100 * figure['value']:.1f}"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _difference(figure: dict) -> str:
    if figure["low"] is None:
        return f"{100 * figure['value']:+.1f}"
    text = f"{100 * figure['value']:+.1f} [{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"
    return f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text


def draw(found: dict, path: Path) -> None:
    """What each combination adds to learned whitening, with its interval, and the single seeds."""
    import io

    from matplotlib.figure import Figure

    from common import files

    rows = found["combinations"][::-1]
    base = found["whitening"]["map@r"]["value"]
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        gain = row["minus_whitening"]["map@r"]
        if gain["low"] is not None:
            axes.plot([100 * gain["low"], 100 * gain["high"]], [place, place], color="tab:blue", linewidth=2)
        axes.plot(100 * gain["value"], place, "o", color="tab:blue")
        seeds = [100 * (value - base) for value in row["by_seed"]["map@r"]]
        axes.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['loss']}, {row['sampler']}" for row in rows])
    axes.set_xlabel("mAP@R - learned whitening's, points\ndot: mean, line: 95 %, strokes: single seeds")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    files.write_bytes(path, image.getvalue())


if __name__ == "__main__":
    cli.run(main, resumable=True)
