"""How well the trained head finds the same building on streets it never saw, beside what was there before it.

Every image of the test split is a query; the rest of the split (training.gallery = "all": train and val too) is
what it is looked for in. Four methods: the raw backbone, PCA, learned whitening, the trained head. 95 % intervals
come from a bootstrap over cells of the map, below 20 cells there are none.

Reads    data/merged/{test,train,val}.parquet, checkpoints/<run>/{checkpoint_best.pt,history.parquet};
         for the report's pictures, by offset, data/raw/<tar>.tar (may be gone)
Writes   data/evaluation/{report.html,metrics.json}
Command  python train/evaluate.py [--set training.gallery=all] [--set training.run=NAME]
Memory   gallery rows x (D x 2 + 150) bytes on the host and x D x 4 on the device (768-d, 2.5 M rows: 4 and 8 GB),
         plus search_memory_mb
"""

import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli

SETTINGS = ("global.seed", "data.ignore_radius_m", "training.gallery", "training.bootstrap_samples")


def main(argv=None) -> int:
    args = cli.parser(__doc__).parse_args(argv)
    cfg = cli.load_config(args)
    from common import config, devices, files, provenance
    from train import gallery, model, protocol, report

    # what there is, and whether it belongs together
    run_dir = cfg.paths.checkpoints_dir / cfg.training.run
    checkpoint_path = run_dir / "checkpoint_best.pt"
    checkpoint = model.load_checkpoint(checkpoint_path)
    splits = gallery.refuse_mixture(cfg.paths.merged_dir, checkpoint_path, checkpoint)
    inputs = {f"{split}.parquet": known.id for split, known in splits.items()}
    inputs[checkpoint_path.name] = checkpoint["provenance"]["id"]
    made = provenance.record("evaluate", config.values(cfg, *SETTINGS), inputs)
    metrics_path, report_path = (cfg.paths.evaluation_dir / name for name in ("metrics.json", "report.html"))
    if report_path.exists() and is_done(metrics_path, made, args.overwrite):
        print(report.table(read_metrics(metrics_path)))
        return cli.nothing_to_do("evaluate", f"{metrics_path} and {report_path}")
    gallery.refuse_leaks(cfg.paths.merged_dir)

    # rank, average
    names = gallery.SPLITS if cfg.training.gallery == "all" else gallery.SPLITS[:1]
    paths = [cfg.paths.merged_dir / f"{name}.parquet" for name in names]
    rows = gallery.load(paths, cfg.data.ignore_radius_m)
    device = devices.pick(cfg.infrastructure.device)
    total = rows.num_queries * len(protocol.METHODS)
    with cli.Progress("evaluate", "ranking", total, cfg.logging.progress_interval_s) as progress:
        figures, vectors, per_query = protocol.evaluate(cfg, rows, checkpoint, device, progress)

    # save: the report first, so that metrics.json says that both are there
    figures["provenance"] = finish(made, figures)
    page = report.render(cfg, figures, checkpoint, rows, vectors, per_query)
    files.write_text(report_path, page)
    files.write_text(metrics_path, to_json(figures))
    print(report.table(figures))
    print(f"report: {report_path}")
    return progress.summary()


def is_done(path: Path, made, overwrite: bool) -> bool:
    """Whether metrics.json is there, of these inputs and settings. Raises StaleArtefact if of others."""
    from common import parquet, provenance

    if overwrite or not path.exists():
        return False
    there = provenance.Provenance(**read_metrics(path)["provenance"])
    parquet.refuse_stale(path, there, made, f"{there.rows['in']:,} queries")
    return True


def read_metrics(path: Path) -> dict:
    """metrics.json as a dict. Raises PipelineError if it is damaged."""
    import json

    from common.errors import PipelineError

    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}): delete it and evaluate again") from None


def to_json(figures: dict) -> str:
    import json

    return json.dumps(figures, indent=1, allow_nan=False) + "\n"


def finish(made, figures: dict) -> dict:
    """The record as it stands in metrics.json; its id is a digest of the figures."""
    from common.provenance import digest_of

    counts = figures["counts"]
    rows = {"in": counts["queries"] + counts["queries_without_match"], "out": counts["queries"]}
    return made.finished(digest_of(to_json(figures)), rows).to_dict()


if __name__ == "__main__":
    cli.run(main)
