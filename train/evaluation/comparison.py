"""What a comparison of samplers and losses came to: its figures on the test split, as a table and as a picture."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from common import cli
from common.errors import PipelineError
from common.imagery import pictures
from common.sections import Config
from train.evaluation import bootstrap, gallery, methods, metrics, protocol
from train.evaluation.metrics_json import percent
from train.loss import LOSSES
from train.sampling.samplers import SAMPLERS

FIGURES = ("map@r", "recall@1")
CONTROL = "hard_random"  # half the hardest band, half random: the plain way that a sampler has to beat


class Combination(NamedTuple):
    """What is compared."""

    sampler: str
    loss: str
    mining: str = "none"

    def __str__(self) -> str:
        return f"{self.sampler} + {self.mining}" if self.mining != "none" else self.sampler


def combinations() -> list[Combination]:
    """Every sampler with every loss, and semi-hard mining among random rows where the loss allows it."""
    return [
        combination
        for loss, objective in LOSSES.items()
        for combination in (
            *(Combination(sampler, loss) for sampler in SAMPLERS),
            *([Combination("random", loss, "semi_hard")] if objective.uses_triplets else []),
        )
    ]


def read(path: Path) -> dict:
    """comparison.json. Raises PipelineError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}): delete it and compare again") from None


def judge(cfg: Config, best: dict[tuple[Combination, int], dict], device: torch.device) -> dict:
    """The figures of all combinations on the test split. `best`: the checkpoint of each (combination, seed)."""
    rows = gallery.load(gallery.files_of(cfg), cfg.data.ignore_radius_m)
    whitening, _ = methods.of_checkpoint(next(iter(best.values())))[-2:]
    total = rows.num_queries * (1 + len(best))
    with cli.Progress("compare", "ranking", total, cfg.logging.progress_interval_s) as progress:
        base, asked = values_of(cfg, whitening, rows, device, progress)
        values = {
            run: values_of(cfg, methods.of_checkpoint(checkpoint)[-1], rows, device, progress)[0]
            for run, checkpoint in best.items()
        }  # each (queries with a match, figures)
    cells, cell_of_query = np.unique(rows.column("cell_id")[: rows.num_queries][asked], return_inverse=True)
    weights = bootstrap.draw_weights(len(cells), cfg.evaluation.bootstrap_samples, cfg.global_.seed)

    def estimate(of_queries: np.ndarray) -> np.ndarray:  # (1 + draws, figures)
        return bootstrap.means(of_queries, cell_of_query, weights)

    effective_cells = bootstrap.effective_cells(cell_of_query)

    def intervals(estimates: np.ndarray) -> dict:
        return {name: bootstrap.interval(estimates[:, i], effective_cells) for i, name in enumerate(FIGURES)}

    compared = list(dict.fromkeys(combination for combination, _ in best))
    seeds = sorted({seed for _, seed in best})
    estimates = {c: estimate(np.mean([values[c, seed] for seed in seeds], axis=0)) for c in compared}
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
            for c in compared
        ],
    }  # fmt: skip


def values_of(
    cfg: Config, method: methods.Method, rows: gallery.Gallery, device: torch.device, progress: cli.Progress
) -> tuple[np.ndarray, np.ndarray]:
    """(The figures of each query with a match, (n, len(FIGURES)) float64; which queries have one, (Q,) bool)."""
    vectors = method.vectors(rows, device)
    per_query = metrics.per_query(protocol.rank(vectors, rows, cfg.infrastructure.search_memory_mb, progress))
    answered = per_query.select(per_query.has_match)
    return np.stack([answered.average_precision_at_r, answered.best_rank <= 1], axis=1), per_query.has_match


def as_markdown(found: dict) -> str:
    """The table, a row per combination; differences whose interval excludes 0 are bold."""
    counts, base = found["counts"], found["whitening"]
    lines = [
        f"{counts['queries']:,} queries in {counts['cells']} cells, {counts['seeds']} seeds; %, 95 % intervals.",
        "",
        "| loss | sampler | mAP@R | Recall@1 | mAP@R - whitening | mAP@R - hard_random | best epochs |",
        "|---|---|---|---|---|---|---|",
        f"| | learned whitening | {percent(base['map@r'])} | {percent(base['recall@1'])} | | | |",
    ]
    for row in found["combinations"]:
        figures, control = row["figures"], row["minus_control"]["map@r"]
        lines.append(
            f"| {row['loss']} | {_name_of(row)} | {percent(figures['map@r'])} | {percent(figures['recall@1'])} "
            f"| {_difference(row['minus_whitening']['map@r'])} "
            f"| {'' if row['sampler'] == CONTROL else _difference(control)} "
            f"| {', '.join(map(str, row['best_epochs']))} |"
        )
    return "\n".join(lines)


def _name_of(row: dict) -> str:
    return str(Combination(row["sampler"], row["loss"], row.get("mining", "none")))


def _difference(figure: dict) -> str:
    """With -0.0, unlike `percent`: it tells on which side of 0 an interval ends."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None:
        return f"{100 * value:+.1f}"
    text = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def draw(found: dict) -> bytes:
    """What each combination adds to learned whitening, with its interval, and the single seeds: a PNG."""
    rows = found["combinations"][::-1]
    base = found["whitening"]["map@r"]["value"]
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        gain = row["minus_whitening"]["map@r"]
        if gain["low"] is not None:
            axes.plot([100 * gain["low"], 100 * gain["high"]], [place, place], color="tab:blue", linewidth=2)
        axes.plot(100 * gain["value"], place, "o", color="tab:blue")
        seeds = [100 * (value - base) for value in row["by_seed"]["map@r"]]
        axes.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['loss']}, {_name_of(row)}" for row in rows])
    axes.set_xlabel("mAP@R - learned whitening's, points\ndot: mean, line: 95 %, strokes: single seeds")
    return pictures.png(figure)
