"""Vectors by the published model of images in a folder, a list, a tar, or the pipeline's intermediates.

Reads    IMAGES: a folder (with all below it), a text file with a path per line (absolute, or relative to that
         file), a .tar, or the intermediates' folder (then also the tars of paths.raw_dir); the published model
Writes   OUT/<name>-<part>.parquet: `image` (path, member, or streetview_image_id) and `embedding` (float32, of
         length 1), data.rows_per_part images each; OUT_rejects/: images that cannot be read or decoded
Command  python publish/generate_embeddings_from_hf.py IMAGES OUT [--model FOLDER] [--shard 3 --num-shards 40];
         slurm/submit.py --embed IMAGES OUT submits it as a job array
Memory   the images in flight (see generate/loop.py: some tens of MB), two parts (20,000 x 256 x 4 bytes: 20 MB),
         the images' names, and the model
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = cli.parser(__doc__, shards=True)
    images = "folder, text list, .tar, or folder of intermediates"
    arguments.add_argument("input", type=Path, metavar="images", help=images)
    arguments.add_argument("out", type=Path, help="folder for the vectors")
    arguments.add_argument("--model", type=Path, metavar="FOLDER", help="published model (paths.published_dir)")
    return arguments.parse_args(argv)


def sources(args: argparse.Namespace, cfg) -> Iterator:
    from common.imagery.tar_images import of_paths
    from publish.inference import image_sources

    return image_sources.groups(args.input, of_paths(cfg.paths))


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from publish.inference import vector_parts

    return vector_parts.run("generate_embeddings_from_hf", "image", sources(args, cfg), args, cfg)


if __name__ == "__main__":
    cli.run(main, resumable=True)
