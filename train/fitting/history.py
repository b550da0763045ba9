"""The epochs of a run: as a table, as a log line, as curves."""

from pathlib import Path

import numpy as np
import pandas as pd

from common import files, parquet, schemas
from common.imagery import pictures
from common.provenance import Provenance

TIMINGS = ["seconds", "triplets_per_second"]


def row(epoch: int, metrics: dict[str, float], sums: np.ndarray) -> dict[str, float]:
    """The row of an epoch, without its timings. `sums`: see `fit.Run`; without steps the means are NaN."""
    loss, steps, *by_arm = sums
    triplets, semi_hard = np.split(np.array(by_arm), 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_loss, shares, rewards = np.float64(loss) / steps, triplets / triplets.sum(), semi_hard / triplets
    columns = {"epoch": epoch, "loss": float(mean_loss)}
    columns |= {"val_map_at_r": metrics["map@r"], "val_recall_at_1": metrics["recall@1"]}
    arms = [*(f"band_{b}" for b in range(len(shares) - 1)), "random"]
    for kind, figures in (("share", shares), ("reward", rewards)):
        columns |= {f"{kind}_{arm}": float(x) for arm, x in zip(arms, figures, strict=True)}
    return columns


def frame(rows: list[dict], timings: list[dict]) -> pd.DataFrame:
    """A row per epoch, with the columns of `schemas.history`."""
    return pd.DataFrame([{**row, **times} for row, times in zip(rows, timings, strict=True)])


def write(path: Path, table: pd.DataFrame, record: Provenance, facts: dict | None = None) -> None:
    """Without the timings, which differ between identical runs, the id of the file is that of the run."""
    bands = sum(name.startswith("share_band_") for name in table.columns)
    with parquet.writer(path, schemas.history(bands), record) as out:
        out.append({name: table[name].to_numpy() for name in table.columns})
        out.facts = facts or {}
        out.content = table.drop(columns=TIMINGS).to_numpy(float).tobytes()


def as_line(row: dict, times: dict, best_epoch: int) -> str:
    shares = ", ".join(
        f"{name[6:]} {row[name]:.0%}" for name in row if name.startswith("share_") and row[name] > 0
    )
    trained = f"loss {row['loss']:.4f}, " if row["epoch"] else "before training, "
    rate = f", {times['triplets_per_second']:,.0f} triplets/s; negatives: {shares}" if row["epoch"] else ""
    return (
        f"epoch {row['epoch']}: {trained}validation mAP@R {row['val_map_at_r']:.4f}, "
        f"Recall@1 {row['val_recall_at_1']:.4f} (best so far: epoch {best_epoch}){rate}"
    )


def draw(path: Path, table: pd.DataFrame) -> None:
    """The curves of a run as a PNG: validation, loss, and the share and reward of each arm."""
    from matplotlib.figure import Figure

    from common import pages

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    kinds = (("val_map_at_r", "mAP@R", pages.BLUE), ("val_recall_at_1", "Recall@1", pages.ORANGE))
    for name, label, colour in kinds:
        axes[0].plot(table["epoch"], table[name], label=label, color=colour)
    best = table.loc[table["val_map_at_r"].idxmax()]
    axes[0].plot(best["epoch"], best["val_map_at_r"], "o", color="black", label=f"best: epoch {best['epoch']:.0f}")
    axes[1].plot(table["epoch"], table["loss"], color=pages.BLUE)
    for axis, kind in ((axes[2], "share"), (axes[3], "reward")):
        names = table.columns[table.columns.str.startswith(f"{kind}_")]
        for name, colour in zip(names, pages.arm_colours(len(names) - 1), strict=True):
            label = name.removeprefix(f"{kind}_").replace("_", " ")
            axis.plot(table["epoch"], table[name], label=label, color=colour)
    titles = ("validation", "training loss", "share of the negatives", "share of them semi-hard (the reward)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    files.write_bytes(path, pictures.png(figure))
