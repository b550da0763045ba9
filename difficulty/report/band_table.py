"""What lies in each band: how similar its pairs are and how far apart, for a person to judge whether band 0 is
hard or wrong."""

import numpy as np

NEAR_M = 50.0  # just beyond the ignore zone: such pairs may show one facade
SIMILARITIES = np.linspace(-1, 1, 2_001)  # edges of the histograms; quantiles are right to a bin
METRES = np.geomspace(1, 2.1e7, 801)  # to the other side of the Earth, in steps of 2 %


class BandCounts:
    """Counts of the pairs of each band; parts of a search are added one after the other."""

    def __init__(self, edges: np.ndarray):
        bands = len(edges) + 1
        self.edges = edges
        self.pairs = np.zeros(bands, np.int64)
        self.near = np.zeros(bands, np.int64)  # within NEAR_M
        self.similarities = np.zeros((bands, len(SIMILARITIES) - 1), np.int64)
        self.metres = np.zeros((bands, len(METRES) - 1), np.int64)  # of pairs of one dataset
        self.empty = np.zeros(bands, np.int64)  # anchors whose band is empty
        self.anchors = 0

    def add(
        self,
        first_row: int,
        rows: np.ndarray,
        similarities: np.ndarray,
        offsets: np.ndarray,
        xyz_m: np.ndarray,
        dataset: np.ndarray,
    ) -> None:
        """Count the neighbours (n, k) of anchors first_row, first_row + 1, ... `offsets`: their bands; `xyz_m`
        (N, 3), `dataset` (N,): the target and the dataset of every row (see geo.to_xyz_m)."""
        rank = np.arange(rows.shape[1])
        anchor, place = np.nonzero(rows >= 0)
        band = (rank[None, :, None] >= offsets[:, None, 1:]).sum(axis=2)[anchor, place]
        neighbor, similarity = rows[anchor, place], similarities[anchor, place]
        anchor += first_row
        metres = np.linalg.norm(xyz_m[anchor] - xyz_m[neighbor], axis=1)
        together = dataset[anchor] == dataset[neighbor]
        self.pairs += np.bincount(band, minlength=len(self.pairs))
        self.near += np.bincount(band, metres <= NEAR_M, len(self.pairs)).astype(np.int64)
        _count(self.similarities, band, similarity, SIMILARITIES)
        _count(self.metres, band[together], metres[together], METRES)
        self.empty += (np.diff(offsets.astype(np.int64), axis=1) == 0).sum(axis=0)
        self.anchors += len(rows)

    def rows(self) -> list[dict]:
        """A dict per band. Distances are of pairs within one dataset: between cities they mean nothing."""
        bounds = [0.0, *map(float, self.edges), None]
        found = []
        for b, pairs in enumerate(self.pairs.tolist()):
            low, middle, high = quantiles(self.similarities[b], SIMILARITIES, [0.05, 0.5, 0.95])
            together = int(self.metres[b].sum())
            found.append(
                {
                    "band": b,
                    "ratio_from": bounds[b],
                    "ratio_to": bounds[b + 1],
                    "pairs": pairs,
                    "similarity_p5": low,
                    "similarity_median": middle,
                    "similarity_p95": high,
                    "share_same_dataset": together / max(1, pairs),
                    "median_distance_m": quantiles(self.metres[b], METRES, [0.5])[0],
                    "share_within_50_m": int(self.near[b]) / max(1, pairs),
                    "share_of_anchors_without": int(self.empty[b]) / max(1, self.anchors),
                }
            )
        return found


def quantiles(counts: np.ndarray, edges: np.ndarray, shares: list[float]) -> list[float | None]:
    """Where a histogram reaches these shares of its total; None if it is empty."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return [None] * len(shares)
    wanted = np.array(shares) * reached[-1]
    bins = np.searchsorted(reached, wanted)  # what is wanted lies in these, as far on as their counts say
    part = 1 - (reached[bins] - wanted) / counts[bins]
    return (edges[bins] + part * (edges[bins + 1] - edges[bins])).tolist()


def as_text(table: list[dict]) -> str:
    """The table for the log."""
    lines = [
        "band      ratio        pairs  similarity (5-95 %)  same dataset  median m  within 50 m  anchors without"
    ]
    for row in table:
        upper = "..." if row["ratio_to"] is None else f"{row['ratio_to']:.2f}"
        columns = [f"{row['band']:4} {row['ratio_from']:5.2f}-{upper:5} {row['pairs']:11,}"]
        if row["pairs"]:
            similar = f"{row['similarity_median']:.2f} ({row['similarity_p5']:.2f}-{row['similarity_p95']:.2f})"
            metres = "" if row["median_distance_m"] is None else f"{row['median_distance_m']:,.0f}"
            columns += [f"{similar:>20} {row['share_same_dataset']:13.1%} {metres:>9}"]
            columns += [f"{row['share_within_50_m']:12.1%}"]
        else:
            columns += [" " * (20 + 1 + 13 + 1 + 9 + 1 + 12)]
        columns += [f"{row['share_of_anchors_without']:16.1%}"]
        lines.append(" ".join(columns))
    return "\n".join(lines)


def _count(histograms: np.ndarray, band: np.ndarray, values: np.ndarray, edges: np.ndarray) -> None:
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, histograms.shape[1] - 1)
    histograms += np.bincount(band * histograms.shape[1] + bins, minlength=histograms.size).reshape(
        histograms.shape
    )
