"""Search with the published model: vectors of photographs, the nearest images of a gallery, a picture of them."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageOps

from common import files
from common.errors import PipelineError
from common.imagery.decoding import Undecodable, decode
from common.sections import Infrastructure
from generate import loop
from publish.inference.image_sources import ImageSource
from publish.inference.published_model import Published
from train.evaluation.metrics_json import read as read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger("pipeline")
_SAME = 0.999  # cosine of a row to the photograph that it was made from: float16, and another batch's rounding
MAX_COLUMNS = 8  # of the picture: no wider than a screen
VERDICTS = {True: ("same building", "#1a7f37"), False: ("another building", "#cf222e"), None: ("", "#57606a")}


class Photograph(NamedTuple):
    name: str
    encoded: bytes | None  # a JPEG, PNG, ...; None: unreadable
    box: list[int] | None = None  # left, top, right, bottom of the building in pixels; None: the whole picture
    building: str | None = None  # which one it shows, by a label; None: not known
    details: str = ""  # what else to print of it

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8, of the box alone. Raises PipelineError for what is not an image, or a box beyond it."""
        try:
            image = decode(self.encoded)
        except Undecodable as error:
            raise PipelineError(f"{self.name} cannot be read as an image: {error}") from None
        height, width = image.shape[:2]
        left, top, right, bottom = self.box or (0, 0, width, height)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise PipelineError(f"box {left},{top},{right},{bottom} is not within {self.name}, {width} x {height}")
        return image[top:bottom, left:right]


@dataclass(frozen=True)
class Nearest:
    """A query and its nearest images, most similar first."""

    query: Photograph
    results: list[tuple[Photograph, float]]  # with the cosine similarity
    gallery_size: int  # what was searched: images that could be decoded, or rows of an index
    unit: str = "images"

    def verdict(self, result: Photograph) -> tuple[str, str]:
        """Whether a result shows the query's building, as words and colour; no words where a label is missing."""
        buildings = [image.building for image in (self.query, result)]
        return VERDICTS[None if None in buildings else buildings[0] == buildings[1]]


def vector_of(published: Published, photograph: Photograph) -> np.ndarray:
    """The unit vector of a photograph, (D,) float32. Raises PipelineError, see `Photograph.pixels`."""
    pixels = published.preprocessing([photograph.pixels()], published.device)
    return published.forward(pixels.to(published.device)).float().cpu().numpy()[0]


def search(
    published: Published, query: Photograph | None, gallery: ImageSource, settings: Infrastructure, top: int
) -> Nearest:
    """The `top` images of the gallery most similar to the query, without files equal to the query's.

    Without a query: the first image of the building with the most images.
    """
    names, device = gallery.images["image"].to_pylist(), published.device
    jobs = [loop.Job(gallery.name, len(names), gallery.read)]
    progress = loop.GenerationProgress("search", "image", len(names))
    with progress:
        (result,) = loop.embed(jobs, published.forward, published.preprocessing, device, settings, progress)
    for row, why in list(result.failed.items())[:1]:
        log.warning("skipping %d images, such as %s: %s", len(result.failed), names[row], why.detail)
    if not len(result.rows):
        raise PipelineError(f"none of the {len(names):,} images of the gallery can be decoded")

    def photograph(row: int) -> Photograph:
        return Photograph(names[row], gallery.read(row, row + 1)[0], building=building(row))

    def building(row: int) -> str | None:
        return gallery.images["building"][row].as_py() if "building" in gallery.images.column_names else None

    if query is None:
        buildings = [building(row) for row in result.rows.tolist()]
        counts = Counter(building for building in buildings if building)
        first = buildings.index(counts.most_common(1)[0][0]) if counts else 0
        query = photograph(int(result.rows[first]))
    similarities = result.vectors.astype(np.float32) @ vector_of(published, query)
    order = np.argsort(-similarities, kind="stable")
    candidates = ((photograph(int(result.rows[best])), float(similarities[best])) for best in order)
    return nearest_of(query, candidates, top, len(result.rows))


def nearest_of(
    query: Photograph,
    candidates: Iterable[tuple[Photograph, float]],
    top: int,
    gallery_size: int,
    unit: str = "images",
) -> Nearest:
    """The first `top` candidates, which come with the most similar first, without the query itself; a building
    that the query is a picture of is kept."""
    others = (candidate for candidate in candidates if unit != "images" or not _is_query(query, *candidate))
    return Nearest(query, list(islice(others, top)), gallery_size, unit)


def _is_query(query: Photograph, other: Photograph, cosine: float) -> bool:
    """Whether an image is the query: by its bytes, or where they are not here by its name and its vector."""
    if other.encoded is not None:
        return other.encoded == query.encoded
    path = f"/{query.name.replace(':', '/')}"  # TAR:MEMBER; names in a table are relative to a folder or a tar
    return cosine > _SAME and path.endswith(f"/{other.name}")


def table(nearest: Nearest) -> str:
    """The results as text, a line each."""
    lines = [f"the nearest of {nearest.gallery_size:,} {nearest.unit} to {nearest.query.name}"]
    verdicts = [nearest.verdict(result)[0] for result, _ in nearest.results]
    width = max(map(len, verdicts), default=0)
    for number, ((result, cosine), words) in enumerate(zip(nearest.results, verdicts, strict=True), 1):
        verdict = [f"{words:{width}}"] if width else []
        lines.append("  ".join([f"{number:3}", f"{cosine:6.3f}", *verdict, result.name, result.details]).rstrip())
    return "\n".join(lines)


def draw(nearest: Nearest, path: Path) -> None:
    """The query and those of its results whose images could be read, as PNG; where there are labels, frame and
    words say which show the query's building."""
    panels = [(nearest.query, "query", "", "#1f2328")]
    for number, (result, cosine) in enumerate(nearest.results, 1):
        if result.encoded is not None:
            panels.append((result, f"{number}.  {cosine:.3f}", *nearest.verdict(result)))
    columns = min(len(panels), MAX_COLUMNS)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.5 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (photograph, title, words, colour) in zip(axes.flat, panels, strict=False):
        image = Image.fromarray(photograph.pixels())
        axis.imshow(ImageOps.pad(image, (320, 320), color="white"))  # the whole image, not distorted
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=12, color=colour, fontweight="bold")
        axis.set_xlabel(words, fontsize=11, color=colour)
        axis.spines[:].set(color=colour, linewidth=3)
    figure.tight_layout(w_pad=1.5)
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def percentiles_of(cosine: float, metrics: Path, evaluation: str | None = None) -> str:
    """How many of the evaluation's matches and non-matches are at least as similar, in words.

    `evaluation`: the id of the one that the model was published with, if known.
    """
    if not metrics.is_file():
        return f"(run train/evaluate.py to compare this with matches and non-matches: there is no {metrics})"
    values = read_metrics(metrics)
    if evaluation is not None and values["provenance"]["id"] != evaluation:
        return f"({metrics} is not this model's: no comparison with matches and non-matches)"
    histograms = values["similarity_histograms"]
    edges = np.array(histograms["edges"])
    above = np.clip((edges[1:] - cosine) / np.diff(edges), 0, 1)  # share of each bin
    shares = []
    for kind in ("matches", "non_matches"):
        counts = np.array(histograms[kind], np.float64)
        shares.append(counts @ above / max(counts.sum(), 1))
    return f"at least as similar: {shares[0]:.1%} of matches and {shares[1]:.2%} of non-matches in the evaluation"
