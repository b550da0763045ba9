"""What a search needs of vectors on disk: the vectors in float16, the other columns, and a record of the model.

Up to two million vectors a search compares the query with all of them, exactly. For more, an approximate index is
built beside them with faiss, and its recall against the exact search is measured, printed and stored.

Reads    VECTORS (paths.vectors_dir): a folder of Parquet files, or a file, with a column `embedding`: of images
         (generate_embeddings_from_*.py), of buildings (aggregate_buildings.py), or of any program
Writes   OUT (paths.index_dir): vectors.npy, rows.parquet, index.json and, of kind ivf, index.faiss: see
         publish/retrieval/vector_index.py for their format. A former index stays until the new one is complete, so
         a rebuild needs room for both. OUT_rejects/rows.parquet: rows without a usable vector
Command  python publish/build_index.py [VECTORS [OUT]] [--kind exact]
         then python publish/demo_usage.py search QUERY.jpg --index [OUT]
Memory   65,536 rows: D x 30 bytes each, and the other columns; of kind ivf also N x (D x 2 + 8) bytes (13 GB for
         25 M x 256), and 256 sqrt(N) x D x 4 while it is trained (1.3 GB)
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError

IVF_FROM = 2_000_000  # rows: an exact search takes about 0.2 s of processor time a query, and reads 1 GB (256-d)


def parse(argv) -> argparse.Namespace:
    arguments = cli.parser(__doc__)
    arguments.add_argument("vectors", nargs="?", type=Path, metavar="VECTORS", help="folder (paths.vectors_dir)")
    arguments.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder (paths.index_dir)")
    arguments.add_argument(
        "--kind", choices=("auto", "exact", "ivf"), default="auto", help=f"auto: ivf from {IVF_FROM:,} vectors"
    )
    return arguments.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from common import devices, files, provenance
    from publish.retrieval import embedding_tables, index_files, inverted_file

    source, own = args.vectors or cfg.paths.vectors_dir, (cfg.paths.vectors_dir, cfg.paths.buildings_dir)
    if not args.out and source.resolve() not in [folder.resolve() for folder in own]:
        raise ConfigError(f"name a folder for the index of {source}, too: {cfg.paths.index_dir} is the run's own")
    out = (args.out or cfg.paths.index_dir).resolve()
    files.remove_dead_folders(out)
    tables = embedding_tables.tables_at(source)
    if source.resolve() == cfg.paths.vectors_dir.resolve():
        embedding_tables.warn_of_missing_splits(source, cfg.paths.merged_dir)
    index_files.refuse_folder(tables, out)
    record = provenance.record("build_index", {"model.weights": tables.model}, tables.inputs)
    if index_files.is_done(out, record, args.kind, args.redo):
        return cli.nothing_to_do("build_index", str(out))
    kind = args.kind
    if kind == "auto":
        kind = "ivf" if tables.num_rows >= IVF_FROM else "exact"
    if kind == "ivf":
        inverted_file.require_faiss()  # before an hour's work

    with cli.Progress("build_index", "vector", tables.num_rows, cfg.logging.progress_interval_s) as progress:
        found = index_files.write(out, tables, kind, record, devices.pick(cfg.infrastructure.device), progress)
    print(found)
    return progress.summary(str(out))


if __name__ == "__main__":
    cli.run(main)
