"""Vectors by the published model from Parquet files of backbone embeddings (only the head runs), or of images.

Reads    INPUT: a Parquet file, or a folder of them, with a column of embeddings (lists of floats: what
         generate_embeddings.py writes) or of images (bytes, or Hugging Face's struct of bytes and path), or the
         pipeline's intermediates (then also the tars of paths.raw_dir); by default data/<backbone>/merged;
         the published model
Writes   OUT/<file>-<part>.parquet: the other columns as they are, and `embedding` (float32, of length 1) in place
         of the column that was used; whole row groups, at least data.rows_per_part rows a part; by default OUT is
         data/<backbone>/vectors/<run>;
         OUT_rejects/: rows whose image cannot be decoded, or which the column of --valid rules out, by the column
         of --id or else by number: each row of INPUT is in one or the other
Command  python publish/generate_embeddings_from_parquet.py [INPUT OUT] [--column NAME] [--id NAME] [--valid NAME]
         [--model FOLDER] [--shard 3 --num-shards 40]; slurm/submit.py --embed INPUT OUT submits it as a job array
Memory   the model and one row group of the input; for images two more row groups, the vectors of two parts, and
         the images in flight (see generate/loop.py: some tens of MB)
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = cli.parser(__doc__, shards=True)
    arguments.add_argument("input", type=Path, nargs="?", help="Parquet file or folder (paths.merged_dir)")
    arguments.add_argument("out", type=Path, nargs="?", help="folder for the vectors (paths.vectors_dir)")
    arguments.add_argument("--column", metavar="NAME", help="with the embeddings or images (the one that fits)")
    arguments.add_argument("--id", metavar="NAME", help="column that names rejected rows (their numbers do)")
    valid = "column of booleans: rows in which it is false or empty are rejected"
    arguments.add_argument("--valid", metavar="NAME", help=valid)
    arguments.add_argument("--model", type=Path, metavar="FOLDER", help="published model (paths.published_dir)")
    args = arguments.parse_args(argv)
    if args.input and not args.out:
        raise ConfigError("name a folder for the vectors too, or neither: then those of the settings are used")
    return args


def sources(args: argparse.Namespace, cfg) -> Iterator:
    from common.imagery.tar_images import of_paths
    from publish.inference import vector_tables

    columns = vector_tables.Columns(args.column, args.id, args.valid)
    return vector_tables.tables(args.input, args.out, columns, of_paths(cfg.paths))


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    args.input, args.out = args.input or cfg.paths.merged_dir, args.out or cfg.paths.vectors_dir
    from publish.inference import vector_parts

    return vector_parts.run("generate_embeddings_from_parquet", "row", sources(args, cfg), args, cfg)


if __name__ == "__main__":
    cli.run(main, resumable=True)
