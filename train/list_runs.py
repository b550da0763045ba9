"""All runs of all backbones side by side, by date: the settings in which they differ, and their figures.

Reads    checkpoints/<backbone>/<run>/history.parquet; data/<backbone>/evaluation/<run>/metrics.json and
         data/<backbone>/published/<run>/provenance.json if there are any
Command  python train/list_runs.py
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli

OUTDATED = "outdated"  # in the place of what was made from another checkpoint of the run
EARLIER = "earlier merge"  # of a run that was trained on one: its figures are not comparable


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    cfg = cli.load_config(arguments.parse_args(argv))

    from common import parquet
    from common.errors import PipelineError
    from common.layout import former_layout
    from train import run_record

    former_layout.refuse(cfg)
    records, damaged = {}, []
    for backbone, folder in run_folders(cfg):
        try:
            records[backbone, folder] = parquet.read_provenance(folder / run_record.HISTORY)
        except PipelineError:
            damaged.append({"run": folder.name, "backbone": backbone, "date": "", "epoch": "damaged"})
    rows, settings = [], []
    for (backbone, folder), record in sorted(records.items(), key=lambda item: item[1].created):
        rows.append(row_of(cfg, backbone, folder, record))
        settings.append({key.removeprefix("training."): value for key, value in record.config.items()})
    if not rows + damaged:
        print(f"no runs in {cfg.paths.checkpoints_dir}: train one with train/train.py")
        return 0
    keys = list(dict.fromkeys(key for of_run in settings for key in of_run))
    different = [key for key in keys if len({json.dumps(of_run.get(key)) for of_run in settings}) > 1]
    for row, of_run in zip(rows, settings, strict=True):
        row |= {key: as_text(of_run.get(key, "")) for key in different}
    print(table(rows + damaged))
    return 0


def run_folders(cfg) -> list[tuple[str, Path]]:
    """The label of its backbone and the folder of every run that has finished an epoch."""
    from common import config
    from train import run_record

    labels = [config.label_of(cfg.embedding_model)]
    if cfg.templates.checkpoints_dir.name == "{backbone}":
        labels = [folder.name for folder in cfg.paths.checkpoints_dir.parent.glob("*")]
    return [
        (label, path.parent)
        for label in labels
        for path in config.paths_of(cfg, "", label).checkpoints_dir.glob(f"*/{run_record.HISTORY}")
    ]


def row_of(cfg, backbone: str, folder: Path, record) -> dict[str, str]:
    """The columns of a run in `folder`. `record`: of its history."""
    from common import config, parquet, stages
    from common.errors import PipelineError
    from train import run_record
    from train.evaluation import metrics_json

    history = parquet.read(folder / run_record.HISTORY, ["epoch", "val_map_at_r"]).to_pandas()
    best, checkpoint = history["val_map_at_r"].idxmax(), record.facts.get("best_checkpoint")
    paths = config.paths_of(cfg, folder.name, backbone)
    notes = [] if record.facts.get("finished") else ["unfinished"]
    try:
        if stages.identity(paths.merged_dir / "train.parquet") != record.inputs.get("train.parquet"):
            notes.append(EARLIER)
    except (OSError, PipelineError):
        pass  # it is not there any more
    row = {
        "run": folder.name,
        "backbone": backbone,
        "date": record.created[:16].replace("T", " "),
        "epoch": ", ".join([f"{best} of {len(history) - 1}", *notes]),
        "validation mAP@R (%)": metrics_json.share(history["val_map_at_r"][best]),
        "test Recall@1 (%)": "",
        "test mAP@R (%)": "",
        "published": "no",
    }
    for place in (paths.evaluation_dir / "metrics.json", paths.published_dir / "provenance.json"):
        try:
            made = stages.record_of(place)
        except (OSError, PipelineError):
            continue
        if made.config.get("training.run") != folder.name:  # without {run} in its path, it may be of another run
            continue
        reason = (
            EARLIER if EARLIER in notes else OUTDATED if made.inputs.get(run_record.BEST) != checkpoint else ""
        )
        if place.name == "provenance.json":
            row["published"] = reason or "yes"
            continue
        trained = {} if reason else metrics_json.read(place)["methods"]["trained"]
        for name in ("recall@1", "map@r"):
            row[f"test {metrics_json.TITLES[name]} (%)"] = reason or metrics_json.percent(trained[name])
    return row


def as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def table(rows: list[dict[str, str]]) -> str:
    """The rows as aligned text under the keys of the first."""
    lines = [list(rows[0]), *([row.get(key, "") for key in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


if __name__ == "__main__":
    cli.run(main)
