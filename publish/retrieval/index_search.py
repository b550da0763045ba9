"""A photograph searched for in an index, with what is known of the rows that are found."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.errors import PipelineError, first_line
from common.imagery.tar_images import TarImages
from publish.inference import image_sources, photo_search
from publish.inference.photo_search import Nearest, Photograph
from publish.inference.published_model import Published
from publish.inference.vector_tables import LOCATION
from publish.retrieval.vector_index import VectorIndex

log = logging.getLogger("pipeline")
IMAGE_IDS = "image_ids"  # a column of tables of buildings
_NAMES = ("image", "streetview_image_id", "building", "building_id")  # columns: the first there names the row
_DETAILS = ("building_id", "images")  # printed of a row, where known, and the position
_SPARE = 8  # rows beyond those shown, in place of copies of the query


class RowImages:
    """Reads the images of rows: out of the dataset's tars, or files below a folder."""

    def __init__(self, store: TarImages, folder: Path | None, tables: Iterable[Path] = ()):
        """`tables`: Parquet files in which the images of buildings are looked up, unless there is a folder."""
        self._store, self._folder, self._tables, self._has_failed = store, folder, tables, False

    def located(self, rows: list[dict]) -> list[dict]:
        """Rows of buildings with the place of their most typical image, as far as the tables have it."""
        firsts = [next(iter(row.get(IMAGE_IDS) or []), None) for row in rows]
        wanted = {str(first) for first in firsts if first is not None}
        if self._folder or not wanted:
            return rows
        places = image_sources.find_rows(self._tables, wanted, sorted(LOCATION))
        return [row | places.get(str(first), {}) for row, first in zip(rows, firsts, strict=True)]

    def read(self, row: dict) -> bytes | None:
        """An encoded image; None if it is not here, with a warning for the first that should be."""
        try:
            return image_sources.read_row(row, self._store, self._folder)
        except PipelineError as error:
            if not self._has_failed:
                log.warning("some images cannot be read: %s", first_line(error))
            self._has_failed = True
            return None


def nearest(
    published: Published,
    query: Photograph,
    index: VectorIndex,
    mask: np.ndarray | None,
    images: RowImages,
    labels: dict[str, str] | None,
    top: int,
) -> Nearest:
    """The `top` rows of the index most similar to the query, without images equal to it. `mask` (n,) bool: the
    rows to look at; `labels`: image -> building, of the query, too; without, the query's is the dataset's."""
    mask = index.usable if mask is None else mask
    vector = photo_search.vector_of(published, query)
    cosines, rows = index.search(vector[None], top + _SPARE, mask, published.device)
    is_found = rows[0] >= 0
    found, cosines = rows[0][is_found], cosines[0][is_found]

    def candidates() -> Iterator[tuple[Photograph, float]]:
        for number, row, cosine in zip(found, images.located(index.take(found)), cosines, strict=True):
            name = name_of(row, int(number))
            building = building_of(row, index.by, name, labels)
            yield Photograph(name, images.read(row), None, building, details_of(row, name)), float(cosine)

    unit = "buildings" if IMAGE_IDS in index.columns else "images"
    searched = len(index.vectors) if mask is None else int(mask.sum())
    return photo_search.nearest_of(query, candidates(), top, searched, unit)


def name_of(row: dict, number: int) -> str:
    """What a row is called: a building's name, of an image the first of its columns _NAMES, or else its number."""
    names = ("building",) if IMAGE_IDS in row else _NAMES
    return next((str(row[name]) for name in names if row.get(name) is not None), f"row {number}")


def building_of(row: dict, by: str | None, name: str, labels: dict[str, str] | None) -> str | None:
    """The building of a row, in the terms in which the query's is named: those of the user's `labels`, or else ids
    of the dataset. `by`: what `building` is in a table of buildings, if known. None: not known."""
    if labels is not None:
        return str(row["building"]) if IMAGE_IDS in row else labels.get(name)
    own = row.get("building") if by == "building_id" else row.get("building_id")
    return None if own is None else str(own)


def details_of(row: dict, name: str) -> str:
    """What else to print of a row: building_id=0088_3 lat=48.85837 lon=2.29448."""
    position = ("lat", "lon") if row.get("lat") is not None else ("target_lat", "target_lon")
    keys = [key for key in (*_DETAILS, *position) if row.get(key) is not None]
    values = {key: row[key] for key in keys if str(row[key]) != name}
    texts = {key: f"{value:.5f}" if isinstance(value, float) else value for key, value in values.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items() if text != "nan")
