"""The vectors of buildings: means of the unit vectors of their images, which may be anywhere in the files.

N images, B buildings, D dimensions. On the held-out buildings of the demo, neither weights by distance nor leaving
out near-identical views made the mean better (docs/buildings.md).
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import cli, schemas
from common.errors import PipelineError
from common.schemas import Reject, Rejected
from publish.buildings.image_vectors import ImageVectors
from publish.retrieval.embedding_tables import EMBEDDING, UNUSABLE, unit_vectors

_SHORTEST = 1e-6  # mean of unit vectors: anything below is rounding, and no direction
_CODE = "building"  # the number of a row's building; no column that is kept is called so
_STATE_ROWS = 2**20  # of columns that may turn out to be constant, before they are merged


@dataclass(frozen=True)
class Buildings:
    """What is known of B buildings, sorted by name."""

    names: pa.Array  # string
    images: np.ndarray  # (B,) int64
    spread: np.ndarray  # (B,) float32
    vectors: np.ndarray  # (B, D) float32, of length 1
    positions: np.ndarray  # (B, 2) float64, latitude and longitude in degrees, or NaN
    splits: list[str]
    others: pa.Table  # B rows: the columns that have one value in each building
    order: np.ndarray  # (images.sum(),) int64, rows of the images by building, most typical first
    cosines: np.ndarray  # of these images to their building's vector, float32

    def __len__(self) -> int:
        return len(self.names)

    @property
    def offsets(self) -> np.ndarray:
        """(B + 1,) int64: the images of building b are order[offsets[b] : offsets[b + 1]]."""
        return np.concatenate([[0], np.cumsum(self.images)])


def aggregate(source: ImageVectors, progress: cli.Progress) -> tuple[Buildings, dict[int, Rejected]]:
    """The buildings, and the rows that count for none, with the reason. Raises PipelineError if no row counts."""
    if not sum(source.num_rows):
        raise PipelineError(f"{source.paths[0].parent} holds no rows")
    codes, names = encode(source.buildings())
    why = {}
    why[f"{source.by} is empty"] = np.flatnonzero(codes < 0)
    sums, why[UNUSABLE] = _add_up(source, codes, len(names), progress)
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    lengths = np.sqrt(np.einsum("bd,bd->b", sums, sums)) / np.maximum(counts, 1)
    kept = lengths > _SHORTEST
    why["the vectors of its building cancel out"] = np.flatnonzero(np.append(~kept, False)[codes])
    rejected = _rejected(why)
    reasons = schemas.count_reasons(rejected.values())
    if not kept.any():
        listing = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        raise PipelineError(f"none of the {len(codes):,} rows of {source.paths[0].parent} can be used: {listing}")
    progress.add(0, -len(rejected), reasons)

    codes = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1).astype(np.int32)[codes]
    if not kept.all():
        sums, counts, lengths = sums[kept], counts[kept], lengths[kept]
        names = names.filter(pa.array(kept))
    vectors = np.divide(sums, (lengths * counts)[:, None], out=sums)
    cosines = _cosines(source, codes, vectors)
    order = np.lexsort((-cosines, codes))[len(rejected) :]
    positions, splits, others = _attributes(source, codes, len(counts))
    spread = (1 - lengths).clip(0).astype(np.float32)
    return Buildings(names, counts, spread, vectors, positions, splits, others, order, cosines[order]), rejected


def _rejected(rows: dict[str, np.ndarray]) -> dict[int, Rejected]:
    """Row -> why it counts for no building, by row; from the rows of each detail, of which the first is about the
    building's name."""
    found: dict[int, Rejected] = {}
    for number, (detail, those) in enumerate(rows.items()):
        reason = Reject.VECTOR_UNUSABLE if number else Reject.BUILDING_MISSING
        found |= dict.fromkeys(those.tolist(), Rejected(reason, detail))
    return dict(sorted(found.items()))


def encode(names: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(for each row the number of its building, int32, -1 without one; the buildings' names, sorted)."""
    encoded = names.dictionary_encode().unify_dictionaries()
    found = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.string())
    by_name = pc.sort_indices(found)
    rank = np.empty(len(found), np.int32)
    rank[by_name.to_numpy()] = np.arange(len(found))
    rows = np.concatenate([np.empty(0, np.int32), *(pc.fill_null(c.indices, -1) for c in encoded.chunks)])
    return np.where(rows >= 0, np.append(rank, -1)[rows], -1).astype(np.int32), found.take(by_name)


def _add_up(
    source: ImageVectors, codes: np.ndarray, buildings: int, progress: cli.Progress
) -> tuple[np.ndarray, np.ndarray]:
    """(the sum of each building's unit vectors, (B, D) float32; the rows without a direction, whose `codes` become
    -1)."""
    sums, unusable = np.zeros((buildings, 0), np.float32), [np.empty(0, np.int64)]
    dim = None
    for number, start, batch in source.batches(EMBEDDING):
        units, usable = unit_vectors(source.paths[number], batch, start, dim)
        if units.shape[1] and dim is None:
            dim = units.shape[1]
            sums = np.zeros((buildings, dim), np.float32)
        here = codes[start : start + len(batch)]
        unusable.append(start + np.flatnonzero((here >= 0) & ~usable))
        here[~usable] = -1
        order = np.argsort(here, kind="stable")
        order = order[here[order] >= 0]
        if len(order):
            present, starts = np.unique(here[order], return_index=True)
            sums[present] += np.add.reduceat(units[order], starts, axis=0)
        progress.add(len(batch))
    return sums, np.concatenate(unusable)


def _cosines(source: ImageVectors, codes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(N,) float32, of each image to its building's vector; 0 for rows without one."""
    cosines = np.zeros(len(codes), np.float32)
    for number, start, batch in source.batches(EMBEDDING):
        units, _ = unit_vectors(source.paths[number], batch, start, vectors.shape[1])
        here = codes[start : start + len(batch)]
        cosines[start : start + len(batch)] = np.where(here >= 0, np.einsum("nd,nd->n", units, vectors[here]), 0)
    return cosines


def _attributes(source: ImageVectors, codes: np.ndarray, buildings: int) -> tuple[np.ndarray, list[str], pa.Table]:
    """(B, 2) positions, B splits, and the columns that have one value in each building, in its order."""
    known = np.zeros(buildings, np.int64)
    positions = np.zeros((buildings, 2))
    lowest = np.full(buildings, len(schemas.SPLITS) + 1)
    highest = np.full(buildings, -1)
    split_names = [*schemas.SPLITS, ""]
    kinds = {field.name: field.type for field in source.others}
    names, pending = source.others.names, [pa.table({_CODE: pa.array([], pa.int32())})]
    for number, start, batch in source.batches(*dict.fromkeys([source.by, *names, *(source.position or ())])):
        here = codes[start : start + len(batch)]
        used = np.flatnonzero(here >= 0)
        here, batch = here[used], batch.take(pa.array(used))
        np.minimum.at(lowest, here, split_names.index(source.splits[number]))
        np.maximum.at(highest, here, split_names.index(source.splits[number]))
        if source.position:
            places = np.stack([batch[name].to_numpy() for name in source.position], axis=1)
            has = np.isfinite(places).all(axis=1)
            np.add.at(positions, here[has], places[has])
            np.add.at(known, here[has], 1)
        pending.append(pa.table({_CODE: here, **{name: batch[name].cast(kinds[name]) for name in names}}))
        if sum(map(len, pending[1:])) > max(_STATE_ROWS, len(pending[0])):
            pending = [constant_columns(pending)]
            names = [name for name in pending[0].column_names if name != _CODE]
    positions /= np.where(known, known, np.nan)[:, None]
    splits = [split_names[low] if low == high else "" for low, high in zip(lowest, highest, strict=True)]
    others = constant_columns(pending).sort_by(_CODE).drop_columns(_CODE)
    return positions, splits, others


def constant_columns(tables: list[pa.Table]) -> pa.Table:
    """A row for each building in the tables, with those columns of the last that have one value in each."""
    names = tables[-1].column_names
    rows = pa.concat_tables([table.select(names) for table in tables if len(table)] or [tables[-1]])
    kept = {_CODE: rows.select([_CODE]).group_by(_CODE, use_threads=False).aggregate([])[_CODE]}
    everything = pc.CountOptions(mode="all")  # null is a value like any other
    for name in names:  # one by one: all at once take several times the memory
        if name != _CODE:
            groups = rows.select([_CODE, name]).group_by(_CODE, use_threads=False)  # in order of appearance
            found = groups.aggregate([(name, "count_distinct", everything), (name, "one")])
            if (pc.max(found[f"{name}_count_distinct"]).as_py() or 0) <= 1:
                kept[name] = found[f"{name}_one"]
    return pa.table(kept)
