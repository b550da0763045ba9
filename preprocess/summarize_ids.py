"""Count buildings, images, views per building and panoramas, by dataset and by split, and show distributions.

Reads    data/<backbone>/merged/{train,val,test}.parquet if they exist, else data/intermediates/*.parquet
Writes   data/<backbone>/summary/summary.parquet: a row per split and dataset;
         data/<backbone>/summary_report/summary.json: the same, totals and histograms;
         data/<backbone>/summary_report/summary.html: one page with the figures and a map;
         from intermediates, the same to data/<backbone>/summary_intermediates and
         data/<backbone>/summary_intermediates_report
Command  python preprocess/summarize_ids.py
Memory   about 150 bytes for each image of the largest file: 3 GB for 20 M images in train
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import PipelineError


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from common import files, schemas

    sources = find_sources(cfg.paths)
    record = STAGE.record(cfg, {f"{path.parent.name}/{path.name}": stages.identity(path) for path, _ in sources})
    folder = cfg.paths.summary_dir
    # a folder of its own before the merge: what was counted then must not stand in the way of counting its splits
    if sources[0][1] not in schemas.SPLITS:
        folder = files.beside(folder, "intermediates")
    yield stages.Output(folder / "summary.parquet", record)
    totals = files.beside(folder, "report") / "summary.json"
    yield stages.Output(totals, record, companions=(totals.with_suffix(".html"),))


STAGE = stages.Stage("summarize_ids", lambda cfg: cfg.paths.summary_dir, outputs, settings=("data.split_cell_m",))


def main(argv=None) -> int:
    args = cli.parser(__doc__).parse_args(argv)
    cfg = cli.load_config(args)
    import json

    import numpy as np
    import pandas as pd

    from common import files, parquet, schemas
    from common.places import geo
    from preprocess.split import cell_maps
    from preprocess.summary import id_summary

    sources = find_sources(cfg.paths)
    files.refuse_leftovers(cfg.paths.summary_dir, "report", "*.json", "*.html", "summary_intermediates.parquet")
    (table, record), (totals, _) = ((output.path, output.record) for output in outputs(cfg, 0, 1))
    page = totals.with_suffix(".html")
    if parquet.is_done(table, record, args.redo) and page.exists() and totals.exists():
        return cli.nothing_to_do("summarize_ids", f"{table.parent}")
    totals.unlink(missing_ok=True)  # written last: older ones must not vouch for a new table

    rows, places = [], []
    histograms: dict[str, dict[str, np.ndarray]] = {split: {} for _, split in sources}
    total = sum(parquet.num_rows(path) for path, _ in sources)
    with cli.Progress("summarize_ids", "image", total, cfg.logging.progress_interval_s) as progress:
        for path, split in sources:
            images = parquet.read(path, id_summary.COLUMNS).to_pandas()
            rows.append(id_summary.by_dataset(images, split))
            known = images[geo.is_known(images["target_lat"], images["target_lon"])]
            cell = geo.cell_ids(known["target_lat"], known["target_lon"], cfg.data.split_cell_m)
            places.append(cell_maps.count_cells(known["dataset_id"], cell, split))
            for name, counts in id_summary.histograms(images).items():
                histograms[split][name] = histograms[split].get(name, 0) + counts
            progress.add(len(images))
        rows = pd.concat(rows, ignore_index=True)
        files.write_text(page, id_summary.page(rows, histograms, pd.concat(places), cfg.data.split_cell_m))
        with parquet.writer(table, schemas.SUMMARY, record) as out:
            out.append({name: rows[name].to_numpy() for name in schemas.SUMMARY.names})
            out.rows = {"in": total}
        report = {
            "splits": id_summary.totals(rows),
            "datasets": rows.astype(object).where(rows.notna(), None).to_dict("records"),
            "histograms": {
                split: {name: counts.tolist() for name, counts in of_split.items()}
                for split, of_split in histograms.items()
            },
            "provenance": parquet.read_provenance(table).to_dict(),
        }
        files.write_text(totals, json.dumps(report, indent=2) + "\n")
    return progress.summary(f"{page}")


def find_sources(paths) -> list[tuple[Path, str]]:
    """The files to read, each with the split of its images."""
    from common import schemas

    merged = [(paths.merged_dir / f"{split}.parquet", split) for split in schemas.SPLITS]
    if all(path.exists() for path, _ in merged):
        return merged
    intermediates = sorted(paths.intermediates_dir.glob("*.parquet"))
    if not intermediates:
        raise PipelineError(f"{paths.intermediates_dir} holds no files: run preprocess/process_tar.py first")
    return [(path, "all") for path in intermediates]


if __name__ == "__main__":
    cli.run(main)
