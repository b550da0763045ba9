"""Queries with their first results as pictures: where the trained head gains most over the raw backbone, where it
fails, and at random."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F

from common.imagery import pictures
from common.imagery.tar_images import TarImages
from common.places import geo
from train.evaluation import heads
from train.evaluation.breakdowns import heading_difference_deg
from train.evaluation.gallery import Gallery
from train.evaluation.metrics import PerQuery

QUERIES_PER_SHEET = 6
FAILURES_PER_DATASET, FAILURES = 3, 24  # at most, the latter on the sheet
PX = 320  # of a picture: a photograph of the dataset has 640
COUNTED_RESULTS = 5  # results shown, without junk
SHOWN_JUNK = 3  # at most, in addition


@dataclass(frozen=True)
class Tile:
    """One picture and its caption."""

    image_id: str
    picture: str | None  # a data URI, or None where the tar or its image cannot be read
    kind: str  # "query", "match", "wrong" or "junk"; "method", without a picture: whose results follow
    lines: tuple[str, ...]


def choose(
    shown: PerQuery, raw: PerQuery, building_of_row: np.ndarray, dataset_of_row: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Query rows of the three sheets, at most one per building in each. Among equally good queries, "best" prefers
    those that the raw backbone found last. "worst" has some of each dataset, dataset by dataset."""
    queries = np.flatnonzero(shown.has_match)
    rank, raw_rank = shown.best_rank[queries], raw.best_rank[queries]
    sorted_queries = {
        "best": queries[np.lexsort((queries, -raw_rank, rank))],
        "worst": queries[np.lexsort((queries, raw_rank, -rank))],
        "random": np.random.default_rng(seed).permutation(queries),
    }
    chosen = {name: rows[~pd.Index(building_of_row[rows]).duplicated()] for name, rows in sorted_queries.items()}
    dataset = pd.Series(dataset_of_row[chosen["worst"]])
    of_each = np.clip(FAILURES // dataset.nunique(), 1, FAILURES_PER_DATASET)
    dataset = dataset[dataset.groupby(dataset).cumcount() < of_each][:FAILURES].sort_values(kind="stable")
    worst = chosen["worst"][dataset.index]
    return {**{name: rows[:QUERIES_PER_SHEET] for name, rows in chosen.items()}, "worst": worst}


def first_results(scores: np.ndarray, gallery: Gallery, query: int) -> list[tuple[int, float, str]]:
    """(row, cosine, kind) of the gallery rows most similar to a query, up to the COUNTED_RESULTS-th that is not
    junk, and then the best match if none is among them. `scores` (G,): cosines of all rows, overwritten."""
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


def raw_scores(gallery: Gallery, queries: np.ndarray, device: torch.device) -> np.ndarray:
    """The cosines of the backbone's embeddings of `queries` (n,) and of all rows, (n, G) float32."""
    asked = heads.normalized(gallery.embeddings[queries], device)
    scores = heads.by_blocks(lambda x: F.normalize(x, dim=1) @ asked.T, gallery.embeddings, len(queries), device)
    return scores.T.cpu().numpy().copy()


def data_uri(image: Image.Image) -> str:
    """A small picture as a JPEG in a data URI."""
    small = io.BytesIO()
    image.save(small, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def make(
    store: TarImages, gallery: Gallery, vectors: torch.Tensor, name: str, per_query: dict[str, PerQuery], seed: int
) -> dict[str, list[list[Tile]]]:
    """The sheets by name: rows of tiles, each a query and then its results by the method `name`, whose `vectors`
    these are. On "best", a row of the raw backbone's results follows each."""
    shown, raw = per_query[name], per_query["raw"]
    dataset = gallery.column("dataset_id")
    chosen = choose(shown, raw, gallery.zones.building_of_row, dataset, seed)
    queries = np.unique(np.concatenate([*chosen.values()])).tolist()
    results_of = {
        query: first_results((vectors @ vectors[query]).cpu().numpy(), gallery, query) for query in queries
    }
    gained = chosen["best"] if name != "raw" else chosen["best"][:0]
    by_raw = raw_scores(gallery, gained, vectors.device)
    raw_results_of = {
        query: first_results(scores, gallery, query) for query, scores in zip(gained.tolist(), by_raw, strict=True)
    }
    found = [result for results in (*results_of.values(), *raw_results_of.values()) for result in results]
    rows = sorted({*queries, *(row for row, _, _ in found)})
    table = gallery.table.take(rows)
    facts_of = dict(zip(rows, table.to_pylist(), strict=True))
    images = pictures.read(store, table, PX)
    uri_of = {row: None if image is None else data_uri(image) for row, image in zip(rows, images, strict=True)}

    def results(query: int, found: list[tuple[int, float, str]], rank: int) -> list[Tile]:
        tiles = []
        for row, cosine, kind in found:
            where = (f"at rank {rank:,}",) if rank > COUNTED_RESULTS and kind == "match" else ()
            lines = (*where, _geometry(facts_of[query], facts_of[row]), f"cosine {cosine:.2f}")
            tiles.append(Tile(facts_of[row]["streetview_image_id"], uri_of[row], kind, lines))
        return tiles

    def rows_of(query: int) -> list[list[Tile]]:
        rank, raw_rank, matches = shown.best_rank[query], raw.best_rank[query], int(shown.num_matches[query])
        note = f"first match at {rank:,}", f"{matches} match{'es' * (matches > 1)}"
        asked = Tile(facts_of[query]["streetview_image_id"], uri_of[query], "query", note)
        of_query = [[asked, *results(query, results_of[query], rank)]]
        if query in raw_results_of:
            label = Tile("", None, "method", (f"first match at {raw_rank:,}",))
            of_query.append([label, *results(query, raw_results_of.pop(query), raw_rank)])
        return of_query

    return {name: [row for query in of.tolist() for row in rows_of(query)] for name, of in chosen.items()}


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
