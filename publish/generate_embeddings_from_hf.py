"""Vectors by the published model of images in a folder, a list, a tar, or the pipeline's intermediates.

Reads    IMAGES: a folder (with all below it), a text file with a path per line (absolute, or relative to that
         file), a .tar, or the intermediates' folder (then also the tars of paths.raw_dir); the published model
Writes   OUT/<name>-<part>.parquet: `image` (path, member, or streetview_image_id) and `embedding` (float32, of
         length 1), data.rows_per_part images each; OUT_rejects/: images that cannot be read or decoded
Command  python publish/generate_embeddings_from_hf.py IMAGES OUT [--model FOLDER]
Memory   the images in flight (see generate/loop.py: some tens of MB), two parts (20,000 x 256 x 4 bytes: 20 MB),
         the images' names, and the model
"""

import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("images", type=Path, help="folder, text list, .tar, or folder of intermediates")
    arguments.add_argument("out", type=Path, help="folder for the vectors")
    arguments.add_argument("--model", type=Path, metavar="FOLDER", help="published model (paths.published_dir)")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common.imagery.tar_images import of_paths
    from publish.inference import image_sources, vector_parts

    sources = image_sources.groups(args.images, of_paths(cfg.paths))
    return vector_parts.run("generate_embeddings_from_hf", "image", sources, args, cfg)


if __name__ == "__main__":
    cli.run(main, resumable=True)
