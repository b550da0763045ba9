"""One vector for each building: the mean of its images' vectors; clusters of buildings; a map of their vectors.

Reads    VECTORS: a Parquet file, or a folder of them, with `embedding` and a column that names the building (--by:
         strings or integers), such as the output of generate_embeddings_from_parquet.py, which is read by default
         (data/<backbone>/vectors/<run>); for pictures of the clusters also the tars of paths.raw_dir
Writes   OUT/buildings.parquet: a row for each building: its unit vector, images, spread, position, cluster, place
         on a plane (with openTSNE), and those columns of the images that have one value in each building;
         OUT_rejects/buildings.parquet: images without a building or a usable vector;
         OUT_report/clusters.{json,png}: figures, and the most typical buildings of each cluster
Command  python publish/aggregate_buildings.py [VECTORS OUT] [--by building_id] [--clusters 20]
         python publish/aggregate_buildings.py PHOTO_VECTORS OUT --labels TABLE.csv
Memory   4 bytes a dimension and 400 more for each building, 40 for each image: 10 GB for 6 M buildings of 25 M
         images at 256 dimensions; less than 1 GB for clusters and the projection
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import ConfigError, command


def parse(argv) -> argparse.Namespace:
    arguments = cli.parser(__doc__)
    arguments.add_argument("vectors", nargs="?", type=Path, help="Parquet file or folder (paths.vectors_dir)")
    arguments.add_argument("out", nargs="?", type=Path, help="folder for the table (paths.buildings_dir)")
    arguments.add_argument("--by", default="building_id", metavar="NAME", help="names the building (building_id)")
    arguments.add_argument("--labels", type=Path, metavar="TABLE", help="CSV or Parquet: image, building; instead")
    arguments.add_argument("--id", metavar="NAME", help="column that names the image (streetview_image_id, image)")
    arguments.add_argument("--clusters", type=int, default=20, metavar="K", help="clusters (20); 0: none")
    args = arguments.parse_args(argv)
    if args.clusters < 0:
        raise ConfigError("--clusters must be 0 or more")
    if args.vectors and not args.out:
        raise ConfigError("name a folder for the table too: the default one is that of the run's own vectors")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from common import files, parquet, provenance
    from common.config import values
    from publish.buildings import image_vectors, vector_projection
    from publish.retrieval import embedding_tables

    folder = (args.vectors or cfg.paths.vectors_dir).resolve()
    out = (args.out or cfg.paths.buildings_dir).resolve()
    if out == (folder.parent if folder.is_file() else folder):
        raise ConfigError(f"{out} is the folder of the vectors: name another one for the table")
    source = image_vectors.find(folder, args.by, args.id, args.labels)
    if folder == cfg.paths.vectors_dir.resolve():
        embedding_tables.warn_of_missing_splits(folder, cfg.paths.merged_dir)
    settings = {
        "model.weights": source.model,
        "by": "labels" if args.labels else args.by,
        "id": source.id,
        "clusters": args.clusters,
    }
    settings |= values(cfg, "global.seed")
    record = provenance.record("aggregate_buildings", settings, source.inputs)
    target, report = out / "buildings.parquet", files.beside(out, "report")
    is_done = parquet.is_done(target, record, args.redo)
    facts = parquet.read_provenance(target).facts if is_done else {}
    if is_done and not facts["projection"] and vector_projection.method():
        is_done = not args.redo
        if is_done:
            print(f"aggregate_buildings: x and y are empty; openTSNE is installed now: {command('', '--remake')}")
    if is_done and (facts["stability"] is None or (report / "clusters.json").exists()):
        return cli.nothing_to_do("aggregate_buildings", str(target))

    from publish.buildings import building_clusters, building_means, building_table

    total, seed = sum(source.num_rows), cfg.global_.seed
    with cli.Progress("aggregate_buildings", "image", total, cfg.logging.progress_interval_s) as progress:
        buildings, rejected = building_means.aggregate(source, progress)
        if is_done:  # but for the report
            clusters = building_table.clusters_of(target)
        else:
            clusters = building_clusters.fit(buildings.vectors, args.clusters, seed)
            plane = vector_projection.project(buildings.vectors, seed, cfg.infrastructure.threads)
        building_table.write_report(report, buildings, clusters, source, record, cfg.paths)
        if not is_done:
            building_table.write(target, buildings, clusters, plane, rejected, source, record)
    note = f"{len(buildings):,} buildings"
    if clusters.stability is not None:
        note += f" in {clusters.number} clusters (stability {clusters.stability:.2f}: {report / 'clusters.json'})"
    return progress.summary(f"{note}; {target}")


if __name__ == "__main__":
    cli.run(main)
