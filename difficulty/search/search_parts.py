"""The parts of a neighbour search (consecutive rows of merged/train, a file each) and how they are gathered."""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import cli, files, parquet, schemas
from common.errors import PipelineError
from common.imagery import tar_images
from common.places import zones
from common.provenance import Provenance
from common.sections import Config
from common.stages import Output
from difficulty import bands

log = logging.getLogger("pipeline")
RECALL_SAMPLE = 256  # anchors of a part on which an approximate search is compared with the exact one
LOW_RECALL = 0.95


@dataclass(frozen=True)
class SearchPart:
    """Rows start..stop of merged/train as anchors, and the file for their neighbours."""

    start: int
    stop: int
    target: Path
    record: Provenance


def train_path(cfg: Config) -> Path:
    return parquet.require(cfg.paths.merged_dir / "train.parquet", "preprocess/merge_and_split.py")


def write(cfg: Config, todo: list[SearchPart], on_anchors: Callable[[int], object]) -> None:
    """Search the neighbours of each part's anchors and write its file. `on_anchors` is called with the number of
    anchors compared since the last call. Raises Stopped on a signal."""
    from common import devices  # torch, which gathering does without
    from difficulty.search import exact_search

    path = train_path(cfg)
    device = devices.pick(cfg.infrastructure.device)
    embeddings = devices.place(parquet.read_matrix(path, "embedding"), device)  # not twice on the host
    columns = parquet.read(path, ["dataset_id", "target_id", "target_lat", "target_lon"])
    dataset, target, lat, lon = (column.to_numpy() for column in columns.columns)
    near = zones.make_zones(zones.number_buildings(dataset, target), lat, lon, cfg.data.ignore_radius_m)
    vectors, k = exact_search.SearchVectors(embeddings, device), cfg.data.neighbors
    memory_mb = devices.search_memory_mb(cfg.infrastructure, device)
    exact = functools.partial(exact_search.exact_neighbors, vectors, near, k=k, memory_mb=memory_mb)
    tree = None
    if cfg.data.search == "balltree":
        from difficulty.search import balltree  # scikit-learn takes seconds to import

        tree = balltree.Tree(embeddings.cpu().numpy(), cfg.data.balltree_dim)
    for part in todo:
        rows, recall, record = np.arange(part.start, part.stop), 1.0, part.record.timed()
        if tree is None:
            neighbors, similarities = exact(rows=rows, on_anchors=on_anchors)
        else:
            neighbors, similarities = tree.neighbors(near, k, rows)
            sample = np.unique(np.linspace(0, len(rows) - 1, RECALL_SAMPLE).astype(np.int64))
            recall = balltree.recall(neighbors[sample], exact(rows=rows[sample])[0])
            on_anchors(len(rows))
        with parquet.writer(part.target, schemas.difficulty_part(k), record) as out:
            out.append({"neighbor_rows": neighbors, "neighbor_similarities": similarities})
            out.facts = {"recall": recall}
        cli.check_stop()


def refuse_missing(parts: list[SearchPart]) -> None:
    """Raise PipelineError unless all parts exist and come from this search."""
    missing = [part for part in parts if not parquet.is_done(part.target, part.record, "")]
    if missing:
        raise PipelineError(
            f"{len(missing)} of {len(parts)} parts are missing, the first is {missing[0].target}\n"
            "run the shards of difficulty/compute_visual_neighbors.py that write them, then --finish again"
        )


def gather(cfg: Config, parts: list[SearchPart], output: Output) -> list[dict]:
    """Calibrate the bands over all parts, write the artefact part by part, and report on the bands; returns their
    table."""
    from difficulty.report import band_report  # matplotlib

    counts = bands.histogram(np.empty(0))
    for *_, ratio in _read_parts(cfg, parts):
        counts += bands.histogram(ratio)
    if not np.any(counts):
        raise PipelineError(
            f"no image of {train_path(cfg)} has a neighbour outside its building and ignore zone\n"
            f"{zones.too_few_outside(cfg.data.ignore_radius_m)}"
        )
    edges = bands.edges_of(counts, cfg.data.band_percentiles)
    ids = parquet.read(train_path(cfg), ["streetview_image_id", "building_id"])
    report = band_report.Report(train_path(cfg), counts, edges)
    recalls = [parquet.read_provenance(part.target).facts["recall"] for part in parts]
    recall = float(np.average(recalls, weights=[part.stop - part.start for part in parts]))
    path, record = output.path, output.record
    with parquet.writer(path, schemas.difficulty(cfg.data.neighbors, cfg.data.num_bands), record) as out:
        for part, rows, similarities, ratio in _read_parts(cfg, parts):
            offsets = bands.offsets(ratio, edges)
            report.add(part.start, rows, similarities, offsets)
            columns = {name: ids[name].slice(part.start, len(rows)) for name in ids.column_names}
            columns |= {"neighbor_rows": rows, "neighbor_similarities": similarities.astype(np.float16)}
            out.append({**columns, "band_offsets": offsets})
        out.facts = {
            "k": cfg.data.neighbors,
            "search": cfg.data.search,
            "recall": recall,
            "band_edges": edges.tolist(),
            "bands": report.table.rows(),
            "merged_id": record.inputs[train_path(cfg).name],
        }
        report.write(files.beside(path.parent, "report"), tar_images.of_paths(cfg.paths))
    if recall < LOW_RECALL:
        name, percent = cfg.data.search, 100 * recall
        log.warning('data.search = "%s" found %.1f %% of the true neighbours; "exact" finds all', name, percent)
    return report.table.rows()


def _read_parts(cfg: Config, parts: list[SearchPart]) -> Iterator[tuple]:
    """(part, rows (n, k) int32, similarities (n, k) float32, ratios (n, k) float32) of each part."""
    for part in parts:
        columns = parquet.read(part.target)
        rows = parquet.to_matrix(columns["neighbor_rows"])
        similarities = parquet.to_matrix(columns["neighbor_similarities"])
        yield part, rows, similarities, bands.ratios(similarities, rows, cfg.data.band_reference_rank)
