"""Every sampler with every loss, over several training seeds: which beats learned whitening, and by how much?

All runs share data, steps and validation; each is evaluated at its best epoch on validation, which may be epoch 0,
the whitening. Figures are averaged over the seeds, then over the queries; the 95 % intervals are those of
evaluate.py, paired for differences. They cover the choice of streets, not of seeds: see `by_seed` in the JSON.

Reads    data/<backbone>/merged/{train,val,test}.parquet, data/<backbone>/difficulty/difficulty_metadata.parquet
Writes   checkpoints/<backbone>/compare/<sampler>-<loss>[-<mining>]-<seed>/, as train.py (existing runs are not
         repeated);
         data/<backbone>/evaluation/<run>/comparison.{json,md,png}; data/<backbone>/merged_moments/, as train.py
Command  python train/compare.py [--seeds 3] [--set training.epochs=8]
Time     that of the runs, see train.py. Fastest on CPU: parallel shards with OMP_NUM_THREADS=1, each training its
         share of the runs, then the command without shards for the table
"""

import json
import logging
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, stages
from common.errors import ConfigError

log = logging.getLogger("pipeline")


def main(argv=None) -> int:
    parser = cli.parser(__doc__, shards=True)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each combination (3)")
    args = parser.parse_args(argv)
    cfg = cli.load_config(args)
    if args.seeds < 1:
        raise ConfigError("--seeds must be 1 or more")
    from common import config, files, parquet, provenance
    from train import datasets, run_record
    from train.evaluation import gallery
    from train.fitting import checkpoints
    from train.fitting.fit import fit
    from train.report import comparison

    # settings, and what exists already
    inputs = run_record.input_ids(cfg) | stages.ids([cfg.paths.merged_dir / "test.parquet"])
    varied = {"training.sampler", "training.loss", "training.mining", "training.seed"}
    recorded = run_record.record(cfg, inputs).config
    shared = {key: value for key, value in recorded.items() if key not in varied}
    shared |= config.values(cfg, "evaluation.gallery", "evaluation.bootstrap_samples")
    record = provenance.record("compare", {**shared, "seeds": args.seeds}, inputs)
    target = cfg.paths.evaluation_dir / "comparison.json"
    if target.exists() and args.redo != "all":
        existing = comparison.read(target)
        made = provenance.Provenance.from_dict(existing["provenance"])
        if parquet.matches(target, made, record, args.redo, "all of its runs"):
            print(comparison.as_markdown(existing))
            return cli.nothing_to_do("compare", str(target))
    gallery.refuse_leaks(cfg.paths.merged_dir)

    # train: data are loaded once for all runs
    data, best = datasets.load_data(cfg), {}
    runs = [(combination, seed) for combination in comparison.combinations() for seed in range(args.seeds)]
    runs = runs[args.shard :: args.num_shards]
    with cli.Progress("compare", "run", len(runs), cfg.logging.progress_interval_s) as progress:
        for combination, seed in runs:
            settings = config.with_training(cfg, **combination._asdict(), seed=seed)
            name = "-".join(filter(lambda part: part != "none", combination))
            run_dir = cfg.paths.checkpoints_dir / "compare" / f"{name}-{seed}"
            saved = checkpoints.existing(run_dir, run_record.record(settings, data.inputs), args.redo)
            checkpoint = fit(settings, data, run_dir=run_dir, saved=saved).best
            best[combination, seed] = checkpoint
            map_at_r = checkpoint["metrics"]["map@r"]
            log.info("%s: validation mAP@R %.4f, epoch %d", run_dir.name, map_at_r, checkpoint["epoch"])
            progress.add(1)
    if args.num_shards > 1:
        return progress.summary("once all shards are done, run without --shard for the table")

    # evaluate, save
    results = comparison.judge(cfg, best, data.train.device)
    results["provenance"] = record.finished(provenance.digest_of(json.dumps(results)), {"in": len(runs)}).to_dict()
    files.write_text(target.with_suffix(".md"), comparison.as_markdown(results) + "\n")
    files.write_bytes(target.with_suffix(".png"), comparison.draw(results))
    files.write_text(target, json.dumps(results, indent=1) + "\n")
    print(comparison.as_markdown(results))
    return progress.summary(str(target))


if __name__ == "__main__":
    cli.run(main, resumable=True)
