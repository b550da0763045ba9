"""The table of buildings, what was rejected on the way to it, and the report on its clusters, as files."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import files, parquet, schemas
from common.imagery import tar_images
from common.provenance import Provenance, digest_of
from common.schemas import Rejected
from common.sections import Paths
from generate import embedding_parts
from publish.buildings import cluster_report, vector_projection
from publish.buildings.building_clusters import Clusters
from publish.buildings.building_means import Buildings
from publish.buildings.image_vectors import ImageVectors

log = logging.getLogger("pipeline")
_BLOCK = 8_192  # buildings written at a time


def write(
    target: Path,
    buildings: Buildings,
    clusters: Clusters,
    plane: np.ndarray,
    rejected: dict[int, Rejected],
    source: ImageVectors,
    record: Provenance,
) -> None:
    """Write the table, after the rejects. `plane`: (B, 2) float32, the projection."""
    ids = source.ids()
    embedding_parts.write_rejects(target, record, rejected, ids)
    ids = pa.chunked_array([ids.combine_chunks()])  # once, not for each block
    others, offsets = buildings.others, buildings.offsets
    schema = schemas.buildings(buildings.vectors.shape[1], others.schema)
    with parquet.writer(target, schema, record) as out:
        for start in range(0, len(buildings), _BLOCK):
            block = slice(start, start + _BLOCK)
            ends = offsets[start : start + _BLOCK + 1]
            names = ids.take(pa.array(buildings.order[ends[0] : ends[-1]])).cast(pa.string()).combine_chunks()
            columns = {
                "building": buildings.names[block],
                "images": buildings.images[block],
                "spread": buildings.spread[block],
                "image_ids": pa.ListArray.from_arrays(pa.array(ends - ends[0], pa.int32()), names),
                "lat": buildings.positions[block, 0],
                "lon": buildings.positions[block, 1],
                "split": buildings.splits[block],
                "cluster": clusters.label[block],
                "cluster_similarity": clusters.similarity[block],
                "x": plane[block, 0],
                "y": plane[block, 1],
                "embedding": buildings.vectors[block],
            }
            out.append({**columns, **{name: others[name].slice(start, _BLOCK) for name in others.column_names}})
        out.rows = {"in": sum(source.num_rows), "images": len(buildings.order)}
        out.rows |= schemas.count_reasons(rejected.values())
        projected = int(np.isfinite(plane[:, 0]).sum())
        out.facts = {
            "dim": buildings.vectors.shape[1],
            "projected": projected,
            "projection": vector_projection.method(),
            "stability": clusters.stability,
            "image_similarity": round(float(buildings.cosines.mean()), 4),  # mean cosine to the building's vector
        }


def clusters_of(target: Path) -> Clusters:
    """The clusters that are in the table."""
    table = parquet.read(target, ["cluster", "cluster_similarity"])
    label, similarity = (table[name].to_numpy() for name in table.column_names)
    stability = parquet.read_provenance(target).facts["stability"]
    return Clusters(int(label.max()) + 1, label, similarity, stability)


def write_report(
    folder: Path,
    buildings: Buildings,
    clusters: Clusters,
    source: ImageVectors,
    record: Provenance,
    paths: Paths,
) -> None:
    """Write clusters.png and clusters.json, or remove a former run's if there are no clusters."""
    table, picture = folder / "clusters.json", folder / "clusters.png"
    sheet = None
    if clusters.number:
        sheet = cluster_report.sheet(buildings, clusters, source, tar_images.of_paths(paths))
        if sheet is None:
            log.warning("no pictures of the clusters: their images cannot be read from %s", paths.raw_dir)
    if sheet is not None:
        files.write_bytes(picture, sheet)
    else:
        picture.unlink(missing_ok=True)
    if not clusters.number:
        table.unlink(missing_ok=True)
        return
    content = cluster_report.figures(buildings, clusters)
    finished = record.finished(digest_of(json.dumps(content), record.stage), {"out": clusters.number})
    files.write_text(table, json.dumps({**content, "provenance": finished.to_dict()}, indent=2) + "\n")
