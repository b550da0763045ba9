"""How well cosines tell pairs of one target from others, on the pairs of the dataset's own test set.

Three people have verified each of its pairs (test_matching.tar of the 3D Street View dataset). Raw embeddings,
PCA, learned whitening and the trained head are judged by ROC AUC, average precision, and false positives at 95 %
recall, with 95 % intervals from a bootstrap over images and datasets, with paired differences, and by the angle
between the two views. Pairs of which an image is missing or cannot be decoded are left out.

The images are in the dataset's training tars, too. The summary says of how many of them train or val has the
building or the panorama; data.held_out keeps both out of them (docs/training.md).

--compare adds rows: other runs by name, checkpoints, published folders. --vectors adds another model's: a Parquet
file with `id` (0006-0087241) and `embedding`.

Reads    PAIRS: the tar, plain or gzip, or a folder with its content; the backbone; the ids of
         data/<backbone>/merged/{train,val}.parquet and data/intermediates;
         checkpoints/<backbone>/<run>/checkpoint_best.pt
Writes   data/<backbone>/embeddings_pairs/{whole,patches}.parquet: each image by the backbone, for all runs;
         data/<backbone>/evaluation/<run>/pairs/{pairs.html,pairs.json}, pairs.parquet: the cosines of each pair,
         rejects.parquet: what is left out, and why; with --patches in patches/, with --compare or --vectors in
         compared/ below that
Command  python train/evaluate_pairs.py PAIRS [--patches] [--compare RUN] [--vectors theirs.parquet]
Memory   images x D x 6 bytes, methods x pairs x 8, and 200 MB for blocks of draws; the images in flight (see
         generate/loop.py), for a gzip tar 64 MB and 0.4 % of it, and the backbone
"""

import json
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli


def main(argv=None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "pairs", type=Path, metavar="PAIRS", help="test_matching.tar, or a folder with its content"
    )
    parser.add_argument("--patches", action="store_true", help="embed the patches instead of whole images")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further rows: runs, or models")
    parser.add_argument("--vectors", type=Path, nargs="+", default=[], metavar="FILE", help="vectors of others")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    from common import devices, files
    from common.imagery import verified_pairs
    from common.provenance import digest_of
    from train import evaluate
    from train.pairs import pair_images, pair_metrics, pair_page, pair_task

    # what exists, and whether it belongs together
    compare = [evaluate.compared(cfg, name) for name in args.compare]
    source = args.pairs if args.pairs.exists() else cfg.paths.root / args.pairs
    task = pair_task.of_run(cfg, source, "patches" if args.patches else "whole", compare, args.vectors)
    path, page_path = task.folder / "pairs.json", task.folder / "pairs.html"
    results = pair_task.kept(path, task.record, args.redo)
    if results and page_path.exists():
        print(pair_page.table(results))
        return cli.nothing_to_do("evaluate_pairs", f"{path} and {page_path}")

    # embed the images, judge the pairs
    found = verified_pairs.PairFiles(source)
    pair_task.embed_missing(cfg, found, task, args.redo)
    images = pair_images.load(found, cfg, task.kind)
    with cli.Progress("evaluate_pairs", "pair", None, cfg.logging.progress_interval_s) as progress:
        device = devices.pick(cfg.infrastructure.device)
        cosines = pair_task.cosines(task, images, device)
        draws = cfg.evaluation.bootstrap_samples
        left_out, listed = pair_images.count_left_out(images), len(images.pairs) + len(images.left_out)
        results = {
            **pair_metrics.summary(cosines, images.judged, draws, cfg.global_.seed),
            "roc": {name: pair_metrics.roc_curve(of, images.judged.same) for name, of in cosines.items()},
            "counts": pair_images.counts(images),
            "left_out": left_out,
            "images": task.kind,
            "seen": pair_images.seen(cfg, images),
            "descriptions": task.descriptions,
            "subject": task.subject,
        }
        progress.add(listed, len(images.pairs), left_out)

    # save: pairs.json comes last, and vouches for the files beside it
    counts = {"in": listed, "out": len(images.pairs), **left_out}
    results["provenance"] = task.record.finished(digest_of(json.dumps(results)), counts).to_dict()
    page = pair_page.render(results, images, cosines, found)
    path.unlink(missing_ok=True)
    pair_images.write(task.folder, images, cosines, task.record)
    files.write_text(page_path, page)
    files.write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(pair_page.table(results))
    print(f"page: {page_path}")
    return progress.summary()


if __name__ == "__main__":
    cli.run(main)
