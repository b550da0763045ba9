"""The outcome of a split: counts, the proof that nothing leaks, a map, and an error if a split is empty."""

import numpy as np

from common.errors import PipelineError
from common.imagery import pictures
from common.places import geo
from common.schemas import SPLITS
from common.sections import Data
from preprocess.split import cell_maps
from preprocess.split.split_rules import (
    NONE,
    TEST,
    TRAIN,
    VAL,
    Decision,
    HeldOut,
    Images,
    count_in_two_splits,
    shared_with_later_split,
)


def summarise(images: Images, decision: Decision, data: Data, held_out: HeldOut | None = None) -> dict:
    """The report, without its provenance. Every dropped image is counted once, under the first reason."""
    kept = decision.split >= 0
    split, building, cell = decision.split[kept], decision.building[kept], decision.cell[kept]
    counts = {
        name: {
            "images": int(np.sum(split == number)),
            "buildings": len(np.unique(building[split == number])),
            "cells": len(np.unique(cell[split == number])),
        }
        for number, name in enumerate(SPLITS)
    }
    return {
        "rows_in": len(images),
        "dropped": decision.dropped,
        "kept": counts,
        "ratio_wanted": {name: getattr(data, f"{name}_ratio") for name in SPLITS},
        "ratio_reached": {name: round(counts[name]["images"] / max(len(split), 1), 6) for name in SPLITS},
        "in_two_splits": {
            "buildings": count_in_two_splits(split, building),
            "panoramas": count_in_two_splits(split, images.dataset_id[kept], images.street_view_id[kept]),
            "pictures": count_in_two_splits(split, images.content_hash[kept]),
        },
        "lookalikes_kept": decision.lookalikes,
        "buildings_without_position": len(np.unique(building[cell >= geo.OWN_CELLS])),
        "split_by": data.split_by if geo.is_known(images.target_lat, images.target_lon).any() else "building",
        **({"held_out": _held_out(images, decision, held_out)} if held_out else {}),
    }


def _held_out(images: Images, decision: Decision, held_out: HeldOut) -> dict:
    """How many images are held out, and the proof that train and val have none of what they show."""
    rows, in_training = held_out.rows, np.isin(decision.split, (TRAIN, VAL))
    in_test = decision.split == TEST
    keys = {
        "buildings": (decision.building,),
        "panoramas": (images.dataset_id, images.street_view_id),
        "pictures": (images.content_hash,),
    }
    shared = np.where(rows, TEST, np.where(in_training, TRAIN, NONE))
    return {
        "listed": held_out.listed,
        "found": int(rows.sum()),
        "buildings": len(np.unique(decision.building[rows])),
        "cells": len(np.unique(decision.cell[rows])),
        "kept_in_test": int((rows & in_test).sum()),
        "in_train_or_val": {
            what: int((shared_with_later_split(shared, *of_what) & in_training).sum())
            for what, of_what in keys.items()
        },
    }


def refuse_empty(report: dict, data: Data) -> None:
    """Raise PipelineError if a split that should have images has none."""
    for name, counts in report["kept"].items():
        if counts["images"] or not getattr(data, f"{name}_ratio"):
            continue
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items() if count)
        advice = "use more buildings"
        if report["split_by"] == "geo":
            cell = f"data.split_cell_m = {data.split_cell_m:g}"
            advice += f", smaller cells ({cell}) or a narrower data.split_buffer_m"
        if "held_out" in report:
            advice += f"; data.held_out takes {report['held_out']['cells']:,} cells for test"
        if report["dropped"]["duplicate_across_buildings"] > report["rows_in"] / 2:
            advice = "the same photographs are at several buildings, as when a building is in two imported sets"
        raise PipelineError(
            f"the {name} split is empty; of {report['rows_in']:,} images dropped: {dropped or 'none'}\n{advice}"
        )


def as_text(report: dict) -> str:
    """The report in a few lines."""
    lines = []
    for name, counts in report["kept"].items():
        amounts = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        reached, target = report["ratio_reached"][name], report["ratio_wanted"][name]
        lines.append(f"{name}: {amounts}; {reached:.1%} of the images (target {target:.1%})")
    shared = ", ".join(f"{count} {what}" for what, count in report["in_two_splits"].items())
    lines.append(f"in two splits: {shared}")
    lines.append(f"{report['lookalikes_kept']:,} images look like one of another building and are kept")
    if report["buildings_without_position"]:
        lines.append(
            f"{report['buildings_without_position']:,} buildings have no position: each is a cell of its own, for "
            f'the split and the bootstrap (as data.split_by = "building"), and has no ignore zone'
        )
    if held_out := report.get("held_out"):
        lines.append(
            f"held out: {held_out['found']:,} of {held_out['listed']:,} images, of {held_out['buildings']:,} "
            f"buildings in {held_out['cells']:,} cells; {held_out['kept_in_test']:,} of them are in test"
        )
    return "\n".join(lines)


def draw_map(images: Images, decision: Decision, cell_m: float) -> bytes:
    """A PNG of the cells of the largest datasets, coloured by split."""
    kept = decision.split >= 0
    names = np.array(SPLITS)[decision.split[kept]]
    cells = cell_maps.count_cells(images.dataset_id[kept], decision.cell[kept], names)
    return pictures.png(cell_maps.draw(cells, cell_m))
