"""Queries with their first results as pictures: where the trained head is best, where it fails, and at random."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image

from common.imagery import pictures
from common.imagery.tar_images import TarImages
from common.places import geo
from train.evaluation.breakdowns import heading_difference_deg
from train.evaluation.gallery import Gallery
from train.evaluation.metrics import PerQuery

QUERIES_PER_SHEET = 6
COUNTED_RESULTS = 5  # results shown, without junk
SHOWN_JUNK = 3  # at most, in addition


@dataclass(frozen=True)
class Tile:
    """One picture and its caption."""

    image_id: str
    picture: str | None  # a data URI, or None where the tar or its image cannot be read
    kind: str  # "query", "match", "wrong" or "junk"
    lines: tuple[str, ...]


def choose(shown: PerQuery, raw: PerQuery, building_of_row: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Query rows of the three sheets, at most one per building in each. Among equally good queries, "best" prefers
    those that the raw backbone found last."""
    queries = np.flatnonzero(shown.has_match)
    rank, raw_rank = shown.best_rank[queries], raw.best_rank[queries]
    sorted_queries = {
        "best": queries[np.lexsort((queries, -raw_rank, rank))],
        "worst": queries[np.lexsort((queries, raw_rank, -rank))],
        "random": np.random.default_rng(seed).permutation(queries),
    }
    return {
        name: rows[~pd.Index(building_of_row[rows]).duplicated()][:QUERIES_PER_SHEET]
        for name, rows in sorted_queries.items()
    }


def first_results(vectors: torch.Tensor, gallery: Gallery, query: int) -> list[tuple[int, float, str]]:
    """(row, cosine, kind) of the gallery rows most similar to a query, up to the COUNTED_RESULTS-th that is not
    junk, and then the best match if none is among them."""
    scores = (vectors @ vectors[query]).cpu().numpy()  # (G,)
    scores[query] = -np.inf
    junk = gallery.zones.rows_of(np.array([query]), own=False)[1]
    own = np.flatnonzero(gallery.zones.building_of_row == gallery.zones.building_of_row[query])
    num_nearest = min(COUNTED_RESULTS + len(junk), len(scores) - 1)
    nearest = torch.topk(torch.from_numpy(scores), num_nearest).indices.numpy()
    is_junk = np.isin(nearest, junk)
    is_hidden = is_junk & (np.cumsum(is_junk) > SHOWN_JUNK)
    results_before: np.ndarray = np.cumsum(~is_junk) - ~is_junk
    rows = nearest[~is_hidden & (results_before < COUNTED_RESULTS)]
    if not np.isin(rows, own).any():
        rows = np.append(rows, own[scores[own].argmax()])
    kinds = np.select([np.isin(rows, junk), np.isin(rows, own)], ["junk", "match"], "wrong")
    return list(zip(rows.tolist(), scores[rows].tolist(), kinds.tolist(), strict=True))


def data_uri(image: Image.Image) -> str:
    """A small picture as a JPEG in a data URI."""
    small = io.BytesIO()
    image.save(small, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def make(
    store: TarImages, gallery: Gallery, vectors: torch.Tensor, shown: PerQuery, raw: PerQuery, seed: int
) -> dict[str, list[list[Tile]]]:
    """The sheets by name: rows of tiles, each a query and then its results. `vectors`: of `shown`."""
    chosen = choose(shown, raw, gallery.zones.building_of_row, seed)
    queries = np.unique(np.concatenate([*chosen.values()])).tolist()
    results_of = {query: first_results(vectors, gallery, query) for query in queries}
    rows = sorted({*queries, *(row for results in results_of.values() for row, _, _ in results)})
    table = gallery.table.take(rows)
    facts_of = dict(zip(rows, table.to_pylist(), strict=True))
    images = pictures.read(store, table)
    uri_of = {row: None if image is None else data_uri(image) for row, image in zip(rows, images, strict=True)}

    def tiles(query: int) -> list[Tile]:
        facts, rank, matches = facts_of[query], shown.best_rank[query], int(shown.num_matches[query])
        note = f"first match at {rank:,}", f"{matches} match{'es' * (matches > 1)}"
        row_of_tiles = [Tile(facts["streetview_image_id"], uri_of[query], "query", note)]
        for row, cosine, kind in results_of[query]:
            other = facts_of[row]
            where = (f"at rank {rank:,}",) if rank > COUNTED_RESULTS and kind == "match" else ()
            lines = (*where, _geometry(facts, other), f"cosine {cosine:.2f}")
            row_of_tiles.append(Tile(other["streetview_image_id"], uri_of[row], kind, lines))
        return row_of_tiles

    return {name: [tiles(query) for query in of_sheet.tolist()] for name, of_sheet in chosen.items()}


def _geometry(a: dict, b: dict) -> str:
    """The distance of two targets and the angle between the headings, as far as they are known."""
    angle = float(heading_difference_deg(a["heading"], b["heading"]))
    return ", ".join(filter(None, [_distance(a, b), "" if np.isnan(angle) else f"{angle:.0f}°"]))


def _distance(a: dict, b: dict) -> str:
    if a["dataset_id"] != b["dataset_id"]:
        return "another dataset"
    metres = geo.distance_m(a["target_lat"], a["target_lon"], b["target_lat"], b["target_lon"])
    if np.isnan(metres):
        return "no position"
    return f"{metres:,.0f} m" if metres < 10_000 else f"{metres / 1000:,.0f} km"
