"""publish/aggregate_buildings.py. Oracles: pandas and plain numpy, one building at a time; planted clusters."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import adjusted_rand_score

from common import config, files, parquet, provenance, schemas
from common.errors import ConfigError, PipelineError, StaleArtefact
from publish import aggregate_buildings
from publish.buildings import building_clusters, building_means, image_vectors, vector_projection

DIM = 8


@pytest.fixture
def unprojected(monkeypatch):
    """As where openTSNE is not installed."""
    monkeypatch.setattr(vector_projection, "method", lambda: None)


@pytest.fixture
def run(tmp_path, unprojected):
    """Aggregate tables, a file each, into a table of buildings."""

    def run(*tables: dict | pd.DataFrame, by="building_id", flags=("--clusters", "0")) -> pa.Table:
        (tmp_path / "in").mkdir(exist_ok=True)
        for number, columns in enumerate(tables):
            table = pa.table(columns) if isinstance(columns, dict) else pa.Table.from_pandas(columns)
            pq.write_table(table, tmp_path / "in" / f"{number}.parquet", row_group_size=50)
        command = [str(tmp_path / "in"), str(tmp_path / "out"), "--by", by, *flags]
        assert aggregate_buildings.main([*command, "--set", f"paths.root={tmp_path}"]) == 0
        return parquet.read(tmp_path / "out" / "buildings.parquet")

    return run


def images(seed: int, count: int, buildings: int) -> pd.DataFrame:
    """Images of buildings in no order; some vectors and names are missing or unusable."""
    rng = np.random.default_rng(seed)
    building = rng.integers(0, buildings, count)
    vectors = list(rng.normal(size=(buildings, DIM))[building] + rng.normal(size=(count, DIM)))
    vectors[3], vectors[5], vectors[7] = np.zeros(DIM), np.full(DIM, np.inf), None
    names = [f"b{number}" for number in building]
    names[11], names[13] = None, ""
    lat = np.where((building % 5 > 0) & (np.arange(count) % 3 > 0), 40 + rng.normal(size=count), np.nan)
    return pd.DataFrame(
        {
            "building_id": names,
            "streetview_image_id": [f"{seed}_{number}" for number in range(count)],
            "city": (building % 3).astype(np.int32),  # one value in each building
            "street": [f"s{number % 7}" if number % 4 else None for number in building],  # the same, or none
            "camera": np.arange(count) % 2,  # not so
            "floors": [3 if number % 2 else None for number in range(count)],  # nor this: not of all images
            "target_lat": lat,
            "target_lon": lat - 100,
            "embedding": vectors,
        }
    )


def aggregated(frame: pd.DataFrame) -> dict[str, dict]:
    """The oracle: each building by itself, in float64."""
    usable = [
        v is not None and bool(np.isfinite(v).all()) and bool(np.linalg.norm(v) > 0) for v in frame["embedding"]
    ]
    found = {}
    for name, rows in frame[usable].groupby("building_id"):
        units = np.stack([v / np.linalg.norm(v) for v in rows["embedding"]])
        mean = units.mean(axis=0)
        length = np.linalg.norm(mean)
        order = np.argsort(-(units @ mean), kind="stable")
        found[name] = {
            "images": len(rows),
            "spread": 1 - length,
            "embedding": mean / length,
            "image_ids": rows["streetview_image_id"].iloc[order].tolist(),
            "lat": rows["target_lat"].mean(),
            "city": rows["city"].iloc[0],
            "street": rows["street"].iloc[0],
        }
    found.pop("", None)
    return found


@pytest.mark.parametrize("batch_rows", [40, 10_000])
def test_buildings_are_those_of_pandas_whatever_the_order_of_their_images(batch_rows, run, tmp_path, monkeypatch):
    monkeypatch.setattr(image_vectors, "BATCH_ROWS", batch_rows)  # a building's images are in several batches
    monkeypatch.setattr(building_means, "_STATE_ROWS", batch_rows)
    parts = [images(seed, 150, 40) for seed in range(2)]
    tiny = [v if v is None else 1e-30 * v for v in parts[1]["embedding"]]  # float32 cannot square them
    parts[1]["embedding"] = tiny
    table = run(*parts)
    expected = aggregated(pd.concat(parts, ignore_index=True))
    assert table["building"].to_pylist() == sorted(expected)
    for row in table.to_pylist():
        oracle = expected[row["building"]]
        for name in ("images", "image_ids", "city"):
            assert row[name] == oracle[name], name
        assert row["street"] == (None if pd.isna(oracle["street"]) else oracle["street"])
        for name in ("spread", "embedding", "lat"):
            assert np.allclose(row[name], oracle[name], atol=1e-6, equal_nan=True), name  # sums in float32
        assert np.isnan(row["lon"]) or row["lon"] == pytest.approx(row["lat"] - 100)
    assert table.schema.equals(
        schemas.buildings(DIM, [pa.field("city", pa.int32()), pa.field("street", pa.string())])
    )
    rejects = parquet.read(tmp_path / "out_rejects" / "buildings.parquet").to_pylist()
    assert [(row["member"], row["reason"]) for row in rejects] == [
        (f"{seed}_{number}", reason)
        for seed in range(2)
        for number, reason in [
            *((number, "vector_unusable") for number in (3, 5, 7)),
            *((number, "building_missing") for number in (11, 13)),
        ]
    ]


def test_one_image_is_its_building_and_opposite_ones_are_none(run, capsys):
    table = run({"building_id": [30, 4, 4, 5], "embedding": [[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]})
    assert table["building"].to_pylist() == ["30", "5"]  # integers, sorted as the strings that they become
    assert parquet.to_matrix(table["embedding"]).tolist() == [pytest.approx([0.6, 0.8]), [0, 1]]
    assert table["images"].to_pylist() == [1, 1]
    assert table["spread"].to_pylist() == pytest.approx([0, 0], abs=1e-6)
    assert table["image_ids"].to_pylist() == [["0:0"], ["0:3"]]  # no column names them: file and row
    assert np.isnan(table["lat"].to_numpy()).all()
    assert "4 images in, 2 out, 2 rejected (vector_unusable 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [pa.int32(), pa.uint64(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_integers_and_all_kinds_of_strings_name_buildings(kind, run):
    names = pa.array([7, 12, None, 7]).cast(pa.string())
    names = names.dictionary_encode() if pa.types.is_dictionary(kind) else names.cast(kind)
    table = run({"osm": names, "v": [1, 2, 3, 1], "embedding": [[1.0], [1.0], [1.0], [1.0]]}, by="osm")
    assert table.select(["building", "images", "v"]).to_pydict() == {
        "building": ["12", "7"],
        "images": [1, 2],
        "v": [2, 1],
    }


WRONG = {
    "no such column": (
        {"name": ["a"], "embedding": [[1.0]]},
        "no column building_id: its columns are name, embed",
    ),
    "no vectors": ({"building_id": ["a"], "v": [[1.0]]}, "has no column embedding"),
    "fractions": ({"building_id": [0.5], "embedding": [[1.0]]}, "building_id holds double; convert the names"),
    "ragged": ({"building_id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "row 1 has 2 dimensions; the rows"),
    "no rows": (
        {"building_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))},
        "holds no rows",
    ),
    "no buildings": ({"building_id": [""], "embedding": [[1.0]]}, "none of the 1 rows .*building_missing 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_aggregated_is_one_clear_error(case, run, tmp_path):
    columns, message = WRONG[case]
    with pytest.raises(PipelineError, match=message):
        run(columns)
    assert not list(tmp_path.glob("out*/*"))


def test_missing_vectors_and_the_folder_of_the_vectors_are_refused(run, tmp_path):
    with pytest.raises(
        PipelineError, match=r"holds no Parquet files: .*generate_embeddings_from_parquet\.py INPUT"
    ):
        run()
    with pytest.raises(ConfigError, match="is the folder of the vectors"):
        aggregate_buildings.main([str(tmp_path / "in"), str(tmp_path / "in")])


def write_vectors(path, model: str | None, split: str, seed: int = 0, names=("a", "b")) -> None:
    """A file as generate_embeddings_from_parquet.py writes it."""
    record = provenance.record(
        "generate_embeddings_from_parquet", {"model.weights": model}, {f"{split}.parquet": "1"}
    )
    kind = schemas.vector(pa.float32(), DIM)
    with parquet.writer(path, pa.schema([("building_id", pa.string()), ("embedding", kind)]), record) as out:
        vectors = np.random.default_rng(seed).normal(size=(2, DIM)).astype(np.float32)
        out.append({"building_id": names, "embedding": vectors})


def test_the_table_tells_the_splits_and_the_model_and_refuses_a_second_model(run, tmp_path):
    write_vectors(tmp_path / "in" / "train-0.parquet", "m", "train")
    write_vectors(tmp_path / "in" / "test-0.parquet", "m", "test", names=("b", "c"))
    assert run()["split"].to_pylist() == ["train", "", "test"]  # b is in both
    assert parquet.read_provenance(tmp_path / "out" / "buildings.parquet").config["model.weights"] == "m"
    write_vectors(tmp_path / "in" / "val-0.parquet", "n", "val")
    with pytest.raises(StaleArtefact, match=r"val-0\.parquet has vectors by another model \(n\) than .*test-0"):
        run()
    pq.write_table(pa.table({"building_id": ["a"], "embedding": [[1.0] * DIM]}), tmp_path / "in" / "val-0.parquet")
    with pytest.raises(StaleArtefact, match=r"another model \(unknown\)"):
        run()


def test_a_rerun_does_nothing_and_what_has_changed_is_named(run, tmp_path, capsys):
    write_vectors(tmp_path / "in" / "test-0.parquet", "m", "test")
    run()
    run()
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(StaleArtefact, match="clusters = 0") as raised:
        run(flags=("--clusters", "2"))
    assert "--remake" in str(raised.value)
    assert "--set clusters" not in str(raised.value)  # it is an argument
    write_vectors(tmp_path / "in" / "test-0.parquet", "m", "test", seed=1)
    with pytest.raises(StaleArtefact, match=r"an earlier version of test-0\.parquet"):
        run()
    former = parquet.read(tmp_path / "out" / "buildings.parquet")
    assert not run(flags=("--clusters", "0", "--remake")).equals(former)


def test_openTSNE_gone_leaves_the_table_and_one_that_comes_is_told_of(run, tmp_path, capsys, monkeypatch):
    frame = {"building_id": range(12), "embedding": list(np.random.default_rng(0).normal(size=(12, DIM)))}
    assert np.isnan(run(frame)["x"].to_numpy()).all()
    monkeypatch.setattr(vector_projection, "method", lambda: "openTSNE")
    assert np.isnan(run()["x"].to_numpy()).all()
    printed = capsys.readouterr().out
    assert "x and y are empty; openTSNE is installed now: " in printed
    assert "nothing to do" in printed
    remake = ("--clusters", "0", "--remake")
    assert np.isfinite(run(flags=remake)["x"].to_numpy()).all()
    capsys.readouterr()
    monkeypatch.setattr(vector_projection, "method", lambda: None)
    for flags in (remake[:2], remake):
        assert np.isfinite(run(flags=flags)["x"].to_numpy()).all()
        assert "nothing to do" in capsys.readouterr().out


def test_a_report_that_is_gone_is_written_again_of_the_clusters_in_the_table(run, tmp_path, monkeypatch):
    vectors, _ = planted(3, 6, 0.3)
    run({"building_id": range(18), "embedding": list(vectors)}, flags=("--clusters", "3"))
    table = (tmp_path / "out" / "buildings.parquet").read_bytes()
    report = tmp_path / "out_report" / "clusters.json"
    content = json.loads(report.read_text())
    report.unlink()
    monkeypatch.delattr(building_clusters, "fit")
    run(flags=("--clusters", "3"))
    assert (tmp_path / "out" / "buildings.parquet").read_bytes() == table
    again = json.loads(report.read_text())
    assert again["clusters"] == content["clusters"]
    assert again["stability"] == content["stability"]


def planted(clusters: int, each: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(unit vectors around random directions, (n, 32) float32; the direction of each)."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(clusters), each))
    vectors = rng.normal(size=(clusters, 32))[label] + noise * rng.normal(size=(len(label), 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), label


def test_rows_are_taken_in_the_order_of_their_numbers_asked_for(run, tmp_path):
    frames = [{"building_id": [n, n], "at": [n, n + 1], "embedding": [[1.0], [1.0]]} for n in (0, 2, 4)]
    run(*frames)
    source = image_vectors.find(tmp_path / "in", "building_id", None)
    assert source.take(np.array([5, 0, 3, 3]), ["at"])["at"].to_pylist() == [5, 0, 3, 3]


def test_a_building_is_of_the_nearest_centre():
    vectors, _ = planted(5, 4, 0.5)
    centres = np.random.default_rng(1).uniform(0.1, 1, (5, 1)) * vectors[:5]  # means of unit vectors: shorter
    label, similarity = building_clusters.assign(vectors, centres)
    distances = cdist(vectors.astype(np.float64), centres)
    assert label.tolist() == distances.argmin(axis=1).tolist()
    assert label.tolist() != (vectors @ centres.T).argmax(axis=1).tolist()  # the longest centres would attract
    assert np.allclose(similarity, 1 - cdist(vectors, centres, "cosine")[np.arange(20), label], atol=1e-6)


def test_planted_clusters_are_found_and_are_stable(monkeypatch):
    vectors, label = planted(3, 40, 0.3)
    found = building_clusters.fit(vectors, 3, seed=0)
    assert adjusted_rand_score(label, found.label) == 1
    centres = np.stack([vectors[found.label == number].mean(axis=0) for number in range(3)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    assert np.allclose(found.similarity, (vectors * centres[found.label]).sum(axis=1), atol=1e-5)
    assert found.stability > 0.7
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(120, 32)).astype(np.float32)
    assert building_clusters.fit(noise, 3, seed=0).stability < 0.5  # there is nothing to find
    monkeypatch.setattr(building_clusters, "MAX_FITTED", 60)
    assert (
        adjusted_rand_score(label, building_clusters.fit(vectors, 3, seed=0).label) == 1
    )  # also those not fitted


def test_clusters_are_numbered_by_size():
    vectors, label = planted(6, 20, 0.2)
    place = np.array([(label[:row] == label[row]).sum() for row in range(len(label))])
    kept = place < 3 * label + 2  # 2, 5, 8, ...
    found = building_clusters.fit(vectors[kept], 6, seed=0)
    assert np.bincount(found.label).tolist() == [17, 14, 11, 8, 5, 2]


def test_clusters_are_reported(run, tmp_path):
    vectors, label = planted(3, 20, 0.2)
    kept = np.flatnonzero((label != 2) | (np.cumsum(label == 2) <= 5))  # the last has 5
    frame = {
        "building_id": [f"b{number:03}" for number in kept],
        "dataset_id": np.where(label[kept] == 2, 90, 88),
        "embedding": list(vectors[kept]),
    }
    table = run(frame, flags=("--clusters", "3"))
    assert set(table["cluster"].filter(pa.array(label[kept] == 2)).to_pylist()) == {2}
    report = json.loads((tmp_path / "out_report" / "clusters.json").read_text())
    assert [row["buildings"] for row in report["clusters"]] == [20, 20, 5]
    assert [row["dataset_shares"] for row in report["clusters"]] == [{"88": 1}, {"88": 1}, {"90": 1}]
    smallest = table.filter(pa.array(table["cluster"].to_numpy() == 2)).sort_by(
        [("cluster_similarity", "descending")]
    )
    assert report["clusters"][2]["typical"] == smallest["building"].to_pylist()
    assert report["clusters"][2]["mean_similarity"] == pytest.approx(
        np.mean(smallest["cluster_similarity"].to_numpy()), abs=1e-4
    )
    assert not (tmp_path / "out_report" / "clusters.png").exists()  # there are no pictures
    table = run(frame, flags=("--clusters", "0", "--remake"))
    assert set(table["cluster"].to_pylist()) == {-1}
    assert not (tmp_path / "out_report" / "clusters.json").exists()  # a former one would tell of other clusters


def test_of_few_buildings_there_are_fewer_clusters_and_it_says_so(caplog):
    vectors, _ = planted(10, 1, 0.1)
    found = building_clusters.fit(vectors, 20, seed=0)
    assert (found.number, sorted(set(found.label.tolist()))) == (5, [0, 1, 2, 3, 4])
    assert "5 clusters, not 20: buildings are few" in caplog.text
    found = building_clusters.fit(vectors[:3], 20, seed=0)
    assert (found.number, found.label.tolist(), found.stability) == (0, [-1] * 3, None)
    assert "no clusters: there are too few buildings (3)" in caplog.text


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_of_few_different_vectors_no_cluster_is_empty(run, tmp_path, caplog):
    vectors = np.eye(3)[[0, 1, 2] * 8]
    table = run({"building_id": range(10, 34), "embedding": list(vectors)}, flags=("--clusters", "5"))
    assert len(set(zip(table["cluster"].to_pylist(), vectors.argmax(axis=1).tolist(), strict=True))) == 3
    report = json.loads((tmp_path / "out_report" / "clusters.json").read_text())
    assert [row["buildings"] for row in report["clusters"]] == [8, 8, 8]
    assert "3 clusters, not 5: many vectors are equal" in caplog.text


def test_the_sheet_shows_the_most_typical_image_of_each_building(run, tmp_path, monkeypatch):
    from PIL import Image

    from common.imagery import pictures

    asked, sheets = [], []

    def read(store, rows):
        asked.extend(rows["image_offset"].to_pylist())
        return [Image.new("RGB", (pictures.PX, pictures.PX)) if offset else None for offset in asked]

    monkeypatch.setattr(pictures, "read", read)
    monkeypatch.setattr(pictures, "sheet", lambda lines: sheets.append(lines) or b"png")
    frame = {
        "building_id": ["a", "b", "a", "a", "c", "d"],  # the last of a is nearest to the mean of a
        "embedding": [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.4], [0.5, -1.0], [0.5, -1.1]],
        "tar_file": ["1.tar"] * 6,
        "image_offset": [0, 10, 20, 30, 40, 50],
        "image_size": [1] * 6,
    }
    run(frame, flags=("--clusters", "2"))
    assert sorted(asked) == [10, 30, 40, 50]
    assert sorted("".join(sorted(line.captions)) for line in sheets[0]) == ["ab", "cd"]
    assert (tmp_path / "out_report" / "clusters.png").read_bytes() == b"png"


def test_the_projection_keeps_neighbours_that_pca_does_not_and_is_the_same_each_time(monkeypatch):
    vectors, _ = planted(20, 10, 0.5)
    plane = vector_projection.project(vectors, seed=0, threads=2)
    assert plane.dtype == np.float32
    assert np.array_equal(plane, vector_projection.project(vectors, seed=0, threads=2))
    by_pca = trustworthiness(vectors, PCA(2).fit_transform(vectors), n_neighbors=5)
    assert trustworthiness(vectors, plane, n_neighbors=5) > by_pca + 0.1
    monkeypatch.setattr(vector_projection, "MAX_PROJECTED", 50)
    assert np.isfinite(vector_projection.project(vectors, seed=0, threads=2)).all(axis=1).sum() == 50


def test_few_buildings_or_no_library_leave_the_plane_empty(unprojected, caplog):
    vectors, _ = planted(4, 5, 0.5)
    assert np.isnan(vector_projection.project(vectors, seed=0, threads=1)).all()
    assert "install openTSNE" in caplog.text


def test_the_default_folders_are_the_settings(tmp_path, capsys):
    flags = ["--set", f"paths.root={tmp_path}"]
    cfg = config.load(None, flags[1:])
    write_vectors(cfg.paths.vectors_dir / "test-0.parquet", "m", "test")
    assert aggregate_buildings.main(flags) == 0
    table = parquet.read(cfg.paths.buildings_dir / "buildings.parquet")
    assert table["building"].to_pylist() == ["a", "b"]
    assert np.isnan(table["x"].to_numpy()).all()  # 2 buildings have no neighbourhoods
    assert not files.beside(cfg.paths.buildings_dir, "report").exists()


def test_columns_that_differ_between_files_are_left_out_with_a_warning(run, caplog):
    first, second = images(0, 60, 20), images(1, 60, 20).drop(columns="street")
    table = run(first, second.astype({"city": "int64"}))
    assert not {"city", "street"} & set(table.column_names)
    assert "not with one type: city, street" in caplog.text
