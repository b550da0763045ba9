"""How well the trained head retrieves images of the same building on streets it never saw, against baselines.

Every image of the test split is a query; the rest of the split (evaluation.gallery = "all": train and val too) is
the gallery. Four methods: the raw backbone, PCA, learned whitening, the trained head. 95 % intervals come from a
bootstrap over cells of the map; none are given below 20 effective cells. The same for buildings, each the mean of
its images: one image searches among them, and half of a building's images for its other half.

--compare adds rows: other runs by name, checkpoints, published folders, Parquet files with another model's vectors
of the same images. --embeddings evaluates a file with the columns of merged/test.parquet by itself.
--check shows how two metrics.json differ: exit code 1 if a figure in both differs by more than 0.001 (0.1
percentage points: other machines round differently).

Reads    data/<backbone>/merged/{test,train,val}.parquet,
         checkpoints/<backbone>/<run>/{checkpoint_best.pt,history.parquet};
         for the report's pictures, by offset, data/raw/<tar>.tar (optional)
Writes   data/<backbone>/evaluation/<run>/{report.html,queries.parquet,metrics.json}; with --compare in compared/
         below that, with --embeddings in a folder with the file's name. queries.parquet has a row per test image:
         where it is, its rank, its best match and its best wrong image by each method
Command  python train/evaluate.py [--set evaluation.gallery=all] [--compare RUN theirs.parquet]
Memory   gallery rows x (D x 2 + 150) bytes on the host and x D x 4 on the device (768-d, 2.5 M rows: 4 and 8 GB),
         or also on the host if those are more than two thirds of what is free on the device (25 M rows: 119 GB
         on the host); for a time, the buildings' vectors in addition (x D x 4 bytes); plus 32 bytes for each match
         and 24 for each query by each method, and search_memory_mb on each; before that, to look for leaks, about
         100 bytes for each row of all splits
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import PipelineError

FILES = ("metrics.json", "report.html", "queries.parquet")  # the first vouches for the others


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from train import run_record

    record = STAGE.record(cfg, run_record.evaluated_ids(cfg))
    folder = cfg.paths.evaluation_dir
    metrics, *companions = (folder / name for name in FILES)
    yield stages.Output(metrics, record, companions=tuple(companions))


STAGE = stages.Stage(
    "evaluate",
    lambda cfg: cfg.paths.evaluation_dir,
    outputs,
    settings=("global.seed", "data.ignore_radius_m", "evaluation", "training.run"),
)


def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further rows: runs or files")
    other.add_argument("--embeddings", type=Path, metavar="FILE", help="evaluate this file instead")
    other.add_argument("--check", type=Path, nargs=2, metavar="METRICS", help="compare two metrics.json")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    from train.evaluation import metrics_json

    if args.check:
        text, same = metrics_json.check(*(locate(cfg, path) for path in args.check))
        print(text)
        return 0 if same else 1
    from common import devices, files
    from common.provenance import digest_of
    from train.evaluation import gallery, methods, protocol
    from train.report import evaluation_page, query_table

    # what exists, and whether it belongs together
    task = (
        methods.task_of_file(cfg, locate(cfg, args.embeddings))
        if args.embeddings
        else methods.task_of_run(cfg, [compared(cfg, name) for name in args.compare], STAGE)
    )
    metrics_path, report_path, queries_path = (task.folder / name for name in FILES)
    results = metrics_json.kept(metrics_path, task.record, args.redo)
    if results and report_path.exists() and queries_path.exists():
        print(evaluation_page.table(results))
        return cli.nothing_to_do("evaluate", f"{metrics_path} and {report_path}")
    leakage = None if args.embeddings else gallery.refuse_leaks(cfg.paths.merged_dir)
    history, split_report = (None, {}) if args.embeddings else evaluation_page.read_background(cfg)

    # rank, average
    rows = gallery.load(task.paths, cfg.data.ignore_radius_m)
    device = devices.pick(cfg.infrastructure.device)
    total = protocol.num_rankings(rows) * len(task.methods)
    with cli.Progress("evaluate", "ranking", total, cfg.logging.progress_interval_s) as progress:
        found = protocol.evaluate(cfg, rows, task.methods, device, progress)
    results = found.figures | {
        "subject": task.subject,
        "descriptions": {method.name: method.description for method in task.methods},
        "gallery": "file" if args.embeddings else cfg.evaluation.gallery,
        "leakage": leakage,
    }

    # save: metrics.json comes last, and vouches for the files beside it
    counts = {"in": rows.num_queries, "out": results["counts"]["queries"]}
    results["provenance"] = task.record.finished(digest_of(json.dumps(results)), counts).to_dict()
    text = metrics_json.to_json(results)
    explorer = os.path.relpath(cfg.paths.evaluation_dir / "explorer.html", task.folder)
    page = evaluation_page.render(cfg, results, history, split_report, rows, found, explorer)
    metrics_path.unlink(missing_ok=True)
    query_table.write(queries_path, task.record, rows, found.matches, found.per_query)
    files.write_text(report_path, page)
    files.write_text(metrics_path, text)
    print(evaluation_page.table(results))
    print(f"report: {report_path}")
    return progress.summary()


def compared(cfg, name: str) -> Path:
    """What --compare names: a run, by its checkpoint or else as published; or else a path.

    Raises PipelineError for a name of neither, and for a run that has not finished.
    """
    from common import config
    from train import run_record

    path, published = locate(cfg, Path(name)), config.paths_of(cfg, name).published_dir
    if "/" in name:
        return path
    checkpoints = cfg.paths.checkpoints_dir.glob("*/checkpoint_best.pt")
    runs = {checkpoint.parent.name: checkpoint.parent for checkpoint in checkpoints}
    if name in runs:
        run_record.finished(runs[name] / run_record.HISTORY)
        return runs[name]
    if published.name == name and (published / "provenance.json").exists():
        return published
    if not path.exists():
        known = ", ".join(sorted(runs)) or "none"
        raise PipelineError(
            f"--compare {name}: no such run in {cfg.paths.checkpoints_dir} ({known}), and no such file"
        )
    return path


def locate(cfg, path: Path) -> Path:
    """A path of the command line: relative to here if it exists, else to paths.root."""
    return path if path.exists() else cfg.paths.root / path


if __name__ == "__main__":
    cli.run(main)
