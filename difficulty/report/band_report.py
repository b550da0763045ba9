"""The bands of difficulty for a person: a table, a picture of where their edges lie and of what each holds, and a
sheet of sample pairs, each anchor with a neighbour."""

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
_LABEL_WIDTH = 0.03  # of an edge's label, along its axis


class Report:
    """Gathers what it tells from the parts of a search, one after the other."""

    def __init__(self, train: Path, ratio_counts: np.ndarray, edges: np.ndarray):
        columns = parquet.read(train, ["dataset_id", "target_lat", "target_lon"])
        self.train, self.ratio_counts, self.table = train, ratio_counts, BandCounts(edges)
        self.dataset = columns["dataset_id"].to_numpy()
        self.xyz_m = geo.to_xyz_m(columns["target_lat"].to_numpy(), columns["target_lon"].to_numpy())
        self.rng = np.random.default_rng(0)
        n = len(self.dataset)
        self.sampled = np.sort(self.rng.choice(n, min(n, SAMPLED), replace=False))
        self.kept: list[tuple[np.ndarray, ...]] = []  # (anchors, rows, similarities, offsets) of the sampled

    def add(self, first: int, rows: np.ndarray, similarities: np.ndarray, offsets: np.ndarray) -> None:
        """The neighbours (n, k) and bands of the anchors first, first + 1, ..."""
        self.table.add(first, rows, similarities, offsets, self.xyz_m, self.dataset)
        anchors = self.sampled[slice(*np.searchsorted(self.sampled, [first, first + len(rows)]))]
        self.kept.append((anchors, *(of_part[anchors - first] for of_part in (rows, similarities, offsets))))

    def write(self, folder: Path, store: tar_images.TarImages) -> None:
        """bands.json, bands.png and, where the tars are there, band_pairs.png."""
        files.write_text(folder / "bands.json", json.dumps(self.table.rows(), indent=1) + "\n")
        files.write_bytes(folder / "bands.png", pictures.png(draw(self.table, self.ratio_counts)))
        sheet = folder / "band_pairs.png"
        sheet.unlink(missing_ok=True)
        lines, missing, asked = self._lines(store)
        if missing:
            log.warning("%d of %d sample images cannot be read from the tars in %s", missing, asked, store.raw_dir)
        if missing < asked:
            files.write_bytes(sheet, pictures.sheet(lines))
            log.info("look at %s: is band 0 hard, or wrong?", sheet)

    def _lines(self, store: tar_images.TarImages) -> tuple[list[pictures.Line], int, int]:
        """The sheet's lines, and how many of their images are missing, of how many."""
        anchors, rows, similarities, offsets = map(np.concatenate, zip(*self.kept, strict=True))
        pairs = choose_pairs(anchors, rows, similarities, offsets, self.rng)
        wanted = sorted({row for of_band in pairs for anchor, row, _ in of_band for row in (anchor, row)})
        places = parquet.read(self.train, ["tar_file", "image_offset", "image_size"]).take(wanted)
        small = dict(zip(wanted, pictures.read(store, places), strict=True))
        lines = []
        for facts, of_band in zip(self.table.rows(), pairs, strict=True):
            upper = " or more" if facts["ratio_to"] is None else f" to {facts['ratio_to']:.2f}"
            pairs_of = f"{facts['pairs']:,} pair{'s' * (facts['pairs'] != 1)}"
            title = f"band {facts['band']}: ratio {facts['ratio_from']:.2f}{upper}; {pairs_of}"
            both = [_side_by_side(small[anchor], small[row]) for anchor, row, _ in of_band]
            captions = [
                f"cosine {similarity:.2f}, {self._distance(anchor, row)}" for anchor, row, similarity in of_band
            ]
            lines.append(pictures.Line(title, both, captions))
        return lines, sum(image is None for image in small.values()), len(small)

    def _distance(self, a: int, b: int) -> str:
        if self.dataset[a] != self.dataset[b]:
            return "another dataset"
        return f"{np.linalg.norm(self.xyz_m[a] - self.xyz_m[b]):,.0f} m"


def choose_pairs(
    anchors: np.ndarray, rows: np.ndarray, similarities: np.ndarray, offsets: np.ndarray, rng: np.random.Generator
) -> list[list[tuple[int, int, float]]]:
    """For each band up to SHOWN random pairs (anchor, neighbour, similarity), of an anchor at most one."""
    chosen = []
    for b in range(offsets.shape[1] - 1):
        first, last = offsets[:, b].astype(int), offsets[:, b + 1].astype(int)
        there = rng.permutation(np.flatnonzero(last > first))[:SHOWN]
        places = [int(rng.integers(first[i], last[i])) for i in there]
        chosen.append(
            [
                (int(anchors[i]), int(rows[i, place]), float(similarities[i, place]))
                for i, place in zip(there, places, strict=True)
            ]
        )
    return chosen


def draw(table: BandCounts, ratio_counts: np.ndarray) -> Figure:
    """The edges among all ratios; and of each band the similarities, the distances, and what lies near."""
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    (edges, similar), (far, near) = figure.subplots(2, 2)
    names = [f"{b}" for b in range(len(table.pairs))]
    colours = pages.arm_colours(len(names))[:-1]
    _draw_edges(edges, table.edges, ratio_counts, colours)

    for b, counts in enumerate(table.similarities):
        if counts.any():
            p5, p25, p50, p75, p95 = quantiles(counts, SIMILARITIES, [0.05, 0.25, 0.5, 0.75, 0.95])
            similar.plot([b, b], [p5, p95], color=colours[b], lw=1.5)
            similar.plot([b, b], [p25, p75], color=colours[b], lw=9, solid_capstyle="butt")
            similar.plot([b - 0.2, b + 0.2], [p50, p50], color="white", lw=1.5)
    similar.set(title="similarity: median, half of the pairs, 90 % of them", xlabel="band", ylabel="cosine")
    similar.set_xticks(range(len(names)), names)

    for b, counts in enumerate(table.metres):
        if counts.any():
            far.step(
                METRES[1:], np.cumsum(counts) / counts.sum(), color=colours[b], where="post", label=f"band {b}"
            )
    far.axvline(NEAR_M, color="0.6", lw=0.8, ls="--")
    there = METRES[np.flatnonzero(table.metres.sum(axis=0))]
    if len(there):
        far.legend(fontsize=8, frameon=False)
        low, high = min(NEAR_M / 2, there[0]), 1.1 * there[-1]
        far.set(xscale="log", xlim=(low, high))
        far.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1_000 * low else (1,)))
        far.xaxis.set_major_formatter("{x:,.0f}")
        far.minorticks_off()
    far.set(title="pairs of one dataset nearer than ...", xlabel="m", ylabel="share", ylim=(0, 1))

    rows, places = table.rows(), np.arange(len(names))
    for shift, key, label, shade in (
        (-0.27, "share_within_50_m", "within 50 m", "#b30000"),
        (0, "share_same_dataset", "same dataset", "#4c78a8"),
        (0.27, "share_of_anchors_without", "anchors without any", "0.7"),
    ):
        near.bar(places + shift, [row[key] for row in rows], 0.25, label=label, color=shade)
    near.set(title="shares", xlabel="band", ylim=(0, 1.15))
    near.set_xticks(places, names)
    near.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
    for axis in (edges, similar, far, near):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_edges(axis, edges: np.ndarray, ratio_counts: np.ndarray, colours: list[str]) -> None:
    there = np.flatnonzero(ratio_counts)
    values, ratio_counts = bands.values_of(there), ratio_counts[there]
    reached = np.cumsum(ratio_counts) / max(1, ratio_counts.sum())
    low, high = (max(values[np.searchsorted(reached, share)], 1e-3) for share in (0.001, 0.999))
    bins = np.geomspace(min(low, *edges) / 1.05, max(high, *edges) * 1.05, 121)
    counts = np.histogram(values, bins, weights=ratio_counts)[0]
    middle, bounds = np.sqrt(bins[1:] * bins[:-1]), np.array([0, *edges, np.inf])
    band = np.searchsorted(bounds, middle, side="right") - 1
    axis.bar(bins[:-1], counts, np.diff(bins), align="edge", color=[colours[b] for b in band])
    for edge in edges:
        axis.axvline(edge, color="black", lw=0.7)
    axis.set(title="pairs by distance ratio, and the bands' edges", xlabel="ratio to the reference neighbour")
    axis.set(xscale="log", ylabel="pairs")
    place = np.log(edges / bins[0]) / np.log(bins[-1] / bins[0])  # 0..1 along the axis
    told = [0]
    for n in range(1, len(edges)):
        if place[n] - place[told[-1]] >= _LABEL_WIDTH:
            told.append(n)
    axis.set_xticks(edges[told], [f"{edge:.2f}" for edge in edges[told]], rotation=90, fontsize=8)
    axis.minorticks_off()


def _side_by_side(left: Image.Image | None, right: Image.Image | None) -> Image.Image:
    both = Image.new("RGB", (2 * pictures.PX + 4, pictures.PX), "white")
    for x, image in ((0, left), (pictures.PX + 4, right)):
        both.paste(image or pictures.absent(), (x, 0))
    return both
