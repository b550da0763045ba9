"""Bands of difficulty: how near a neighbour is, in units of its anchor's own k0-th neighbour.

The ratio of a neighbour of similarity s is (1 - s) / max(1 - s_k0, 1e-6). Band b holds the neighbours with
edges[b - 1] <= ratio < edges[b]; band 0 is the hardest. A band may be empty for an anchor.
"""

from dataclasses import dataclass

import numpy as np

SMALLEST_SCALE = 1e-6  # of 1 - s_k0: k0 neighbours that are copies of the anchor say nothing of its scale
NEAR_M = 50.0  # of the table's last column
_SHIFT = 12  # bits of a float32 ratio that its histogram leaves out: 11 of the 23 of its fraction are kept


def ratios(similarities: np.ndarray, rows: np.ndarray, reference_rank: int) -> np.ndarray:
    """(n, k) float32 distance ratios of neighbours sorted by similarity, inf where rows are -1. `reference_rank`
    is k0; an anchor with fewer neighbours takes its last."""
    count = (rows >= 0).sum(axis=1)
    reference = np.clip(np.minimum(count, reference_rank) - 1, 0, None)
    distances = np.maximum(1 - similarities.astype(np.float32), 0)
    scale = np.maximum(distances[np.arange(len(rows)), reference], SMALLEST_SCALE)
    return np.where(rows >= 0, distances / scale[:, None], np.float32(np.inf))


def histogram(ratio: np.ndarray) -> np.ndarray:
    """How many finite ratios have which leading bits (a float's bits grow with it): add up those of all parts."""
    bits = np.ascontiguousarray(ratio[np.isfinite(ratio)], np.float32).view(np.uint32) >> _SHIFT
    return np.bincount(bits, minlength=1 << (32 - _SHIFT))


def edges_of(counts: np.ndarray, percentiles: list[float]) -> np.ndarray:
    """The edges (B - 1,) float32 at these percentiles of a histogram, at most one part in 2048 too high."""
    reached = np.cumsum(counts)
    wanted = np.asarray(percentiles) / 100 * reached[-1]
    bins = np.searchsorted(reached, np.maximum(wanted, 1)) + 1  # + 1: a bin's upper end
    return (np.minimum(bins, len(counts) - 1).astype(np.uint32) << _SHIFT).view(np.float32)


def offsets(ratio: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n, B + 1) uint8: band b of an anchor is its neighbours offsets[b]:offsets[b + 1]."""
    columns = [np.zeros(len(ratio), np.int64)]
    columns += [(ratio < edge).sum(axis=1) for edge in edges]
    columns.append(np.isfinite(ratio).sum(axis=1))
    return np.stack(columns, axis=1).astype(np.uint8)


@dataclass
class Table:
    """Sums over the pairs of each band, for a person to see what the bands hold."""

    edges: np.ndarray
    sums: np.ndarray  # (4, B): pairs, similarity, metres, pairs within NEAR_M
    empty: np.ndarray  # (B,): anchors whose band is empty
    anchors: int = 0

    @staticmethod
    def of(edges: np.ndarray) -> "Table":
        return Table(edges, np.zeros((4, len(edges) + 1)), np.zeros(len(edges) + 1, np.int64))

    def add(
        self, first_row: int, rows: np.ndarray, similarities: np.ndarray, bands: np.ndarray, xyz_m: np.ndarray
    ):
        """Count the neighbours (n, k) of anchors first_row, first_row + 1, ... `bands`: their offsets; `xyz_m`
        (N, 3): the targets of all rows (see geo.to_xyz_m)."""
        rank = np.arange(rows.shape[1])
        anchor, place = np.nonzero(rows >= 0)
        band = (rank[None, :, None] >= bands[:, None, 1:]).sum(axis=2)[anchor, place]
        metres = np.linalg.norm(xyz_m[anchor + first_row] - xyz_m[rows[anchor, place]], axis=1)
        for i, weights in enumerate((None, similarities[anchor, place], metres, metres <= NEAR_M)):
            self.sums[i] += np.bincount(band, weights, minlength=len(self.empty))
        self.empty += (np.diff(bands.astype(np.int64), axis=1) == 0).sum(axis=0)
        self.anchors += len(rows)

    def rows(self) -> list[dict]:
        """A dict per band: its edges, pairs, means, and the share of anchors that have none of it."""
        pairs, *others = self.sums
        means = [column / np.maximum(pairs, 1) for column in others]
        bounds = [0.0, *map(float, self.edges), float(np.finfo(np.float32).max)]
        return [
            {
                "band": b,
                "ratio_from": bounds[b],
                "ratio_to": bounds[b + 1],
                "pairs": int(pairs[b]),
                "mean_similarity": float(means[0][b]),
                "mean_distance_m": float(means[1][b]),
                "share_within_50_m": float(means[2][b]),
                "share_of_anchors_without": float(self.empty[b] / max(1, self.anchors)),
            }
            for b in range(len(self.empty))
        ]


def as_text(table: list[dict]) -> str:
    """The table for the log."""
    lines = ["band      ratio      pairs  similarity  distance m  within 50 m  anchors without"]
    for row in table:
        upper = f"{row['ratio_to']:.2f}" if row is not table[-1] else "..."
        columns = [
            f"{row['band']:4} {row['ratio_from']:5.2f}-{upper:5} {row['pairs']:9,}",
            f"{row['mean_similarity']:11.3f} {row['mean_distance_m']:11,.0f}",
            f"{row['share_within_50_m']:12.1%} {row['share_of_anchors_without']:16.1%}",
        ]
        lines.append(" ".join(columns))
    return "\n".join(lines)
