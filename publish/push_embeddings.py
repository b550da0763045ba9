"""Vectors of images and of buildings, as a dataset on the Hugging Face hub, with a dataset card.

Reads    data/<backbone>/vectors/<run>/*.parquet, data/<backbone>/buildings/<run>/buildings.parquet (if one of the
         two is missing, only the other is sent); the published model that made them
Writes   data/<backbone>/vectors/<run>_dataset/: README.md (the card), and links to those files in images/ and
         buildings/; the repository, which is private if it is new, gets the same, unless --dry-run is given
Command  python publish/push_embeddings.py USER/NAME [--dry-run] [--model-repo USER/MODEL]
Memory   a column of the vectors at a time: 8 bytes for each image
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli


def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.config_flags(arguments)
    arguments.add_argument("repo", metavar="USER/NAME", help="the dataset repository")
    arguments.add_argument("--dry-run", action="store_true", help="write the card and list what would be sent")
    arguments.add_argument("--model-repo", metavar="USER/MODEL", help="the model on the hub, for the card")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import files
    from publish.hub import dataset_push

    tables = dataset_push.find_tables(cfg)
    folder = files.beside(cfg.paths.vectors_dir, "dataset")
    dataset_push.lay_out(folder, tables, dataset_push.card(cfg, tables, args.repo, args.model_repo))
    print(dataset_push.listing(folder, args.repo))
    if not args.dry_run:
        print(f"pushed: {dataset_push.send(folder, args.repo)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
