"""The bands of difficulty as pictures: where their edges lie and what each holds, and a sheet of sample pairs,
each an anchor beside its neighbour."""

import json
import logging
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from common import files, pages, parquet
from common.imagery import pictures, tar_images
from common.places import geo
from difficulty import bands
from difficulty.report.band_table import METRES, NEAR_M, SIMILARITIES, BandCounts, quantiles

log = logging.getLogger("pipeline")
SAMPLED = 4_096  # anchors that the pairs of the sheet are drawn from
SHOWN = 5  # pairs of a band
_LABEL_WIDTH = 0.03  # of an edge's label, as a share of its axis


class Report:
    """Collects the parts of a search, then draws them."""

    def __init__(self, train: Path, ratio_counts: np.ndarray, edges: np.ndarray):
        columns = parquet.read(train, ["dataset_id", "target_lat", "target_lon"])
        xyz_m = geo.to_xyz_m(columns["target_lat"].to_numpy(), columns["target_lon"].to_numpy())
        self.train, self.ratio_counts = train, ratio_counts
        self.table = BandCounts(edges, xyz_m, columns["dataset_id"].to_numpy())
        self.rng = np.random.default_rng(0)
        self.sampled = np.sort(self.rng.choice(len(xyz_m), min(len(xyz_m), SAMPLED), replace=False))
        self.kept: list[tuple[np.ndarray, ...]] = []  # (anchors, rows, similarities, offsets) of the sampled

    def add(self, first: int, rows: np.ndarray, similarities: np.ndarray, offsets: np.ndarray) -> None:
        """Add the neighbours (n, k) and the bands of the anchors first, first + 1, ..."""
        self.table.add(first, rows, similarities, offsets)
        anchors = self.sampled[slice(*np.searchsorted(self.sampled, [first, first + len(rows)]))]
        self.kept.append((anchors, *(array[anchors - first] for array in (rows, similarities, offsets))))

    def write(self, folder: Path, store: tar_images.TarImages) -> None:
        """Write bands.json, bands.png and, if the tars are available, band_pairs.png."""
        files.write_text(folder / "bands.json", json.dumps(self.table.rows(), indent=1) + "\n")
        files.write_bytes(folder / "bands.png", pictures.png(draw(self.table, self.ratio_counts)))
        sheet = folder / "band_pairs.png"
        sheet.unlink(missing_ok=True)
        anchors, rows, similarities, offsets = map(np.concatenate, zip(*self.kept, strict=True))
        pairs = choose_pairs(anchors, rows, similarities, offsets, self.rng)
        shown = sorted({row for of_band in pairs for anchor, row, _ in of_band for row in (anchor, row)})
        places = parquet.read(self.train, ["tar_file", "image_offset", "image_size"]).take(shown)
        images = dict(zip(shown, pictures.read(store, places), strict=True))
        missing = sum(image is None for image in images.values())
        if missing:
            log.warning(
                "%d of %d sample images cannot be read: their tars or files are missing", missing, len(images)
            )
        if missing < len(images):
            files.write_bytes(sheet, pictures.sheet(self._lines(pairs, images)))
            log.info("look at %s: is band 0 hard, or wrong?", sheet)

    def _lines(self, pairs: list[list[tuple]], images: dict[int, Image.Image | None]) -> list[pictures.Line]:
        lines = []
        for facts, of_band in zip(self.table.rows(), pairs, strict=True):
            upper = " or more" if facts["ratio_to"] is None else f" to {facts['ratio_to']:.2f}"
            count = f"{facts['pairs']:,} pair{'s' * (facts['pairs'] != 1)}"
            title = f"band {facts['band']}: ratio {facts['ratio_from']:.2f}{upper}; {count}"
            both = [_side_by_side(images[anchor], images[row]) for anchor, row, _ in of_band]
            captions = [f"cosine {cosine:.2f}, {self._distance(anchor, row)}" for anchor, row, cosine in of_band]
            lines.append(pictures.Line(title, both, captions))
        return lines

    def _distance(self, a: int, b: int) -> str:
        if self.table.dataset[a] != self.table.dataset[b]:
            return "another dataset"
        if np.isnan(self.table.xyz_m[[a, b]]).any():
            return "no positions"
        return f"{np.linalg.norm(self.table.xyz_m[a] - self.table.xyz_m[b]):,.0f} m"


def choose_pairs(
    anchors: np.ndarray, rows: np.ndarray, similarities: np.ndarray, offsets: np.ndarray, rng: np.random.Generator
) -> list[list[tuple[int, int, float]]]:
    """For each band up to SHOWN random pairs (anchor, neighbour, similarity), at most one per anchor."""
    chosen = []
    for first, last in zip(offsets.T[:-1].astype(int), offsets.T[1:].astype(int), strict=True):
        some = rng.permutation(np.flatnonzero(last > first))[:SHOWN]
        places = rng.integers(first[some], last[some])
        picked = (anchors[some], rows[some, places], similarities[some, places])
        chosen.append(list(zip(*(column.tolist() for column in picked), strict=True)))
    return chosen


def draw(table: BandCounts, ratio_counts: np.ndarray) -> Figure:
    """Four panels: the edges among all ratios; the similarities, the distances, and shares of each band.

    Similarities may rise in the last bands, whose pairs are of fewer anchors: among the k neighbours that were
    searched, a high ratio is reached only where the reference neighbour is very similar; so are the others.
    """
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    (edges, similar), (far, near) = figure.subplots(2, 2)
    numbers = range(len(table.pairs))
    colours = pages.arm_colours(len(numbers))[:-1]
    _draw_edges(edges, table.edges, ratio_counts, colours)
    _draw_similarities(similar, table, colours)
    _draw_distances(far, table, colours)

    rows = table.rows()
    for shift, key, label, shade in (
        (-0.27, "share_within_50_m", "within 50 m", pages.VERMILLION),
        (0, "share_same_dataset", "same dataset", pages.BLUE),
        (0.27, "share_of_anchors_without", "anchors without any", pages.GREY),
    ):
        near.bar([b + shift for b in numbers], [row[key] for row in rows], 0.25, label=label, color=shade)
    near.set(title="shares", xlabel="band", ylim=(0, 1.15), xticks=numbers)
    near.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
    for axis in (edges, similar, far, near):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_edges(axis, edges: np.ndarray, ratio_counts: np.ndarray, colours: list[str]) -> None:
    filled = np.flatnonzero(ratio_counts)
    values, ratio_counts = bands.values_of(filled), ratio_counts[filled]
    reached = np.cumsum(ratio_counts) / ratio_counts.sum()
    low, high = (max(values[np.searchsorted(reached, share)], 1e-3) for share in (0.001, 0.999))
    bins = np.geomspace(min(low, *edges) / 1.05, max(high, *edges) * 1.05, 121)
    counts = np.histogram(values, bins, weights=ratio_counts)[0]
    band = np.searchsorted(edges, np.sqrt(bins[1:] * bins[:-1]), side="right")
    axis.bar(bins[:-1], counts, np.diff(bins), align="edge", color=[colours[b] for b in band])
    for edge in edges:
        axis.axvline(edge, color="black", lw=0.7)
    axis.set(title="pairs by distance ratio, and the bands' edges", xscale="log", ylabel="pairs")
    axis.set_xlabel(
        "cosine distance / that of the anchor's reference neighbour\n"
        "(the spike at 1: the reference neighbours themselves)"
    )
    place = np.log(edges / bins[0]) / np.log(bins[-1] / bins[0])  # 0..1 along the axis
    labelled = [0]
    for n in range(1, len(edges)):
        if place[n] - place[labelled[-1]] >= _LABEL_WIDTH:
            labelled.append(n)
    axis.set_xticks(edges[labelled], [f"{edge:.2f}" for edge in edges[labelled]], rotation=90, fontsize=8)
    axis.minorticks_off()


def _draw_similarities(axis, table: BandCounts, colours: list[str]) -> None:
    for b, counts in enumerate(table.similarities):
        if counts.any():
            p5, p25, p50, p75, p95 = quantiles(counts, SIMILARITIES, [0.05, 0.25, 0.5, 0.75, 0.95])
            axis.plot([b, b], [p5, p95], color=colours[b], lw=1.5)
            axis.plot([b, b], [p25, p75], color=colours[b], lw=9, solid_capstyle="butt")
            axis.plot([b - 0.2, b + 0.2], [p50, p50], color="white", lw=1.5)
    axis.set(title="similarity: median, half of the pairs, 90 % of them", ylabel="cosine")
    axis.set_xlabel("band\n(the last ones: only anchors with very similar neighbours)")
    axis.set_xticks(range(len(colours)))


def _draw_distances(axis, table: BandCounts, colours: list[str]) -> None:
    for b, counts in enumerate(table.metres):
        if counts.any():
            share = np.cumsum(counts) / counts.sum()
            axis.step(METRES[1:], share, color=colours[b], where="post", label=f"band {b}")
    axis.axvline(NEAR_M, color="0.6", lw=0.8, ls="--")
    filled = METRES[np.flatnonzero(table.metres.sum(axis=0))]
    if len(filled):
        axis.legend(fontsize=8, frameon=False)
        low, high = min(NEAR_M / 2, filled[0]), 1.1 * filled[-1]
        axis.set(xscale="log", xlim=(low, high))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1_000 * low else (1,)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    axis.set(title="pairs of one dataset nearer than ...", xlabel="m", ylabel="share", ylim=(0, 1))


def _side_by_side(left: Image.Image | None, right: Image.Image | None) -> Image.Image:
    both = Image.new("RGB", (2 * pictures.PX + 4, pictures.PX), "white")
    for x, image in ((0, left), (pictures.PX + 4, right)):
        both.paste(image or pictures.absent(), (x, 0))
    return both
