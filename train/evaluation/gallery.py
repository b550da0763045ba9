"""What an evaluation ranks: the rows of merged/test and, as distractors, of train and val; and what it refuses.

Memory: G rows x D x 2 bytes for the embeddings and about 150 bytes a row for the other columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from common import parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact
from common.places import zones
from common.provenance import Provenance
from common.sections import Config

TEST_FIRST = ("test", "train", "val")
COLUMNS = (
    "building_id streetview_image_id dataset_id target_id street_view_id target_lat target_lon camera_lat "
    "camera_lon heading pitch distance cell_id tar_file image_offset image_size"
).split()
_KINDS = pa.schema([schemas.merged(1).field(name) for name in COLUMNS])


@dataclass(frozen=True)
class Gallery:
    """G rows, of which the first `num_queries` are test's: each of those is also a query."""

    num_queries: int
    table: pa.Table  # COLUMNS
    embeddings: np.ndarray  # (G, D), raw, float16 (float32 where a file holds more digits)
    zones: zones.Zones  # buildings are numbered over all rows: an id stands in one split only

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


def files_of(cfg: Config) -> list[Path]:
    """The files of the splits that are ranked by evaluation.gallery, test's first."""
    names = TEST_FIRST if cfg.evaluation.gallery == "all" else TEST_FIRST[:1]
    return [cfg.paths.merged_dir / f"{name}.parquet" for name in names]


def load(paths: list[Path], ignore_radius_m: float) -> Gallery:
    """The rows of these files, the first being the queries'. Raises PipelineError where a column is missing or of
    another kind, a value is not finite, or a building's rows do not stand together."""
    tables, embeddings, start = [], None, 0
    sizes = [parquet.num_rows(path) for path in paths]
    for path in paths:
        refuse_missing_columns(path)
        for batch, vectors in _batches(path, dim=None if embeddings is None else embeddings.shape[1]):
            if embeddings is None:
                embeddings = np.empty((sum(sizes), vectors.shape[1]), vectors.dtype)
            embeddings[start : start + len(vectors)] = vectors
            tables.append(batch)
            start += len(vectors)
    if embeddings is None or not sizes[0]:
        raise PipelineError(f"{paths[0]} has no rows: there is nothing to evaluate")
    table = pa.concat_tables(tables)
    ids = table["dataset_id"].to_numpy(), table["target_id"].to_numpy()
    buildings = zones.number_buildings(*ids)
    firsts = np.flatnonzero(np.diff(buildings, prepend=-1))
    again = pd.DataFrame({"dataset": ids[0][firsts], "target": ids[1][firsts]}).duplicated().to_numpy()
    if again.any():
        building = table["building_id"][int(firsts[again.argmax()])].as_py()
        raise PipelineError(
            f"{paths[0]}: the rows of building {building} do not stand together\n"
            "sort the file by dataset_id and target_id"
        )
    lat, lon = table["target_lat"].to_numpy(), table["target_lon"].to_numpy()
    return Gallery(sizes[0], table, embeddings, zones.make_zones(buildings, lat, lon, ignore_radius_m))


def refuse_missing_columns(path: Path, columns: list[str] = COLUMNS) -> None:
    if not path.is_file():
        raise PipelineError(f"{path} does not exist, or is no file")
    with parquet.open_file(path) as file:
        missing = sorted({*columns, "embedding"} - set(file.schema_arrow.names))
    if missing:
        raise PipelineError(
            f"{path} has no column {', '.join(missing)}\n"
            "--embeddings needs the columns of merged/test.parquet, --compare streetview_image_id and embedding"
        )


def read_vectors(path: Path) -> np.ndarray:
    """The embeddings of a whole file, (N, D). Raises PipelineError where one is not finite."""
    return np.concatenate([vectors for _, vectors in _batches(path, ["streetview_image_id"])])


def _batches(
    path: Path, columns: list[str] = COLUMNS, dim: int | None = None
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The columns (without the embedding) and the embeddings (n, `dim`) of the rows of a file, some at a time."""
    for batch in parquet.batches(path, [*columns, "embedding"]):
        vectors = _matrix(path, batch, dim)
        dim = vectors.shape[1]
        yield pa.table({name: _of_our_kind(path, name, batch[name]) for name in columns}), vectors


def _of_our_kind(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the type that merged/test.parquet has it in. Other programs write, say, ids as floats."""
    floating = pa.types.is_floating(column.type)
    if column.null_count or (floating and not np.isfinite(column.to_numpy()).all()):
        raise PipelineError(f"{path}: column {name} has rows that are empty or not finite")
    kind = _KINDS.field(name).type
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PipelineError(
            f"{path}: column {name} holds {column.type}, not {kind} ({parquet.first_line(error)})"
        ) from None


def _matrix(path: Path, batch: pa.Table, dim: int | None) -> np.ndarray:
    """The embeddings of a batch, (n, D). Other programs write lists whose lengths nothing guarantees."""
    column = batch["embedding"].chunk(0)  # of a batch there is one
    kind = column.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise PipelineError(f"{path}: the column embedding holds {kind}, not lists of numbers")
    if column.null_count:
        bad = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise PipelineError(f"{path}: image {_image(batch, bad)} has no embedding")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    wanted = dim if dim is not None else lengths[0]
    bad = np.flatnonzero(lengths != wanted)
    if len(bad):
        raise PipelineError(
            f"{path}: the embedding of image {_image(batch, bad)} has {lengths[bad[0]]} dimensions, "
            f"those before it {wanted}"
        )
    if not wanted:
        raise PipelineError(f"{path}: the embeddings have no dimensions")
    flat = column.flatten()
    vectors = (flat if pa.types.is_float16(flat.type) else flat.cast(pa.float32())).to_numpy(zero_copy_only=False)
    vectors = vectors.reshape(len(batch), -1)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise PipelineError(
            f"{path}: the embedding of image {_image(batch, bad)} holds NaN or infinity\n"
            "find what it was made from, and make that and this file again"
        )
    return vectors


def _image(batch: pa.Table, rows: np.ndarray) -> str:
    return batch["streetview_image_id"][int(rows[0])].as_py()


def read_records(merged_dir: Path) -> dict[str, Provenance]:
    """The records of the three splits. Raises StaleArtefact, naming both sides, unless they are of one merge."""
    known = {split: parquet.read_provenance(merged_dir / f"{split}.parquet") for split in TEST_FIRST}
    for split in TEST_FIRST[1:]:
        reasons = provenance.differences(known[split], known["test"])
        if reasons:
            raise StaleArtefact(
                f"{merged_dir}/{split}.parquet and test.parquet are of two merges: {split} {reasons[0]}\n"
                "run preprocess/merge_and_split.py again with --overwrite"
            )
    return known


def refuse_foreign_head(
    path: Path, inputs: dict, embedding_model: dict, merged_dir: Path, known: dict[str, Provenance]
) -> None:
    """Raise StaleArtefact, naming both sides, unless the head at `path` was trained on this merge (on another one,
    images of test could be among those it saw), and on embeddings of the same model."""
    for split in ("train", "val"):
        trained_on, there = inputs.get(f"{split}.parquet"), known[split].id
        if trained_on != there:
            raise StaleArtefact(
                f"{path} was trained on another {split}.parquet ({trained_on}) than "
                f"{merged_dir / f'{split}.parquet'} ({there})\n"
                "train again, or put that merge back"
            )
    ours = known["test"].facts.get("embedding_model")
    if ours != embedding_model:
        raise StaleArtefact(
            f"{path} was trained on embeddings of {_told(embedding_model)}\n"
            f"{merged_dir / 'test.parquet'} holds embeddings of {_told(ours)}"
        )


def _told(model: dict | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted((model or {"model": "unknown"}).items()))


def refuse_leaks(merged_dir: Path) -> dict[str, dict[str, int]]:
    """Raise PipelineError, naming one, if a building or a panorama stands in two splits. Else the proof: how many
    buildings and panoramas were compared, by split."""
    columns = ["dataset_id", "target_id", "street_view_id"]
    rows = {split: parquet.read(merged_dir / f"{split}.parquet", columns).to_pandas() for split in TEST_FIRST}
    proof = {}
    for what, key in (("building", columns[:2]), ("panorama", [columns[0], columns[2]])):
        ids = {split: frame[key].drop_duplicates() for split, frame in rows.items()}
        for one, other in combinations(TEST_FIRST, 2):
            shared = pd.merge(ids[one], ids[other])
            if len(shared):
                dataset, number = shared.iloc[0]
                raise PipelineError(
                    f"{what} {dataset:04d}_{number} stands in both {one}.parquet and {other}.parquet of "
                    f"{merged_dir} (and {len(shared) - 1:,} more do): the figures would be too good\n"
                    "run preprocess/merge_and_split.py again with --overwrite"
                )
        proof[f"{what}s"] = {**{split: len(frame) for split, frame in ids.items()}, "in_two_splits": 0}
    return proof
