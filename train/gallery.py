"""What an evaluation ranks: the rows of merged/test and, as distractors, of train and val; and what it refuses.

Memory: G rows x D x 2 bytes for the embeddings and about 150 bytes a row for the other columns.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from common import parquet, provenance, zones
from common.errors import PipelineError, StaleArtefact
from common.provenance import Provenance

SPLITS = ("test", "train", "val")
COLUMNS = [
    *(
        "building_id",
        "streetview_image_id",
        "dataset_id",
        "target_id",
        "street_view_id",
        "target_lat",
        "target_lon",
    ),
    *("camera_lat", "camera_lon", "heading", "distance", "cell_id", "tar_file", "image_offset", "image_size"),
]


@dataclass(frozen=True)
class Gallery:
    """G rows, of which the first `num_queries` are test's: each of those is also a query."""

    num_queries: int
    table: pa.Table  # COLUMNS
    embeddings: np.ndarray  # (G, D) float16, raw
    zones: zones.Zones  # buildings are numbered over all rows: an id stands in one split only

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


def load(paths: list[Path], ignore_radius_m: float) -> Gallery:
    """The rows of these files, the first being test's. Raises PipelineError where an embedding is not finite."""
    sizes = [parquet.num_rows(path) for path in paths]
    tables, embeddings, end = [], None, 0
    for path in paths:
        for batch in parquet.batches(path, [*COLUMNS, "embedding"]):
            vectors = parquet.to_matrix(batch["embedding"])
            _refuse_not_finite(path, batch, vectors)
            if embeddings is None:
                embeddings = np.empty((sum(sizes), vectors.shape[1]), vectors.dtype)
            embeddings[end : end + len(vectors)] = vectors
            tables.append(batch.select(COLUMNS))
            end += len(vectors)
    if not sizes[0]:
        raise PipelineError(f"{paths[0]} has no rows: there is nothing to evaluate")
    table = pa.concat_tables(tables)
    buildings = zones.number_buildings(table["dataset_id"].to_numpy(), table["target_id"].to_numpy())
    lat, lon = table["target_lat"].to_numpy(), table["target_lon"].to_numpy()
    return Gallery(sizes[0], table, embeddings, zones.make_zones(buildings, lat, lon, ignore_radius_m))


def _refuse_not_finite(path: Path, batch: pa.Table, vectors: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        image = batch["streetview_image_id"][int(bad[0])].as_py()
        raise PipelineError(
            f"{path}: the embedding of image {image} holds NaN or infinity\n"
            "find the part in the embeddings directory that has it, and make that and the merge again"
        )


def refuse_mixture(merged_dir: Path, checkpoint_path: Path, checkpoint: dict) -> dict[str, Provenance]:
    """The records of the three splits. Raises StaleArtefact, naming both sides, unless they are of one merge and
    the checkpoint was trained on it, with embeddings of the same model."""
    known = {split: parquet.read_provenance(merged_dir / f"{split}.parquet") for split in SPLITS}
    test = known["test"]
    for split in SPLITS[1:]:
        reasons = provenance.differences(known[split], test)
        if reasons:
            raise StaleArtefact(
                f"{merged_dir}/{split}.parquet and test.parquet are of two merges: {split} {reasons[0]}\n"
                "run preprocess/merge_and_split.py again with --overwrite"
            )
    inputs = checkpoint["provenance"]["inputs"]
    for split in ("train", "val"):
        trained_on, there = inputs.get(f"{split}.parquet"), known[split].id
        if trained_on != there:
            raise StaleArtefact(
                f"{checkpoint_path} was trained on another {split}.parquet ({trained_on}) than "
                f"{merged_dir / f'{split}.parquet'} ({there})\ntrain again, or put that merge back"
            )
    ours, theirs = test.facts.get("embedding_model"), checkpoint["embedding_model"]
    if ours != theirs:
        raise StaleArtefact(
            f"{checkpoint_path} was trained on embeddings of {_told(theirs)}\n"
            f"{merged_dir / 'test.parquet'} holds embeddings of {_told(ours)}"
        )
    return known


def _told(model: dict | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted((model or {"model": "unknown"}).items()))


def refuse_leaks(merged_dir: Path) -> None:
    """Raise PipelineError if a building or a panorama of test stands in train or val too, naming one."""
    columns = ["dataset_id", "target_id", "street_view_id"]
    rows = {split: parquet.read(merged_dir / f"{split}.parquet", columns).to_pandas() for split in SPLITS}
    for split in SPLITS[1:]:
        for what, key in (("building", columns[:2]), ("panorama", [columns[0], columns[2]])):
            shared = pd.merge(rows["test"][key].drop_duplicates(), rows[split][key].drop_duplicates())
            if len(shared):
                dataset, number = shared.iloc[0]
                raise PipelineError(
                    f"{what} {dataset:04d}_{number} stands in both test.parquet and {split}.parquet of "
                    f"{merged_dir} (and {len(shared) - 1:,} more do): the figures would be too good\n"
                    "run preprocess/merge_and_split.py again with --overwrite"
                )
