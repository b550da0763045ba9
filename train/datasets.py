"""The training data, and sampling of whole batches of triplets by index arithmetic on the device.

Memory: a row of train takes D x 2 bytes for its embedding, k x 4 for its neighbours, and about 90 for the rest
(120 where targets are 4 m apart). 6 M rows, 768-d, k = 150: 9.2, 3.6 and 0.5 GB; on the device if it fits, else on
the host with a gather per batch. `training.sample_buildings` trains on a subset.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import devices, errors, parquet
from common.errors import PipelineError
from common.places import geo
from common.places.zones import Zones, make_zones, number_buildings, too_few_outside
from common.sections import Config
from train import run_record
from train.evaluation.validation import Validation
from train.linear import baselines, whitening

_COLUMNS = ["dataset_id", "target_id", "street_view_id", "target_lat", "target_lon"]


@dataclass(frozen=True)
class TrainRows:
    """The N rows that triplets are drawn from, as tensors. A building is a run of two or more rows."""

    embeddings: torch.Tensor  # (N, D) float16, raw
    neighbor_rows: torch.Tensor  # (N, k) int32, -1 where there are fewer
    band_offsets: torch.Tensor  # (N, B + 1) uint8
    building_of_row: torch.Tensor  # (N,) int64
    starts: torch.Tensor  # (M + 1,) int64
    by_panorama: torch.Tensor  # (N,) int64: rows, by building and then by panorama
    positives: torch.Tensor  # (N, 4) int32, see `positives_of`
    zone_keys: torch.Tensor  # see `random_rows`
    zone_sizes: torch.Tensor
    outside: torch.Tensor  # (M, 2) int64
    xyz_m: torch.Tensor  # (N, 3) float64: targets, see geo.to_xyz_m; NaN where not known
    zones: Zones  # on the host, for re-mining
    radius_m: float

    @property
    def num_images(self) -> int:
        return len(self.building_of_row)

    @property
    def num_bands(self) -> int:
        return self.band_offsets.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.building_of_row.device


@dataclass(frozen=True)
class TrainingData:
    """The data of a run; loaded once for any number of runs."""

    train: TrainRows
    validation: Validation
    baselines: dict[str, dict]  # see `baselines.fit`
    embedding_model: dict  # as recorded in merged/train
    inputs: dict[str, str]  # file name -> id


@dataclass(frozen=True)
class Batch:
    """A triplets, as rows of train, and the arm that each negative is credited to (B: random)."""

    anchors: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    arms: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """(3A,): anchors, positives, negatives."""
        return torch.cat([self.anchors, self.positives, self.negatives])


def load_data(cfg: Config) -> TrainingData:
    """Load merged/train, merged/val and difficulty, checked to belong together, to the training device."""
    records = run_record.inputs(cfg)
    train, val, difficulty = records
    device = devices.pick(cfg.infrastructure.device)
    embeddings, columns = parquet.read_matrix(train, "embedding"), _read_columns(train)
    buildings = number_buildings(columns["dataset_id"], columns["target_id"])
    neighbors, offsets = (parquet.read_matrix(difficulty, name) for name in ("neighbor_rows", "band_offsets"))
    if cfg.training.sample_buildings != "all":
        kept = sample_of_buildings(buildings, cfg.training.sample_buildings, cfg.global_.seed)
        neighbors, offsets = restrict(neighbors, offsets, kept)
        embeddings, columns = embeddings[kept], {name: column[kept] for name, column in columns.items()}
        buildings = number_buildings(columns["dataset_id"], columns["target_id"])
    settings, input_dim = cfg.training_model, embeddings.shape[1]
    if settings.output_dim > input_dim:
        raise PipelineError(
            f"training_model.output_dim = {settings.output_dim} exceeds the embeddings' {input_dim} dimensions; "
            "lower it"
        )
    validation = _load_validation(cfg, val, device)
    rows = make_rows(embeddings, neighbors, offsets, buildings, columns, cfg.data.ignore_radius_m, device)
    moments = whitening.stored_moments(cfg, records[train].id, rows.embeddings, buildings, device)
    return TrainingData(
        train=rows,
        validation=validation,
        baselines=baselines.fit(moments, settings, validation),
        embedding_model=records[train].facts["embedding_model"],
        inputs={path.name: record.id for path, record in records.items()},
    )


def sample_of_buildings(building_of_row: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The rows, ascending, of `count` buildings drawn at random, or of all if there are fewer."""
    chosen = np.random.default_rng(seed).permutation(int(building_of_row[-1]) + 1)[:count]
    return np.flatnonzero(np.isin(building_of_row, chosen))


def restrict(neighbors: np.ndarray, offsets: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours and band offsets restricted to the rows `kept`, and renumbered."""
    new_row = np.full(len(neighbors) + 1, -1, np.int32)  # the last entry keeps -1 at -1
    new_row[kept] = np.arange(len(kept))
    neighbors, offsets = new_row[neighbors[kept]], offsets[kept]
    remain = np.pad(np.cumsum(neighbors >= 0, axis=1), ((0, 0), (1, 0)))
    order = np.argsort(neighbors < 0, axis=1, kind="stable")
    offsets = np.take_along_axis(remain, offsets.astype(np.int64), axis=1).astype(np.uint8)
    return np.take_along_axis(neighbors, order, axis=1), offsets


def make_rows(
    embeddings: np.ndarray,
    neighbors: np.ndarray,
    offsets: np.ndarray,
    building_of_row: np.ndarray,
    columns: dict[str, np.ndarray],
    radius_m: float,
    device: torch.device,
) -> TrainRows:
    """Build the tables that batches are drawn with. Raises PipelineError if a building can have no triplet."""
    zones = make_zones(building_of_row, columns["target_lat"], columns["target_lon"], radius_m)
    starts, n = zones.starts, len(building_of_row)
    sizes = np.diff(starts)
    if sizes.min() < 2:
        raise PipelineError(
            "merged/train holds a building with a single image\n"
            f"merge again: {errors.command('preprocess/merge_and_split.py', '--overwrite')}"
        )
    panorama = columns["street_view_id"]
    by_panorama = np.lexsort((panorama, building_of_row))
    place = np.empty(n, np.int64)
    place[by_panorama] = np.arange(n)
    # whether a row is the first of its panorama in by_panorama; buildings are numbered from 0
    first = np.diff(building_of_row[by_panorama], prepend=-1) != 0
    first[1:] |= np.diff(panorama[by_panorama]) != 0
    runs = np.append(np.flatnonzero(first), n)
    run = (np.cumsum(first) - 1)[place]
    own_start, own_size = starts[building_of_row], sizes[building_of_row]
    run_start, run_size = runs[run], runs[run + 1] - runs[run]
    alone = run_size == own_size  # all images of the building are of one panorama
    skip_at, skip = np.where(alone, place, run_start), np.where(alone, 1, run_size)

    owner = np.repeat(np.arange(len(sizes)), np.diff(zones.indptr))
    zone_sizes = np.concatenate([[0], np.cumsum(sizes[zones.buildings])])
    before = zone_sizes[:-1] - zone_sizes[zones.indptr[owner]]
    zone_rows = np.diff(zone_sizes[zones.indptr])
    if (zone_rows >= n).any():
        raise PipelineError(
            f"a building and its ignore zone cover all {n:,} training images, which leaves no negatives for it\n"
            f"{too_few_outside(radius_m)}"
        )
    on_device = {
        "building_of_row": building_of_row.astype(np.int64),
        "starts": starts,
        "by_panorama": by_panorama,
        "positives": np.stack([own_start, own_size - skip, skip_at, skip], axis=1).astype(np.int32),
        "zone_keys": owner * (n + 1) + starts[zones.buildings] - before,
        "zone_sizes": zone_sizes,
        "outside": np.stack([n - zone_rows, zone_sizes[zones.indptr[:-1]]], axis=1),
        "xyz_m": geo.to_xyz_m(columns["target_lat"], columns["target_lon"]),
    }
    return TrainRows(
        embeddings=devices.place(embeddings, device),
        neighbor_rows=devices.place(neighbors, device),
        band_offsets=devices.place(offsets, device),
        zones=zones,
        radius_m=radius_m,
        **{name: torch.from_numpy(array).to(device) for name, array in on_device.items()},
    )


def gather(table: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
    """table[places] on the device of `places`, wherever the table is."""
    return table[tuple(place.to(table.device) for place in places)].to(places[0].device)


def step_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one step. Steps draw independently of one another, so a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0] >> 1)


class Sampler:
    """Draws the batch of any step. Each pass visits all buildings once, in random order, one anchor each."""

    def __init__(self, rows: TrainRows, batch_size: int, groups: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.group_of_anchor = torch.arange(batch_size, device=rows.device) * groups // batch_size
        self._orders: dict[int, torch.Tensor] = {}  # of the passes that the last batch is from

    def draw(self, step: int, arms: np.ndarray) -> Batch:
        """The triplets of a step, given the arm (G,) of each group of anchors; see `negatives_of`."""
        rows, n = self.rows, self.batch_size
        generator = torch.Generator(rows.device).manual_seed(step_seed(self.seed, step, 0))
        u = torch.rand((4, n), generator=generator, dtype=torch.float64, device=rows.device)
        buildings = self._buildings(step)
        first = rows.starts[buildings]
        anchors = first + (u[0] * (rows.starts[buildings + 1] - first)).long()
        arm_of_anchor = torch.from_numpy(arms).to(rows.device)[self.group_of_anchor]
        negatives, credited = negatives_of(rows, anchors, arm_of_anchor, u[2], u[3])
        return Batch(anchors, positives_of(rows, anchors, u[1]), negatives, credited)

    def _buildings(self, step: int) -> torch.Tensor:
        count = len(self.rows.starts) - 1
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        passes = range(first // count, (last - 1) // count + 1)
        self._orders = {p: self._orders[p] if p in self._orders else self._order(p, count) for p in passes}
        return torch.cat([self._orders[p][max(0, first - p * count) : last - p * count] for p in passes])

    def _order(self, number: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.seed, number, 1))
        return torch.randperm(count, generator=generator).to(self.rows.device)


def positives_of(rows: TrainRows, anchors: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """An image of each anchor's building from another panorama if possible, else any other image of it, chosen by
    `u` (A,), uniform in [0, 1). Columns of `rows.positives`: where the building starts in `by_panorama`, how many
    of its images are candidates, where the excluded ones (same panorama, or the row itself) start, and their
    number."""
    first, count, skip_at, skip = rows.positives[anchors].unbind(dim=1)
    place = first + (u * count).long()
    return rows.by_panorama[place + skip * (place >= skip_at)]


def negatives_of(
    rows: TrainRows, anchors: torch.Tensor, arms: torch.Tensor, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a negative of each anchor, the arm that it is credited to). Arm b < B draws from band b of the anchor's
    neighbours, or from the nearest non-empty band (the harder of two); arm B, and anchors without neighbours, draw
    at random."""
    offsets = gather(rows.band_offsets, anchors).long()  # (A, B + 1)
    sizes = offsets[:, 1:] - offsets[:, :-1]
    bands = torch.arange(rows.num_bands, device=anchors.device)
    away = (4 * bands + 1 - 4 * arms[:, None]).abs()  # of two equally near bands, the harder is nearer
    band = torch.where(sizes > 0, away, torch.iinfo(torch.int64).max).argmin(dim=1)
    is_random = (arms == rows.num_bands) | (offsets[:, -1] == 0)
    size = sizes.gather(1, band[:, None]).squeeze(1)
    rank = offsets.gather(1, band[:, None]).squeeze(1) + (u * size).long()
    near = gather(rows.neighbor_rows, anchors, rank.clamp(max=rows.neighbor_rows.shape[1] - 1)).long()
    negatives = torch.where(is_random, random_rows(rows, anchors, v), near)
    return negatives, torch.where(is_random, rows.num_bands, band)


def random_rows(rows: TrainRows, anchors: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A row outside each anchor's building and ignore zone, uniformly, chosen by `u` (A,), uniform in [0, 1).

    The zone of building b is a sorted list of runs of rows. Run j starts at S_j, after E_j rows of earlier runs,
    so S_j - E_j allowed rows precede it, and the allowed row number r comes after all runs with S_j - E_j <= r.
    `zone_keys` are b * (N + 1) + S_j - E_j, ascending over all buildings: one search serves the whole batch.
    `zone_sizes` counts the rows of all buildings' runs before each run; `outside` holds each building's number of
    allowed rows, and the rows of all runs before its first.
    """
    building = rows.building_of_row[anchors]
    count, before = rows.outside[building].unbind(dim=1)
    allowed = (u * count).long()
    keys = building * (len(rows.building_of_row) + 1) + allowed
    runs = torch.searchsorted(rows.zone_keys, keys, right=True)
    return allowed + rows.zone_sizes[runs] - before


def relations(rows: TrainRows, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positive, negative), each (len(first), len(second)) bool, for rows of train: pairs of different images of
    one building, and pairs of buildings outside each other's ignore zone."""
    (one, xyz_m), (other, other_xyz_m) = ((rows.building_of_row[r], rows.xyz_m[r]) for r in (first, second))
    same = one[:, None] == other[None, :]
    near = torch.cdist(xyz_m, other_xyz_m, compute_mode="donot_use_mm_for_euclid_dist") <= rows.radius_m
    return same & (first[:, None] != second[None, :]), ~(near | same)


def _load_validation(cfg: Config, path: Path, device: torch.device) -> Validation:
    columns = _read_columns(path)
    buildings = number_buildings(columns["dataset_id"], columns["target_id"])
    zones = make_zones(buildings, columns["target_lat"], columns["target_lon"], cfg.data.ignore_radius_m)
    count = min(cfg.training.val_max_queries, len(buildings))
    rng = np.random.default_rng(cfg.global_.seed)
    queries = np.sort(rng.choice(len(buildings), count, replace=False))
    embeddings = devices.place(parquet.read_matrix(path, "embedding"), device)
    junk = zones.rows_of(queries, own=False)
    memory_mb = devices.search_memory_mb(cfg.infrastructure, device)
    return Validation(embeddings, buildings, queries, junk, memory_mb, device)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    table = parquet.read(path, _COLUMNS)
    if not table.num_rows:
        raise PipelineError(f"{path} has no rows: check data.train_ratio and data.val_ratio, then merge again")
    return {name: table[name].to_numpy() for name in _COLUMNS}
