"""Drop duplicates, split the map into train, val and test, and write each split's embeddings to one file.

An image is dropped, and counted, under the first of these that applies: it has no embedding; its building has a
near-identical image; the same JPEG belongs to distant buildings; it is in the buffer between two splits; a later
split has its panorama, or its JPEG; its building has fewer than 2 images left.

Reads    data/intermediates, data/fingerprints and data/<backbone>/embeddings of every tar in data/raw, and
         of every imported set of photographs
Writes   data/<backbone>/merged/{train,val,test}.parquet, sorted by (dataset_id, target_id, patch_id);
         data/<backbone>/merged_report/split_report.json: what was dropped and why, ratios, the proof that nothing
         leaks;
         data/<backbone>/merged_report/split_map.png: the cells by split;
         data/<backbone>/merged_report/duplicates.png: the largest groups of duplicates, if any and if the tars are
         available
Command  python preprocess/merge_and_split.py
Memory   about 280 bytes per image, then three times the embeddings of the largest tar and 200 MB of row groups:
         25 M images with 4096 dimensions, 450,000 per tar, take 7 GB and then 11 GB
Time     bound by the disk: each embedding is read once and written once
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import PipelineError, first_line

REPORT = ("split_report.json", "split_map.png", "duplicates.png")


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from common import files, schemas
    from preprocess.split import merge_files

    record = STAGE.record(cfg, merge_files.find(cfg).ids)
    for split in schemas.SPLITS:
        yield stages.Output(cfg.paths.merged_dir / f"{split}.parquet", record)
    yield stages.Output(files.beside(cfg.paths.merged_dir, "report") / REPORT[0], record)


def recorded(cfg) -> dict:
    """What is held out is known by its content, so that it may be moved."""
    from common import config
    from common.imagery import verified_pairs
    from preprocess.split import merge_files

    settings = config.values(cfg, *STAGE.settings)
    if cfg.data.held_out:
        settings["data.held_out"] = verified_pairs.identity_of(merge_files.held_out_path(cfg))
    return settings


STAGE = stages.Stage(
    "merge_and_split",
    lambda cfg: cfg.paths.merged_dir,
    outputs,
    settings=(
        *("global.seed", "data.dedup_max_hamming", "data.ignore_radius_m"),
        *("data.split_by", "data.split_cell_m", "data.split_buffer_m"),
        *("data.train_ratio", "data.val_ratio", "data.test_ratio", "data.held_out"),
    ),
    recorded=recorded,
)


def main(argv=None) -> int:
    args = cli.parser(__doc__).parse_args(argv)
    cfg = cli.load_config(args)
    from common import files, parquet, provenance, schemas
    from common.imagery.tar_images import of_paths
    from preprocess.split import duplicate_sheet, merge_files, split_report, split_rules

    files.refuse_leftovers(cfg.paths.merged_dir, "report", *REPORT)
    sources = merge_files.find(cfg)
    record = STAGE.record(cfg, sources.ids)
    targets = [cfg.paths.merged_dir / f"{name}.parquet" for name in schemas.SPLITS]
    report_path, map_path, sheet_path = (files.beside(cfg.paths.merged_dir, "report") / name for name in REPORT)
    done = [parquet.is_done(target, record, args.redo) for target in targets]
    if all([*done, report_path.exists(), map_path.exists()]):
        return cli.nothing_to_do("merge_and_split", f"{len(targets)} files")

    with cli.Progress("merge_and_split", "image", sources.num_rows, cfg.logging.progress_interval_s) as progress:
        images = merge_files.read_images(sources)
        held_out = merge_files.held_out(cfg, images)
        decision = split_rules.decide(images, cfg.data, cfg.global_.seed, held_out.rows if held_out else None)
        report = split_report.summarise(images, decision, cfg.data, held_out)
        split_report.refuse_empty(report, cfg.data)
        if any(report["in_two_splits"].values()):
            raise AssertionError(f"the split leaks: {report['in_two_splits']}")
        if held_out and any(report["held_out"]["in_train_or_val"].values()):
            raise AssertionError(f"the split leaks what is held out: {report['held_out']}")
        progress.add(0, 0, {reason: count for reason, count in decision.dropped.items() if count})
        # an older report must not remain beside new splits: it is deleted first, and the new one is written last
        report_path.unlink(missing_ok=True)
        sheet_path.unlink(missing_ok=True)
        facts = {"split_by": report["split_by"], "imported": sources.imported}
        ids = merge_files.write_splits(sources, images, decision, targets, record, facts, progress)
        files.write_bytes(map_path, split_report.draw_map(images, decision, cfg.data.split_cell_m))
        groups = duplicate_sheet.largest_groups(images, decision)
        try:
            if groups:
                files.write_bytes(sheet_path, duplicate_sheet.draw(groups, sources, of_paths(cfg.paths)))
        except PipelineError as error:  # the merge itself does not need the tars
            cli.log.warning("%s not written: %s", sheet_path.name, first_line(error))
        finished = record.finished(provenance.digest_of(*ids), {"in": len(images), "out": progress.rows_out})
        files.write_text(report_path, json.dumps({**report, "provenance": finished.to_dict()}, indent=2) + "\n")
    print(split_report.as_text(report))
    return progress.summary()


if __name__ == "__main__":
    cli.run(main)
