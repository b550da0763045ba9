"""The published model: backbone and trained head in one folder that AutoModel loads, with a model card.

Reads    checkpoints/<backbone>/<run>/checkpoint_best.pt, data/<backbone>/evaluation/<run>/metrics.json, the
         backbone; for the parity check and the card data/<backbone>/merged/{train,val,test}.parquet and 64 JPEGs
         of data/raw
Writes   data/<backbone>/published/<run>/: config.json, model.safetensors (the dtype of the embeddings; files of at
         most 5 GB), preprocessor_config.json, three .py files, README.md (the card) and
         its picture, what sentence-transformers needs (three .json files), provenance.json. It appears,
         or replaces the former one, once AutoModel reproduces from it the stored embeddings (within 1e-3 in cosine
         distance) and the trained head's vectors of these (within 1e-6)
Command  python publish/convert_to_hf.py [--set training.run=NAME] [--push USER/NAME [--push-space USER/SPACE]
         [--dry-run]]
         --push sends the folder to the hub, --push-space also a page that searches data/<backbone>/index/<run>
         with it; a repository that does not exist yet becomes a private one; --dry-run only lists all that
Memory   the backbone in that dtype (7B parameters in bfloat16: 13 GB), once here and once in the check
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli, provenance, stages
from common.errors import ConfigError, PipelineError


def outputs(cfg, task: int, num_tasks: int) -> Iterator[stages.Output]:
    from train import run_record

    metrics_path = cfg.paths.evaluation_dir / "metrics.json"
    checkpoint_id = run_record.evaluated_ids(cfg)[run_record.BEST]
    ids = {run_record.BEST: checkpoint_id, metrics_path.name: stages.identity(metrics_path)}
    path = cfg.paths.published_dir / "provenance.json"
    yield stages.Output(path, STAGE.record(cfg, ids), companions=written_files(path))


def written_files(path: Path) -> tuple[Path, ...]:
    """The files beside a provenance.json that it names, none if it is missing or an older version wrote it."""
    try:
        return tuple(path.parent / name for name in stages.record_of(path).facts.get("files", ()))
    except (OSError, PipelineError):
        return ()


STAGE = stages.Stage("convert_to_hf", lambda cfg: cfg.paths.published_dir, outputs, settings=("training.run",))


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument(
        "--push", metavar="USER/NAME", help="send it to this repository of the Hugging Face hub"
    )
    arguments.add_argument(
        "--push-space", metavar="USER/SPACE", help="with --push: a Space that searches paths.index_dir with it"
    )
    arguments.add_argument("--dry-run", action="store_true", help="with --push: only list what would be sent")
    args = arguments.parse_args(argv)
    if args.dry_run and not args.push:
        raise ConfigError("--dry-run lists what --push would send: name the repository with --push USER/NAME")
    if args.push_space and not args.push:
        raise ConfigError(
            "a Space loads its model from the hub: name the model's repository with --push USER/NAME"
        )
    cfg = cli.load_config(args)
    convert(cfg, args.redo)
    if args.push:
        send(cfg, args)
    return 0


def send(cfg, args: argparse.Namespace) -> None:
    """List what goes to the hub and, unless it is a dry run, send it."""
    from publish.hub import push, space_push

    folder, hub = cfg.paths.published_dir, "https://huggingface.co"
    space = space_push.of_space(folder, args.push, cfg.paths.index_dir) if args.push_space else {}
    print(push.listing(push.of_model(folder, args.push), f"{hub}/{args.push}", folder))
    if space:
        print(push.listing(space, f"{hub}/spaces/{args.push_space}"))
    if not args.dry_run:
        print(f"pushed: {push.push(folder, args.push)}")
        if space:
            print(f"pushed: {space_push.push_space(space, args.push_space)}")


def convert(cfg, redo: provenance.Redo) -> None:
    """Write the published folder, unless it is up to date."""
    from common import devices, files
    from publish.hub import model_card, parity, published_folder
    from train import run_record
    from train.evaluation import heads, metrics_json

    files.remove_dead_folders(cfg.paths.published_dir)

    # the inputs, and whether they belong together
    checkpoint_path = run_record.run_dir(cfg) / run_record.BEST
    metrics_path = cfg.paths.evaluation_dir / "metrics.json"
    history_path = checkpoint_path.with_name(run_record.HISTORY)
    if history_path.exists():
        run_record.finished(history_path)
    checkpoint = heads.load_checkpoint(checkpoint_path)
    metrics = metrics_json.read(metrics_path)
    test = cfg.paths.merged_dir / "test.parquet"
    published_folder.refuse_mixture(test, checkpoint_path, checkpoint, metrics_path, metrics)
    inputs = {
        checkpoint_path.name: checkpoint["provenance"]["id"],
        metrics_path.name: metrics["provenance"]["id"],
    }
    record = STAGE.record(cfg, inputs)
    written = written_files(cfg.paths.published_dir / "provenance.json")
    if published_folder.is_done(cfg.paths.published_dir, record, redo) and all(map(files.is_whole, written)):
        cli.nothing_to_do("convert_to_hf", str(cfg.paths.published_dir))
        return

    # write beside the target, check, move into place
    device = devices.pick(cfg.infrastructure.device, for_backbone=True)
    settings = published_folder.backbone_settings(cfg, checkpoint_path, checkpoint)
    with files.new_folder(cfg.paths.published_dir) as folder:
        preprocessing = published_folder.write_model(folder, settings, checkpoint_path, checkpoint)
        model_card.write(folder, cfg, checkpoint, metrics, preprocessing)
        found = parity.check(folder, cfg, checkpoint, preprocessing, device)
        inputs, model = checkpoint["provenance"]["inputs"], checkpoint["embedding_model"]
        trained_on = {"inputs": inputs, "embedding_model": model}
        names = sorted(path.name for path in folder.iterdir())
        facts = {**found._asdict(), "trained_on": trained_on, "files": names}
        published_folder.write_provenance(folder, record, facts)
    print(
        f"convert_to_hf: wrote {cfg.paths.published_dir}; for {found.parity_images} test images, its embeddings "
        f"are within {found.backbone_cosine_distance:.1e} cosine distance of the stored ones, and its head's "
        f"vectors of them within {found.head_cosine_distance:.1e} of the trained head's"
    )


if __name__ == "__main__":
    cli.run(main)
