"""What the explorer shows, made directly: buildings in two cities, and their queries by two methods.

Of the methods, "trained" leaves out the four noisy dimensions of small_merge.py's vectors: it is right more often.
"""

import numpy as np
import pyarrow as pa
import small_merge

from common import files, parquet, provenance, schemas

CITY_OF_SPLIT = {"train": 88, "val": 88, "test": 89}


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def buildings_of(merged: dict) -> dict:
    """The columns of the table of buildings: means of unit vectors; every third is in no cluster."""
    rng, rows = np.random.default_rng(0), []
    for split, columns in merged.items():
        vectors, names, images = unit(columns["embedding"]), columns["building_id"], columns["streetview_image_id"]
        for name in dict.fromkeys(names):
            own = [row for row, other in enumerate(names) if other == name]
            mean = vectors[own].mean(axis=0)
            order = np.argsort(-(vectors[own] @ mean))
            length = float(np.linalg.norm(mean))
            rows.append(
                {"building": name, "images": len(own), "spread": 1 - length, "embedding": mean / length}
                | {"image_ids": [images[own[k]] for k in order], "split": split}
                | {"lat": columns["target_lat"][own[0]], "lon": columns["target_lon"][own[0]]}
                | {"cluster": len(rows) % 3 - 1, "cluster_similarity": 0.5, "dataset_id": CITY_OF_SPLIT[split]}
                | dict(zip("xy", rng.normal(size=2), strict=True))
            )
    table = {name: [row[name] for row in rows] for name in rows[0]}
    return table | {"embedding": np.array(table["embedding"], np.float32)}


def schema(dim: int) -> pa.Schema:
    text, real = ("building", "split"), ("spread", "cluster_similarity", "x", "y")
    kinds = {"image_ids": pa.list_(pa.string()), "images": pa.int64(), "lat": pa.float64(), "lon": pa.float64()}
    kinds |= dict.fromkeys(text, pa.string()) | dict.fromkeys(real, pa.float32())
    kinds |= dict.fromkeys(("cluster", "dataset_id"), pa.int32())
    return pa.schema([*kinds.items(), ("embedding", schemas.vector(pa.float32(), dim))])


def write_buildings(path, columns: dict, without: tuple[str, ...] = ()) -> None:
    made = provenance.record("aggregate_buildings", {"model.weights": "w0"}, {"test-0.parquet": "v0"})
    kinds = schema(columns["embedding"].shape[1])
    kinds = pa.schema([field for field in kinds if field.name not in without])
    with parquet.writer(path, kinds, made) as out:
        out.append({name: columns[name] for name in kinds.names})


def queries_of(columns: dict) -> dict:
    """The columns of queries.parquet, by brute force."""
    names, ids = np.array(columns["building_id"]), np.array(columns["streetview_image_id"])
    kept = (
        "streetview_image_id building_id target_lat target_lon heading distance tar_file image_offset image_size"
    )
    table = {name: columns[name] for name in [*kept.split(), "cell_id"]}
    table["dataset_id"] = np.full(len(ids), CITY_OF_SPLIT["test"], np.int32)
    embedding = columns["embedding"].astype(np.float32)
    for method, vectors in {"raw": unit(embedding), "trained": unit(embedding[:, 4:])}.items():
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -2)
        match = np.where(names[:, None] == names, cosines, -2)
        wrong = np.where(names[:, None] == names, -2, cosines)
        table[f"rank_{method}"] = 1 + (wrong >= match.max(axis=1)[:, None]).sum(axis=1)
        for kind, of_kind in {"match": match, "wrong": wrong}.items():
            table[f"{kind}_{method}"] = ids[of_kind.argmax(axis=1)].tolist()
            table[f"{kind}_cosine_{method}"] = of_kind.max(axis=1)
    return table


def write_queries(cfg, columns: dict) -> None:
    table = pa.table(columns)
    path = cfg.paths.evaluation_dir / "queries.parquet"
    inputs = {"test.parquet": "t0", "checkpoint_best.pt": "c0"}
    with parquet.writer(path, table.schema, provenance.record("evaluate", {}, inputs)) as out:
        out.append(table)


def write_published(folder, weights: str, checkpoint: str) -> None:
    made = provenance.record("convert_to_hf", {}, {"checkpoint_best.pt": checkpoint}).finished(weights, {})
    files.write_text(folder / "provenance.json", made.to_json())


def write(cfg, num_buildings: int = 40) -> tuple[dict, dict]:
    """All that publish/explore.py reads; the columns of buildings.parquet and queries.parquet."""
    merged = small_merge.write_merge(cfg, buildings=num_buildings, cells=6)
    buildings, queries = buildings_of(merged), queries_of(merged["test"])
    write_buildings(cfg.paths.buildings_dir / "buildings.parquet", buildings)
    write_queries(cfg, queries)
    write_published(cfg.paths.published_dir, "w0", "c0")  # the model of both
    return buildings, queries
