"""One page of buildings for people: a map beside a projection of their vectors, their pictures, what looks alike.

The page is a file by itself: it asks nothing of a network, and opens without a server. With the results of
train/evaluate.py it also shows which queries went wrong, with the raw backbone and with the trained head.

Reads    BUILDINGS (paths.buildings_dir): a Parquet file, or a folder of them, of publish/aggregate_buildings.py;
         data/<backbone>/evaluation/<run>/queries.parquet, if there is one, which must be of the same model
         (as data/<backbone>/published/<run>/provenance.json tells);
         for the pictures data/<backbone>/{vectors/<run>,merged}/*.parquet, and by offset data/raw/<tar>.tar
         (optional)
Writes   OUT.html (explorer.html in paths.evaluation_dir)
Command  python publish/explore.py [BUILDINGS] [OUT.html] [--pictures-mb 25]
Memory   50,000 buildings x D x 4 bytes (256-d: 51 MB), infrastructure.search_memory_mb for their nearest ones, and
         the page twice (at most 80 MB); of more buildings 150 bytes each, to choose among them
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import cli
from common.errors import PipelineError

log = logging.getLogger("pipeline")
MAX_BUILDINGS = 50_000  # a page of more is slow to load


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = cli.parser(__doc__)
    arguments.add_argument("buildings", type=Path, nargs="?", help="table of buildings (paths.buildings_dir)")
    arguments.add_argument("out", type=Path, nargs="?", help="the page (explorer.html in paths.evaluation_dir)")
    size = "MB of the page that pictures may take (25); 0: none"
    arguments.add_argument("--pictures-mb", type=float, default=25.0, metavar="MB", help=size)
    return arguments.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    cfg = cli.load_config(args)
    from common import config, devices, files, provenance, schemas
    from common.imagery import tar_images
    from publish.explorer import explorer_data, explorer_failures, explorer_page, explorer_pictures
    from publish.inference import image_sources
    from publish.retrieval import embedding_tables

    # what exists, and whether the page shows it already
    paths = tables_of(args.buildings or cfg.paths.buildings_dir)
    explorer_data.require_columns(paths)
    out = args.out or cfg.paths.evaluation_dir / "explorer.html"
    queries_path = cfg.paths.evaluation_dir / "queries.parquet"
    doubt = explorer_failures.doubt_of_model(paths, queries_path, cfg.paths.published_dir)
    inputs = embedding_tables.identities([*paths, *([queries_path] if queries_path.exists() else [])])
    settings = config.values(cfg, "global.seed", "data.split_cell_m") | {"pictures_mb": args.pictures_mb}
    record = provenance.record("explore", settings, inputs)
    if explorer_page.is_done(out, record, args.redo):
        print(f"explorer: {out}")
        return cli.nothing_to_do("explore", f"{out}")

    # choose, compare
    queries = explorer_failures.read(queries_path)
    failures, num_failures, elsewhere = explorer_failures.listed(queries, paths, cfg.global_.seed)
    notes = [f"It is not known whether the failures are of the table's model: {doubt}."] if doubt else []
    if elsewhere:
        notes.append(f"{elsewhere:,} failures are of buildings that are not in this table.")
    for note in notes:
        log.warning(note)
    buildings = explorer_data.read(paths, set(failures["building_id"]), MAX_BUILDINGS, cfg.global_.seed)
    facts = buildings.facts
    device = devices.pick(cfg.infrastructure.device)
    memory_mb = devices.search_memory_mb(cfg.infrastructure, device)
    with cli.Progress("explore", "building", len(buildings), cfg.logging.progress_interval_s) as progress:
        share_found = None if queries is None else explorer_failures.share_found(queries)
        content = explorer_data.content(buildings, share_found, cfg.data.split_cell_m)
        content |= explorer_data.nearest(buildings.vectors, device, memory_mb, progress)

        # pictures, page
        budget_bytes = args.pictures_mb * 1e6
        of_failures = explorer_failures.image_ids(failures)
        of_buildings = explorer_pictures.of_buildings(facts["image_ids"], budget_bytes)
        sources = [queries_path, *sorted(cfg.paths.vectors_dir.glob("*.parquet"))]
        sources += [cfg.paths.merged_dir / f"{split}.parquet" for split in schemas.SPLITS]
        images = image_sources.find_rows(sources, {*of_failures, *of_buildings}, explorer_pictures.FACTS)
        store = tar_images.of_paths(cfg.paths)
        chosen = explorer_pictures.read(store, images, of_failures, of_buildings, budget_bytes)
        content |= explorer_pictures.content(chosen, facts["image_ids"])
        content |= explorer_failures.content(failures, num_failures, images, content["names"])
        content["notes"] = notes
        made = record.finished("", {"in": buildings.total, "out": len(buildings)})
        page = explorer_page.render(content, list(chosen.values()), made, cfg)
        files.write_text(out, page)
    of_all = f"of {buildings.total:,} in the table, " if len(buildings) < buildings.total else ""
    progress.summary(f"{of_all}{len(chosen):,} pictures, {len(page) / 1e6:.1f} MB")
    print(f"explorer: {out}")
    return 0


def tables_of(path: Path) -> list[Path]:
    """The files of a table of buildings. Raises PipelineError if there are none."""
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise PipelineError(f"{path} holds no table of buildings: run publish/aggregate_buildings.py first")
    return found


if __name__ == "__main__":
    cli.run(main)
