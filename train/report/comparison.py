"""A comparison of samplers and losses: their figures on the test split, as a table and as a picture."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from common import cli, devices, pages
from common.errors import PipelineError
from common.imagery import pictures
from common.sections import Config
from train.evaluation import bootstrap, gallery, methods, metrics, protocol
from train.evaluation.metric_names import TITLES
from train.evaluation.metrics_json import percent
from train.loss import LOSSES
from train.sampling.samplers import SAMPLERS

FIGURES = ("map@r", "recall@1")
CONTROL = "hard_random"  # half the hardest band, half random: the simple sampler that the others have to beat


class Combination(NamedTuple):
    """What is compared."""

    sampler: str
    loss: str
    mining: str = "none"


def combinations() -> list[Combination]:
    """Every sampler with every loss, and semi-hard mining among random rows where the loss allows it."""
    found = []
    for loss, objective in LOSSES.items():
        found += [Combination(sampler, loss) for sampler in SAMPLERS]
        if objective.uses_triplets:
            found.append(Combination("random", loss, "semi_hard"))
    return found


def read(path: Path) -> dict:
    """comparison.json. Raises PipelineError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}): delete it and rerun train/compare.py") from None


def judge(cfg: Config, best: dict[tuple[Combination, int], dict], device: torch.device) -> dict:
    """The figures of all combinations on the test split. `best`: the checkpoint of each (combination, seed)."""
    rows = gallery.load(gallery.files_of(cfg), cfg.data.ignore_radius_m)
    compared: dict = {run: (methods.of_checkpoint(checkpoint)[-1], rows) for run, checkpoint in best.items()}
    compared["whitening"] = methods.of_checkpoint(next(iter(best.values())))[-2], rows  # the same for all runs
    values, cell, weights = rank_all(cfg, compared, device)
    base = bootstrap.means(values["whitening"], cell, weights)
    seeds = sorted({seed for _, seed in best})
    estimates = {
        combination: bootstrap.means(np.mean([values[combination, seed] for seed in seeds], axis=0), cell, weights)
        for combination in dict.fromkeys(combination for combination, _ in best)
    }  # (1 + draws, figures)
    return {
        "counts": {"queries": len(cell), "cells": weights.shape[1], "seeds": len(seeds)},
        "whitening": bootstrap.intervals(base, FIGURES, cell),
        "combinations": [
            {
                **c._asdict(),
                "figures": bootstrap.intervals(of_c, FIGURES, cell),
                "minus_whitening": bootstrap.intervals(of_c - base, FIGURES, cell),
                "minus_control": bootstrap.intervals(
                    of_c - estimates[Combination(CONTROL, c.loss)], FIGURES, cell
                ),
                "by_seed": {n: [float(values[c, s][:, i].mean()) for s in seeds] for i, n in enumerate(FIGURES)},
                "best_epochs": [best[c, seed]["epoch"] for seed in seeds],
            }
            for c, of_c in estimates.items()
        ],
    }


def rank_all(
    cfg: Config, compared: dict[Hashable, tuple[methods.Method, gallery.Gallery]], device: torch.device
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Rank galleries of the same rows, each by its method.

    Returns the FIGURES of each of n queries with a match, (n, figures) by key; the cell of each query, (n,); and
    how often each cell counts in the bootstrap's draws.
    """
    memory_mb = devices.search_memory_mb(cfg.infrastructure, device)
    total, values = sum(rows.num_queries for _, rows in compared.values()), {}
    with cli.Progress("compare", "ranking", total, cfg.logging.progress_interval_s) as progress:
        for key, (method, rows) in compared.items():
            vectors = method.vectors(rows, device)
            queries = metrics.per_query(protocol.rank(method, vectors, rows, memory_mb, device, progress))
            del vectors  # never those of two methods at a time
            values[key] = protocol.query_values(queries, FIGURES)
    cell_ids = rows.column("cell_id")[: rows.num_queries][queries.has_match]  # the same for all
    cells, cell = np.unique(cell_ids, return_inverse=True)
    weights = bootstrap.draw_weights(len(cells), cfg.evaluation.bootstrap_samples, cfg.global_.seed)
    return values, cell, weights


def as_markdown(comparison: dict) -> str:
    """The table, a row per combination; differences whose interval excludes 0 are bold."""
    counts, base = comparison["counts"], comparison["whitening"]
    main, recall = (TITLES[name] for name in FIGURES)
    lines = [
        f"{counts['queries']:,} queries in {counts['cells']} cells, {counts['seeds']} seeds; %, 95 % intervals.",
        "",
        f"| loss | sampler | {main} | {recall} | {main} - whitening | {main} - {CONTROL} | best epochs |",
        "|---|---|---|---|---|---|---|",
        f"| | learned whitening | {percent(base['map@r'])} | {percent(base['recall@1'])} | | | |",
    ]
    for row in comparison["combinations"]:
        figures, control = row["figures"], row["minus_control"]["map@r"]
        lines.append(
            f"| {row['loss']} | {_name_of(row)} | {percent(figures['map@r'])} | {percent(figures['recall@1'])} "
            f"| {difference(row['minus_whitening']['map@r'])} "
            f"| {'' if row['sampler'] == CONTROL else difference(control)} "
            f"| {', '.join(map(str, row['best_epochs']))} |"
        )
    return "\n".join(lines)


def _name_of(row: dict) -> str:
    mining = row.get("mining", "none")  # older files have none
    return row["sampler"] if mining == "none" else f"{row['sampler']} + {mining}"


def difference(figure: dict) -> str:
    """With -0.0, unlike `percent`: it shows on which side of 0 an interval ends."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None:
        return f"{100 * value:+.1f}"
    text = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def draw(comparison: dict) -> bytes:
    """The gain of each combination over learned whitening, with its interval and the single seeds, as a PNG."""
    rows = comparison["combinations"][::-1]
    base = comparison["whitening"]["map@r"]["value"]
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        gain = row["minus_whitening"]["map@r"]
        if gain["low"] is not None:
            axes.plot([100 * gain["low"], 100 * gain["high"]], [place, place], color=pages.BLUE, linewidth=2)
        axes.plot(100 * gain["value"], place, "o", color=pages.BLUE)
        seeds = [100 * (value - base) for value in row["by_seed"]["map@r"]]
        axes.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
    axes.axvline(0, color=pages.GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['loss']}, {_name_of(row)}" for row in rows])
    axes.set_xlabel(
        "mAP@R minus learned whitening's, points\ndot: mean, line: 95 % interval, strokes: single seeds"
    )
    return pictures.png(figure)
