"""queries.parquet: what became of each query, by each method, for a map, a join or a look at the failures."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from common import parquet, schemas
from common.provenance import Provenance
from train.evaluation.gallery import Gallery
from train.evaluation.metrics import Matches, PerQuery


def write(
    path: Path,
    record: Provenance,
    gallery: Gallery,
    matches: dict[str, Matches],
    per_query: dict[str, PerQuery],
) -> None:
    """Write a row for each query, with or without a match; `matches`, `per_query`: by method."""
    columns: dict = {
        name: gallery.table[name].slice(0, gallery.num_queries).combine_chunks()
        for name in schemas.queries([]).names
    }
    for method, of_method in matches.items():
        columns |= {f"{name}_{method}": column for name, column in _columns(of_method, gallery).items()}
        columns[f"rank_{method}"] = per_query[method].best_rank
        columns[f"map_at_r_{method}"] = per_query[method].average_precision_at_r.astype(np.float32)
    with parquet.writer(path, schemas.queries(list(matches)), record) as out:
        out.append(columns)


def _columns(matches: Matches, gallery: Gallery) -> dict:
    """The most similar match of each query, and its most similar wrong image."""
    best = np.lexsort((-matches.score, matches.query))  # each query's best first
    asked, firsts = np.unique(matches.query[best], return_index=True)
    row, score = np.full(matches.num_queries, -1), np.full(matches.num_queries, np.nan, np.float32)
    row[asked], score[asked] = matches.row[best][firsts], matches.score[best][firsts]
    has_wrong = matches.wrong_row >= 0
    return {
        "match": _ids(gallery, row),
        "match_cosine": score,
        "wrong": _ids(gallery, matches.wrong_row),
        "wrong_cosine": np.where(has_wrong, matches.wrong_score, np.float32("nan")),
    }


def _ids(gallery: Gallery, rows: np.ndarray) -> pa.Array:
    """The ids of these rows' images; "" for row -1."""
    ids = gallery.table["streetview_image_id"].take(pa.array(rows, mask=rows < 0)).combine_chunks()
    return ids.fill_null("")
