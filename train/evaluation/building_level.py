"""Building-level retrieval: how well one vector per building, the mean of its images', is found.

Two searches among the gallery's buildings, each of which is the normalised mean of its images' unit vectors:
- image to building: each image of the test split. Its own building is the mean of that building's other images.
- half to half: each building of the test split, cut into two halves at random. The mean of the smaller half is
  searched for among the larger halves of all buildings. (A building of one image is its own larger half.)
Buildings in the ignore zone are junk, as in the image-level protocol (protocol.py).

Memory: the buildings' vectors, M x D x 4 bytes, on the device if that is at most two thirds of what is free there,
else on the host; the images of 8,192 rows at a time; tiles of scores within `memory_mb`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from common import cli, devices
from common.places.zones import Zones, ranges
from train.evaluation import bootstrap, metrics
from train.evaluation.gallery import Gallery
from train.evaluation.metric_names import BUILDING_METRICS, RECALL_AT

TIE = 1e-6  # cosines no further apart are equal: float32 sums of unit vectors differ by less
_BLOCK_ROWS = 8_192  # images whose vectors are gathered at a time, apart from those of one larger building


class BuildingRanks(NamedTuple):
    """The rank of the own building of each query, 1 = first; ties count against it."""

    image_to_building: np.ndarray  # (Q,) int64, of the test images; 0: no other image of its building
    half_to_half: np.ndarray  # (B,) int64, of the test buildings; 0: a building of one image


def num_rankings(gallery: Gallery) -> int:
    """How many `rank` makes: of images and of halves."""
    sizes = np.bincount(gallery.zones.building_of_row[: gallery.num_queries])
    return int((sizes[sizes > 1] + 1).sum())


def rank(
    vectors: torch.Tensor,
    gallery: Gallery,
    seed: int,
    memory_mb: int,
    device: torch.device,
    progress: cli.Progress,
) -> BuildingRanks:
    """Both searches by (G, D) float32 unit vectors of the gallery's images, on the device or on the host."""
    options = memory_mb, device, progress
    return BuildingRanks(
        image_to_building(vectors, gallery.zones, gallery.num_queries, *options),
        half_to_half(vectors, gallery.zones, gallery.num_queries, seed, *options),
    )


def image_to_building(
    vectors: torch.Tensor,
    zones: Zones,
    num_queries: int,
    memory_mb: int,
    device: torch.device,
    progress: cli.Progress,
) -> np.ndarray:
    """The rank of its building for each of the first `num_queries` rows, (Q,) int64; 0 if it has no other image.

    The sum of a building's vectors without the query's is its mean without the query, up to the length.
    """
    sizes, building = np.diff(zones.starts), zones.building_of_row
    means, lengths = mean_vectors(vectors, np.arange(len(vectors)), sizes, device)

    def of_others(images: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        others = means[own].to(device).mul_(lengths[own].to(device)[:, None]).sub_(images)
        return others.div_(torch.linalg.vector_norm(others, dim=1, keepdim=True).clamp(min=1e-12))

    rows = np.flatnonzero(sizes[building[:num_queries]] > 1)
    ranks = np.zeros(num_queries, np.int64)
    ranks[rows] = _ranks(vectors, rows, means, of_others, zones, building[rows], memory_mb, device, progress)
    return ranks


def half_to_half(
    vectors: torch.Tensor,
    zones: Zones,
    num_queries: int,
    seed: int,
    memory_mb: int,
    device: torch.device,
    progress: cli.Progress,
) -> np.ndarray:
    """The rank of its other half for each building of the first `num_queries` rows, (B,) int64; 0 for a building
    of one image."""
    starts, sizes = zones.starts, np.diff(zones.starts)
    num_buildings = int(zones.building_of_row[num_queries - 1]) + 1  # of the queries
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(vectors)), zones.building_of_row))
    halves = starts[:-1] + sizes // 2  # a building's smaller half is shuffled[start:half]
    larger, _ = mean_vectors(vectors, shuffled[ranges(halves, starts[1:])], sizes - sizes // 2, device)
    asked = np.flatnonzero(sizes[:num_buildings] > 1)
    smaller, _ = mean_vectors(vectors, shuffled[ranges(starts[asked], halves[asked])], sizes[asked] // 2, device)
    ranks = np.zeros(num_buildings, np.int64)
    ranks[asked] = _ranks(
        smaller.cpu(),  # queries go to the device tile by tile
        np.arange(len(asked)),
        larger,
        lambda _, own: larger[own].to(device),
        zones,
        asked,
        memory_mb,
        device,
        progress,
    )
    return ranks


def _ranks(
    vectors: torch.Tensor,
    rows: np.ndarray,
    means: torch.Tensor,
    matches: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    zones: Zones,
    buildings: np.ndarray,
    memory_mb: int,
    device: torch.device,
    progress: cli.Progress,
) -> np.ndarray:
    """The ranks of n matches, (n,) int64, among the `means` of the buildings outside the zones of their own.

    The queries are `rows` of `vectors`, of `buildings` (n,). `matches`: the unit vectors (t, D) that t queries
    (t, D) look for, of buildings (t,).
    """
    ranks = np.empty(len(rows), np.int64)
    size, width = metrics.tile_sizes(means, device, memory_mb)
    for start in range(0, len(rows), size):
        tile = slice(start, start + size)
        queries = vectors[torch.from_numpy(rows[tile]).to(vectors.device)].to(device)
        own = torch.from_numpy(buildings[tile]).to(means.device, torch.int64)
        # not from the product that gives the others' scores: equal vectors differ by a rounding error
        floors = (queries * matches(queries, own)).sum(dim=1) - TIE
        scores = torch.empty((len(queries), width), device=device)
        zone = _zone_of(zones, buildings[tile])
        ahead, *_ = metrics.count_ahead(queries, means, floors[:, None], [len(queries)], zone, scores)
        ranks[tile] = 1 + ahead[:, 0]
        progress.add(len(queries))
    return ranks


def mean_vectors(
    vectors: torch.Tensor, rows: np.ndarray, sizes: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised means of n groups of unit vectors, (n, D) float32, and the lengths of the groups' sums, (n,).

    `rows`: of `vectors`, those of the first group, then those of the second ...; `sizes` (n,), at least 1 each.
    Both are on the device if they fit there, else on the host.
    """
    dim, place = vectors.shape[1], device if devices.fits(4 * len(sizes) * vectors.shape[1], device) else "cpu"
    means = torch.empty((len(sizes), dim), device=place)
    for first, last, of_block in _blocks(rows, sizes):
        images = vectors[torch.from_numpy(of_block).to(vectors.device)].to(device)
        counts = torch.from_numpy(sizes[first:last]).to(device)
        means[first:last] = torch.segment_reduce(images, "sum", lengths=counts)
    lengths = torch.linalg.vector_norm(means, dim=1)
    return means.div_(lengths.clamp(min=1e-12)[:, None]), lengths


def _blocks(rows: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first, last, rows of) groups first..last-1 in turn: at most _BLOCK_ROWS rows, or one group."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        begin = ends[first] - sizes[first]
        last = max(first + 1, int(np.searchsorted(ends, begin + _BLOCK_ROWS, side="right")))
        yield first, last, rows[begin : ends[last - 1]]
        first = last


def _zone_of(zones: Zones, buildings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (place in `buildings`, building within its ignore zone, itself too), by place."""
    first, last = zones.indptr[buildings], zones.indptr[buildings + 1]
    return np.repeat(np.arange(len(buildings)), last - first), zones.buildings[ranges(first, last)].astype(
        np.int64
    )


def figures(
    ranks: dict[str, BuildingRanks],
    gallery: Gallery,
    cells: np.ndarray,
    weights: np.ndarray,
    pairs: list[tuple[str, str]],
) -> dict:
    """BUILDING_METRICS of each method's ranks, and the differences of `pairs` of methods, for metrics.json.

    `cells`: the ids of the cells that are drawn, ascending; `weights` (1 + draws, cells).
    """
    cell_id = gallery.column("cell_id")[: gallery.num_queries]
    num_buildings = len(next(iter(ranks.values())).half_to_half)
    cell_of = {"image_to_building": cell_id, "half_to_half": cell_id[gallery.zones.starts[:num_buildings]]}
    found: dict = {"buildings": len(gallery.zones.starts) - 1}
    for search, cell_ids in cell_of.items():
        of_method = {name: getattr(each, search) for name, each in ranks.items()}
        asked = next(iter(of_method.values())) > 0  # the same for all methods
        cell = np.searchsorted(cells, cell_ids[asked])
        estimates = {name: _estimates(each[asked], cell, weights) for name, each in of_method.items()}
        found[search] = {"queries": len(cell), **bootstrap.compared(estimates, pairs, BUILDING_METRICS, cell)}
    return found


def _estimates(ranks: np.ndarray, cell: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """BUILDING_METRICS of the queries' ranks in each draw, (1 + draws, metrics)."""
    hits = ranks[:, None] <= np.array(RECALL_AT[: len(BUILDING_METRICS) - 1])  # (n, k)
    means = bootstrap.means(hits.astype(np.float64), cell, weights)
    return np.column_stack([means, bootstrap.medians(ranks, cell, weights)])
