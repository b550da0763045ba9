"""Search by the published model: vectors of photographs, the nearest of a gallery, and a picture of them."""

import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageOps

from common import files
from common.cli import Progress
from common.errors import PipelineError
from common.imagery.decoding import Undecodable, decode
from common.sections import Infrastructure
from generate import loop
from preprocess.tars.labels import parse_name
from publish.inference.image_sources import ImageSource
from publish.inference.published_model import Published
from train.evaluation.metrics_json import read as read_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger("pipeline")
SHOWN_UNREADABLE = 5
MAX_COLUMNS = 8  # of the picture: wider than a screen is no use


class Photograph(NamedTuple):
    name: str
    encoded: bytes | None  # a JPEG, PNG, ...; None: cannot be read


@dataclass(frozen=True)
class Found:
    """A query and its nearest images, most similar first."""

    query: Photograph
    results: list[Photograph]
    similarities: np.ndarray  # (n,) cosine
    gallery_size: int  # images that could be decoded

    def is_match(self, number: int) -> bool | None:
        """Whether a result shows the query's building; None where the names do not tell."""
        query, result = building_of(self.query.name), building_of(self.results[number].name)
        return None if query is None or result is None else query == result


def building_of(name: str) -> str | None:
    """The building that a name tells: of "0088_12 0088_345" (building, image), or of a file of the dataset."""
    building, blank, _ = name.partition(" ")
    if blank:
        return building
    ids = parse_name(Path(name.rpartition(":")[2]).stem)
    return f"{ids.dataset_id:04d}_{ids.target_id}" if ids else None


def similarity(published: Published, first: Photograph, second: Photograph) -> float:
    """Cosine of the two vectors. Raises PipelineError for a file that is not an image."""
    a, b = (vector_of(published, photograph) for photograph in (first, second))
    return float(a @ b)


def vector_of(published: Published, photograph: Photograph) -> np.ndarray:
    """The unit vector of one photograph, (D,) float32."""
    try:
        image = decode(photograph.encoded)
    except Undecodable as error:
        raise PipelineError(f"{photograph.name} cannot be read as an image: {error}") from None
    return published.forward(published.preprocessing([image], published.device)).float().cpu().numpy()[0]


def search(
    published: Published, query: Photograph | None, gallery: ImageSource, settings: Infrastructure, top: int
) -> Found:
    """The `top` images of the gallery most like the query, files that equal the query's left out.

    Without a query: the first image of the building that has the most in the gallery.
    """
    names = gallery.names.to_pylist()
    jobs, times = [loop.Job(gallery.name, len(names), gallery.read)], loop.Times()
    forward, prepare, device = published.forward, published.preprocessing, published.device
    with Progress("search", "image", len(names)) as progress:
        (result,) = loop.embed(jobs, forward, prepare, device, settings, times, progress)
    for row, why in list(result.failed.items())[:SHOWN_UNREADABLE]:
        log.warning("%s is left out: %s", names[row], why.detail)
    if len(result.failed) > SHOWN_UNREADABLE:
        log.warning("and %s more are left out", f"{len(result.failed) - SHOWN_UNREADABLE:,}")
    if not len(result.rows):
        raise PipelineError(f"none of the {len(names):,} images of the gallery can be decoded")
    if query is None:
        row = int(result.rows[with_most_matches([names[row] for row in result.rows])])
        query = Photograph(names[row], gallery.read(row, row + 1)[0])
    similarities = result.vectors.astype(np.float32) @ vector_of(published, query)
    results, cosines = [], []
    for best in np.argsort(-similarities, kind="stable"):
        row = int(result.rows[best])
        photograph = Photograph(names[row], gallery.read(row, row + 1)[0])
        if photograph.encoded != query.encoded:
            results.append(photograph)
            cosines.append(similarities[best])
        if len(results) == top:
            break
    return Found(query, results, np.array(cosines), len(result.rows))


def with_most_matches(names: list[str]) -> int:
    """The first image of the building with the most images; the first at all where the names do not tell."""
    buildings = [building_of(name) for name in names]
    counts = Counter(building for building in buildings if building)
    return buildings.index(counts.most_common(1)[0][0]) if counts else 0


def table(found: Found) -> str:
    """The results as text, a line each."""
    words = {True: "same building", False: "another building", None: ""}
    lines = [f"the nearest of {found.gallery_size:,} images to {found.query.name}"]
    for number, (result, cosine) in enumerate(zip(found.results, found.similarities, strict=True)):
        lines.append(f"{number + 1:3}  {cosine:6.3f}  {words[found.is_match(number)]:16}  {result.name}".rstrip())
    return "\n".join(lines)


def draw(found: Found, path: Path) -> None:
    """The query and its results, as PNG; frame and words tell which show the query's building."""
    photographs = [found.query, *found.results]
    columns = min(len(photographs), MAX_COLUMNS)
    lines = -(-len(photographs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.5 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(photographs) :]:
        axis.set_axis_off()
    for number, (axis, photograph) in enumerate(zip(axes.flat, photographs, strict=False)):
        image = Image.fromarray(decode(photograph.encoded))
        axis.imshow(ImageOps.pad(image, (320, 320), color="white"))  # whole, and in its own proportions
        axis.set_xticks([])
        axis.set_yticks([])
        match = found.is_match(number - 1) if number else None
        colour = {True: "#1a7f37", False: "#cf222e", None: "#57606a"}[match] if number else "#1f2328"
        words = {True: "same building", False: "another building", None: ""}[match]
        title = f"{number}.  {found.similarities[number - 1]:.3f}" if number else "query"
        axis.set_title(title, fontsize=12, color=colour, fontweight="bold")
        axis.set_xlabel(words, fontsize=11, color=colour)
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=3)
    figure.tight_layout(w_pad=1.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    files.write_bytes(path, buffer.getvalue())


def where_it_lies(cosine: float, metrics: Path, evaluation: str | None = None) -> str:
    """A similarity among the evaluation's: which share of matches and of non-matches are as similar or more.

    `evaluation`: the id of the one that the model was published with, if that is known.
    """
    if not metrics.is_file():
        return f"(run train/evaluate.py to see where that lies among matches and non-matches: no {metrics})"
    found = read_metrics(metrics)
    if evaluation is not None and found["provenance"]["id"] != evaluation:
        return f"({metrics} is not this model's: it cannot tell where that lies among matches and non-matches)"
    histograms = found["similarity_histograms"]
    edges = np.array(histograms["edges"])
    shares = []
    for kind in ("matches", "non_matches"):
        counts = np.array(histograms[kind], np.float64)
        above = np.clip((edges[1:] - cosine) / np.diff(edges), 0, 1)  # share of each bin that lies above
        shares.append(float(counts @ above / max(counts.sum(), 1)))
    return (
        f"of the evaluation's pairs, {shares[0]:.1%} of matches and {shares[1]:.2%} of non-matches are as similar"
        " or more"
    )
