"""Building-level retrieval: how well one vector per building, the mean of its images', is found.

Two searches among the gallery's buildings, each of which is the normalised mean of its images' unit vectors:
- image to building: each image of the test split. Its own building is the mean of that building's other images.
- half to half: each building of the test split, cut into two halves at random. The mean of the smaller half is
  searched for among the larger halves of all buildings. (A building of one image is its own larger half.)
Buildings in the ignore zone are junk, as in the image-level protocol (protocol.py).

Memory: the buildings' vectors, M x D x 4 bytes, on the device if that is at most two thirds of what is free there,
else on the host; the images of 8,192 rows at a time; tiles of scores within `memory_mb`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from common import devices
from common.places.zones import Zones, ranges
from train.evaluation import bootstrap, metrics
from train.evaluation.gallery import Gallery
from train.evaluation.metric_names import BUILDING_METRICS, RECALL_AT

_BLOCK_ROWS = 8_192  # images whose vectors are gathered at a time, apart from those of one larger building


class BuildingRanks(NamedTuple):
    """The rank of the own building of each query, 1 = first; ties count against it."""

    image_to_building: np.ndarray  # (Q,) int64, of the test images; 0: no other image of its building
    half_to_half: np.ndarray  # (B,) int64, of the test buildings; 0: a building of one image


def rank(
    vectors: torch.Tensor, gallery: Gallery, seed: int, memory_mb: int, device: torch.device
) -> BuildingRanks:
    """Both searches by (G, D) float32 unit vectors of the gallery's images, on the device or on the host."""
    return BuildingRanks(
        image_to_building(vectors, gallery.zones, gallery.num_queries, memory_mb, device),
        half_to_half(vectors, gallery.zones, gallery.num_queries, seed, memory_mb, device),
    )


def image_to_building(
    vectors: torch.Tensor, zones: Zones, num_queries: int, memory_mb: int, device: torch.device
) -> np.ndarray:
    """The rank of its building for each of the first `num_queries` rows, (Q,) int64; 0 if it has no other image.

    The sum of a building's vectors without the query's is its mean without the query, up to the length.
    """
    sizes, building = np.diff(zones.starts), zones.building_of_row
    means, lengths = mean_vectors(vectors, np.arange(len(vectors)), sizes, device)
    queries = np.flatnonzero(sizes[building[:num_queries]] > 1)
    ranks = np.zeros(num_queries, np.int64)
    size, width = metrics.tile_sizes(means, device, memory_mb)
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        images = vectors[torch.from_numpy(rows).to(vectors.device)].to(device)
        own = torch.from_numpy(building[rows]).to(means.device, torch.int64)
        floors = _cosines_with_others(images, means[own].to(device), lengths[own].to(device))
        scores = torch.empty((len(rows), width), device=device)
        junk = _zone_of(zones, building[rows])
        ahead, *_ = metrics.count_ahead(images, means, floors[:, None], [len(rows)], junk, scores)
        ranks[rows] = 1 + ahead[:, 0]
    return ranks


def _cosines_with_others(images: torch.Tensor, means: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The cosine of each of n images and the mean of the other images of its building, (n,). `means` (n, D), which
    is overwritten, and `lengths` (n,): of all its images, see `mean_vectors`."""
    others = means.mul_(lengths[:, None]).sub_(images)
    return (images * others).sum(dim=1) / torch.linalg.vector_norm(others, dim=1).clamp(min=1e-12)


def half_to_half(
    vectors: torch.Tensor, zones: Zones, num_queries: int, seed: int, memory_mb: int, device: torch.device
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
    smaller = smaller.cpu()  # queries go to the device tile by tile
    of_query, junk = _zone_of(zones, asked)
    is_other = junk != asked[of_query]
    found = metrics.retrieval(
        smaller,
        larger,
        query_building=asked,
        gallery_building=np.arange(len(sizes)),
        self_rows=np.full(len(asked), -1),
        junk=(np.searchsorted(of_query[is_other], np.arange(len(asked) + 1)), junk[is_other]),
        memory_mb=memory_mb,
        device=device,
    )
    ranks = np.zeros(num_buildings, np.int64)
    ranks[asked] = found.best_rank
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
