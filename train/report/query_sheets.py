"""Queries with their first results, to look at: where the trained head is best, where it fails, and at random."""

import base64
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from common.imagery import pictures
from common.imagery.tar_images import TarImages
from common.places import geo
from train.evaluation.breakdowns import heading_difference_deg
from train.evaluation.gallery import Gallery
from train.evaluation.metrics import PerQuery

QUERIES_PER_SHEET = 6
COUNTED_RESULTS = 5  # results shown, junk among them not counted
SHOWN_JUNK = 3  # at most, among them


@dataclass(frozen=True)
class Tile:
    """One picture and what stands under it."""

    image_id: str
    picture: str | None  # a data URI, or None where the tar or its image cannot be read
    kind: str  # "query", "match", "wrong" or "junk"
    lines: tuple[str, ...]


def choose(shown: PerQuery, raw: PerQuery, building_of_row: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Query rows of the three sheets, at most one of a building in each. Of equally good ones, "best" has those
    that the raw backbone found last."""
    asked = np.flatnonzero(shown.has_match)
    rank, before = shown.best_rank[asked], raw.best_rank[asked]
    orders = {
        "best": np.lexsort((asked, -before, rank)),
        "worst": np.lexsort((asked, before, -rank)),
        "random": np.random.default_rng(seed).permutation(len(asked)),
    }
    chosen = {}
    for name, order in orders.items():
        rows = asked[order]
        first_of_building = np.sort(np.unique(building_of_row[rows], return_index=True)[1])
        chosen[name] = rows[first_of_building[:QUERIES_PER_SHEET]]
    return chosen


def first_results(vectors: torch.Tensor, gallery: Gallery, query: int) -> list[tuple[int, float, str]]:
    """(row, cosine, kind) of the gallery rows most like a query, up to the COUNTED_RESULTS-th that is not junk; if
    no match is among them, the best match after them."""
    scores = vectors @ vectors[query]  # (G,)
    scores[query] = -torch.inf
    junk = set(gallery.zones.rows_of(np.array([query]), own=False)[1].tolist())
    found = torch.topk(scores, min(COUNTED_RESULTS + len(junk), len(scores) - 1))
    buildings = gallery.zones.building_of_row
    results: list[tuple[int, float, str]] = []
    seen: Counter[str] = Counter()
    for row, cosine in zip(found.indices.tolist(), found.values.tolist(), strict=True):
        kind = "junk" if row in junk else "match" if buildings[row] == buildings[query] else "wrong"
        seen[kind] += 1
        if kind != "junk" or seen[kind] <= SHOWN_JUNK:
            results.append((row, cosine, kind))
        if seen["match"] + seen["wrong"] == COUNTED_RESULTS:
            break
    if not seen["match"]:
        own = np.flatnonzero(buildings == buildings[query])
        best = int(own[int(scores[torch.from_numpy(own).to(scores.device)].argmax())])
        results.append((best, scores[best].item(), "match"))
    return results


def data_uri(image: Image.Image) -> str:
    """A small picture as a JPEG in a data URI."""
    small = io.BytesIO()
    image.save(small, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def make(
    store: TarImages, gallery: Gallery, vectors: torch.Tensor, shown: PerQuery, raw: PerQuery, seed: int
) -> dict[str, list[list[Tile]]]:
    """The sheets: for each name the rows of tiles, a query first and then its results. `vectors`: of `shown`."""
    chosen = choose(shown, raw, gallery.zones.building_of_row, seed)
    results_of = {
        query: first_results(vectors, gallery, query) for query in np.concatenate([*chosen.values()]).tolist()
    }
    wanted = sorted({*results_of, *(row for results in results_of.values() for row, _, _ in results)})
    small = pictures.read(store, gallery.table.take(wanted))
    uri_of = {row: None if image is None else data_uri(image) for row, image in zip(wanted, small, strict=True)}
    sheets: dict[str, list[list[Tile]]] = {}
    for name, queries in chosen.items():
        sheets[name] = []
        for query in queries.tolist():
            results = results_of[query]
            shown_rows = [query, *(row for row, _, _ in results)]
            rows, images = gallery.table.take(shown_rows).to_pylist(), [uri_of[row] for row in shown_rows]
            matches = int(shown.num_matches[query])
            note = f"first match at {shown.best_rank[query]:,}", f"{matches} match{'es' * (matches > 1)}"
            tiles = [Tile(rows[0]["streetview_image_id"], images[0], "query", note)]
            late = shown.best_rank[query] > COUNTED_RESULTS
            for row, image, (_, cosine, kind) in zip(rows[1:], images[1:], results, strict=True):
                where = (f"at rank {shown.best_rank[query]:,}",) if late and kind == "match" else ()
                how_far = f"{_distance(rows[0], row)}, {_degrees(rows[0], row):.0f}°"
                lines = (*where, how_far, f"cosine {cosine:.2f}")
                tiles.append(Tile(row["streetview_image_id"], image, kind, lines))
            sheets[name].append(tiles)
    return sheets


def _distance(a: dict, b: dict) -> str:
    if a["dataset_id"] != b["dataset_id"]:
        return "another dataset"
    metres = geo.distance_m(a["target_lat"], a["target_lon"], b["target_lat"], b["target_lon"])
    return f"{metres:,.0f} m" if metres < 10_000 else f"{metres / 1000:,.0f} km"


def _degrees(a: dict, b: dict) -> float:
    return float(heading_difference_deg(a["heading"], b["heading"]))
