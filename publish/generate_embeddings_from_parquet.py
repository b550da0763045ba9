"""Vectors by the published model of what Parquet files hold: backbone embeddings (only the head runs), or images.

Reads    INPUT: a Parquet file, or a folder of them, with a column of embeddings (lists of floats, the backbone's
         pooled output) or of images (bytes, or Hugging Face's struct of bytes and path), or the pipeline's
         intermediates (then also the tars of paths.raw_dir); the published model
Writes   OUT/<file>-<part>.parquet: the other columns as they are, and `embedding` (float32, of length 1) in place
         of the column that was used; whole row groups, at least data.rows_per_part rows a part;
         OUT_rejects/: rows whose image cannot be decoded
Command  python publish/generate_embeddings_from_parquet.py INPUT OUT [--column NAME] [--model FOLDER]
Memory   one row group of the input, twice; for images also those under way (see generate/loop.py: some tens of
         MB); and the model
"""

import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli


def main(argv=None) -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("input", type=Path, help="Parquet file, or a folder of them")
    arguments.add_argument("out", type=Path, help="folder for the vectors")
    arguments.add_argument("--column", metavar="NAME", help="with the embeddings or images (the one that fits)")
    arguments.add_argument("--model", type=Path, metavar="FOLDER", help="published model (paths.published_dir)")
    args = arguments.parse_args(argv)
    cfg = cli.load_config(args)
    from common import devices, files, parquet
    from common.archives.tar_parts import refuse_surplus
    from common.imagery.tar_images import of_paths
    from generate import backbone, loop
    from publish.inference import published_model, vector_tables

    files.refuse_leftovers(args.out, "rejects", "rejects/*.parquet")
    folder = published_model.folder_of(cfg, args.model)
    device = devices.pick(cfg.infrastructure.device)
    dtype = devices.resolve_dtype(cfg.embedding_model.dtype, device)
    identity = published_model.identity(folder, dtype)

    todo, num_parts = [], 0
    for path in vector_tables.files(args.input, args.out):
        found = vector_tables.parts_of(path, args.out, args.column, cfg.data.rows_per_part, identity)
        todo += [part for part in found if not parquet.is_done(part.target, part.made, args.overwrite)]
        refuse_surplus(args.out, path.stem, len(found), args.overwrite)
        num_parts += len(found)
    if not todo:
        return cli.nothing_to_do("generate_embeddings_from_parquet", f"{num_parts:,} files")

    published = published_model.load(folder, dtype, device)
    backbone.compile_if_asked(published.model, cfg.infrastructure)
    times = loop.Times()
    total = sum(table.num_rows for table in todo)
    interval_s = cfg.logging.progress_interval_s
    with cli.Progress("generate_embeddings_from_parquet", "row", total, interval_s) as progress:
        images = [table for table in todo if table.holds_images]
        vector_tables.embed_images(images, of_paths(cfg.paths), published, cfg.infrastructure, times, progress)
        for table in [table for table in todo if not table.holds_images]:
            vector_tables.project(table, published, times, progress)
            cli.check_stop()
    return progress.summary(str(times))


if __name__ == "__main__":
    cli.run(main, resumable=True)
