"""What a split came out as: counts, the proof that nothing leaks, a map; and the error if a split is empty."""

import json

import numpy as np

from common.errors import PipelineError
from common.imagery import pictures
from common.schemas import SPLITS
from common.sections import Data
from preprocess.split import cell_maps
from preprocess.split.split_rules import Decision, Images, count_in_two_splits


def summarise(images: Images, found: Decision, data: Data) -> dict:
    """The report, without its provenance. Every dropped image is counted once, under the first reason."""
    kept = found.split >= 0
    split = found.split[kept]
    building, cell = found.building[kept], found.cell[kept]
    panorama = images.dataset_id[kept], images.street_view_id[kept]
    counts = {
        name: {
            "images": int(np.sum(split == number)),
            "buildings": len(np.unique(building[split == number])),
            "cells": len(np.unique(cell[split == number])),
        }
        for number, name in enumerate(SPLITS)
    }
    total = max(len(split), 1)
    return {
        "rows_in": len(images),
        "dropped": found.dropped,
        "kept": counts,
        "ratio_wanted": {name: getattr(data, f"{name}_ratio") for name in SPLITS},
        "ratio_reached": {name: round(counts[name]["images"] / total, 6) for name in SPLITS},
        "in_two_splits": {
            "buildings": count_in_two_splits(split, building),
            "panoramas": count_in_two_splits(split, *panorama),
            "pictures": count_in_two_splits(split, images.content_hash[kept]),
        },
        "lookalikes_kept": found.lookalikes,
    }


def refuse_empty(report: dict, data: Data) -> None:
    """Raise PipelineError if a split that should have images has none."""
    for name, counts in report["kept"].items():
        if counts["images"] or not getattr(data, f"{name}_ratio"):
            continue
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items() if count)
        advice = "use more tars"
        if data.split_by == "geo":
            advice += (
                f", smaller cells (data.split_cell_m = {data.split_cell_m:g}) or a narrower data.split_buffer_m"
            )
        raise PipelineError(
            f"the {name} split is empty; dropped of {report['rows_in']:,} images: {dropped or 'none'}\n{advice}"
        )


def tell(report: dict) -> str:
    """The lines of the log."""
    lines = []
    for name, counts in report["kept"].items():
        amounts = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        reached, wanted = report["ratio_reached"][name], report["ratio_wanted"][name]
        lines.append(f"{name}: {amounts}; {reached:.1%} of the images (wanted {wanted:.1%})")
    shared = ", ".join(f"{count} {what}" for what, count in report["in_two_splits"].items())
    lines.append(f"in two splits: {shared}")
    lines.append(f"{report['lookalikes_kept']:,} images look like one of another building and are kept")
    return "\n".join(lines)


def to_json(report: dict, provenance: dict) -> str:
    return json.dumps({**report, "provenance": provenance}, indent=2) + "\n"


def draw_map(images: Images, found: Decision, cell_m: float) -> bytes:
    """A PNG of the cells of the largest datasets, coloured by split."""
    kept = found.split >= 0
    names = np.array(SPLITS)[found.split[kept]]
    return pictures.png(
        cell_maps.draw(cell_maps.count_cells(images.dataset_id[kept], found.cell[kept], names), cell_m)
    )
