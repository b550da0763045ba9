"""What each band holds: how similar its pairs are and how far apart, to judge whether band 0 is hard or wrong."""

import numpy as np

NEAR_M = 50.0  # just beyond the ignore zone: such pairs may show one facade
SIMILARITIES = np.linspace(-1, 1, 2_001)  # edges of the histograms; quantiles are right to a bin
METRES = np.geomspace(1, 2.1e7, 801)  # to the other side of the Earth, in steps of 2 %
_HEADER = (
    *("band", "ratio", "pairs", "similarity (5-95 %)", "same dataset", "median m"),
    *("within 50 m", "anchors without"),
)


class BandCounts:
    """Counts of the pairs of each band. `xyz_m` (N, 3), `dataset` (N,): the target (geo.to_xyz_m; NaN: unknown)
    and the dataset of every row."""

    def __init__(self, edges: np.ndarray, xyz_m: np.ndarray, dataset: np.ndarray):
        bands = len(edges) + 1
        self.edges, self.xyz_m, self.dataset = edges, xyz_m, dataset
        self.pairs = np.zeros(bands, np.int64)
        self.near = np.zeros(bands, np.int64)  # within NEAR_M
        self.similarities = np.zeros((bands, len(SIMILARITIES) - 1), np.int64)
        self.together = np.zeros(bands, np.int64)  # of one dataset
        self.metres = np.zeros((bands, len(METRES) - 1), np.int64)  # of those whose positions are known
        self.empty = np.zeros(bands, np.int64)  # anchors whose band is empty
        self.anchors = 0

    def add(self, first_row: int, rows: np.ndarray, similarities: np.ndarray, offsets: np.ndarray) -> None:
        """Count the neighbours (n, k) of the anchors first_row, first_row + 1, ... by their band `offsets`."""
        anchor, place = np.nonzero(rows >= 0)
        band = (place[:, None] >= offsets[anchor, 1:]).sum(axis=1)
        neighbor, similarity = rows[anchor, place], similarities[anchor, place]
        anchor += first_row
        metres = np.linalg.norm(self.xyz_m[anchor] - self.xyz_m[neighbor], axis=1)
        together = self.dataset[anchor] == self.dataset[neighbor]
        measured = together & ~np.isnan(metres)
        self.pairs += np.bincount(band, minlength=len(self.pairs))
        self.near += np.bincount(band[metres <= NEAR_M], minlength=len(self.pairs))
        _count(self.similarities, band, similarity, SIMILARITIES)
        self.together += np.bincount(band[together], minlength=len(self.pairs))
        _count(self.metres, band[measured], metres[measured], METRES)
        self.empty += (np.diff(offsets.astype(np.int64), axis=1) == 0).sum(axis=0)
        self.anchors += len(rows)

    def rows(self) -> list[dict]:
        """A dict per band. Distances are those of pairs within one dataset: between cities they mean nothing."""
        bounds = [0.0, *map(float, self.edges), None]
        table = []
        for b, pairs in enumerate(self.pairs.tolist()):
            low, middle, high = quantiles(self.similarities[b], SIMILARITIES, [0.05, 0.5, 0.95])
            table.append(
                {
                    "band": b,
                    "ratio_from": bounds[b],
                    "ratio_to": bounds[b + 1],
                    "pairs": pairs,
                    "similarity_p5": low,
                    "similarity_median": middle,
                    "similarity_p95": high,
                    "share_same_dataset": int(self.together[b]) / max(1, pairs),
                    "median_distance_m": quantiles(self.metres[b], METRES, [0.5])[0],
                    "share_within_50_m": int(self.near[b]) / max(1, pairs),
                    "share_of_anchors_without": int(self.empty[b]) / max(1, self.anchors),
                }
            )
        return table


def quantiles(counts: np.ndarray, edges: np.ndarray, shares: list[float]) -> list[float | None]:
    """Where a histogram reaches these shares of its total, interpolated within the bin; None if it is empty."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return [None] * len(shares)
    ranks = np.array(shares) * reached[-1]
    bins = np.searchsorted(reached, ranks)
    part = 1 - (reached[bins] - ranks) / counts[bins]
    return (edges[bins] + part * (edges[bins + 1] - edges[bins])).tolist()


def as_text(table: list[dict]) -> str:
    """The table for the log."""
    lines: list[tuple[str, ...]] = [_HEADER]
    for row in table:
        upper = "..." if row["ratio_to"] is None else f"{row['ratio_to']:.2f}"
        pairs = ["", "", "", ""]
        if row["pairs"]:
            metres = "" if row["median_distance_m"] is None else f"{row['median_distance_m']:,.0f}"
            similar = f"{row['similarity_median']:.2f} ({row['similarity_p5']:.2f}-{row['similarity_p95']:.2f})"
            pairs = [similar, f"{row['share_same_dataset']:.1%}", metres, f"{row['share_within_50_m']:.1%}"]
        start = (f"{row['band']}", f"{row['ratio_from']:.2f}-{upper}", f"{row['pairs']:,}")
        lines.append((*start, *pairs, f"{row['share_of_anchors_without']:.1%}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _count(histograms: np.ndarray, band: np.ndarray, values: np.ndarray, edges: np.ndarray) -> None:
    """Add values to the histogram of their band; those beyond the edges go into the outermost bins."""
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, histograms.shape[1] - 1)
    np.add.at(histograms, (band, bins), 1)
