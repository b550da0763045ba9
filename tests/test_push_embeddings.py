"""publish/push_embeddings.py. Oracles: `datasets`, DuckDB, polars and faiss on the folder that would be sent; the
hub's own parser of cards; a hub that records what it is sent."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from huggingface_hub.utils import filter_repo_objects

from common import cli, config, files, parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact
from generate import model_files
from publish import push_embeddings
from publish.hub import dataset_push, push
from publish.retrieval import embedding_tables

DIM = 8
SPLIT_ROWS = {"train": 30, "val": 10, "test": 20}
ID = pa.field("streetview_image_id", pa.string())
EMBEDDING = pa.field("embedding", schemas.vector(pa.float32(), DIM))
IMAGES = pa.schema([ID, ("dataset_id", pa.int32()), ("heading", pa.float32()), EMBEDDING])
BUILDINGS = pa.schema([("building", pa.string()), ("image_ids", pa.list_(pa.string())), EMBEDDING])


def unit_vectors(seed: int, n: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(path, schema, rows: dict, weights: str, inputs: dict | None = None) -> None:
    made = provenance.record("generate_embeddings_from_parquet", {"model.weights": weights}, inputs or {})
    with parquet.writer(path, schema, made) as out:
        out.append(rows)


def images(split: str, n: int, dataset: int = 88) -> dict:
    ids, vectors = [f"{dataset:04d}_{split}{i}" for i in range(n)], unit_vectors(len(split), n)
    return {ID.name: ids, "dataset_id": [dataset] * n, "heading": np.arange(n), "embedding": vectors}


class Place:
    """A published model, its vectors of images in three splits, and a building table."""

    def __init__(self, root):
        self.flags = ["me/streets", "--set", f"paths.root={root}"]
        self.cfg = config.load(None, [f"paths.root={root}"])
        model, paths = self.cfg.paths.published_dir, self.cfg.paths
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "spatial_embeddings"}')
        (model / "model.safetensors").write_bytes(b"weights")
        trained_on = {"embedding_model": {"name": "facebook/dinov2-base", "revision": "abc"}}
        (model / "provenance.json").write_text(json.dumps({"facts": {"trained_on": trained_on}}))
        self.weights = model_files.weights_digest(model)
        for split, n in SPLIT_ROWS.items():
            write(paths.vectors_dir / f"{split}-0.parquet", IMAGES, images(split, n), self.weights)
        self.aggregate()
        self.folder = files.beside(paths.vectors_dir, "dataset")

    def aggregate(self) -> None:
        names = [f"0088_{n}" for n in range(15)]
        rows = {"building": names, "image_ids": [[name] for name in names], "embedding": unit_vectors(9, 15)}
        inputs = embedding_tables.identities(sorted(self.cfg.paths.vectors_dir.iterdir()))
        write(self.cfg.paths.buildings_dir / "buildings.parquet", BUILDINGS, rows, self.weights, inputs)

    def card(self) -> DatasetCard:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return DatasetCard((self.folder / "README.md").read_text(), ignore_metadata_errors=False)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "root")


class Hub:
    """Records what it is sent."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, **options):
        self.calls.append((repo, options["repo_type"], options["private"]))

    def upload_folder(self, *, repo_id, repo_type, folder_path, delete_patterns, **_):
        former = ["images/train-7.parquet", "buildings/buildings.parquet", ".gitattributes", "mine.md"]
        sent = sorted(
            str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()
        )
        deleted = list(filter_repo_objects(former, allow_patterns=delete_patterns))
        self.calls.append((repo_id, repo_type, sent, deleted))
        return SimpleNamespace(commit_url="https://hub/commit")


def test_datasets_reads_both_tables_from_the_folder(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(push, "HfApi", None)  # nothing leaves
    assert push_embeddings.main([*place.flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for split, n in SPLIT_ROWS.items():
        source = place.cfg.paths.vectors_dir / f"{split}-0.parquet"
        assert re.search(rf"{source.stat().st_size:,} bytes  images/{split}-0\.parquet", told)
        found = load_dataset(str(place.folder), "images", split=split, cache_dir=str(tmp_path / "cache"))
        assert found["streetview_image_id"][:] == [f"0088_{split}{i}" for i in range(n)]
        np.testing.assert_array_equal(found.with_format("numpy")[:]["embedding"], unit_vectors(len(split), n))
    found = load_dataset(str(place.folder), "buildings", split="buildings", cache_dir=str(tmp_path / "cache"))
    assert found["image_ids"][3] == ["0088_3"]
    np.testing.assert_array_equal(found.with_format("numpy")[:]["embedding"], unit_vectors(9, 15))
    assert f"the card: {place.folder / 'README.md'}" in told


def test_datasets_reads_the_vectors_of_a_retrained_model_instead_of_those_it_has_read_before(place, tmp_path):
    for seed in (1, 2):
        rows = images("train", 5) | {"embedding": unit_vectors(seed, 5)}
        write(place.cfg.paths.vectors_dir / "train-0.parquet", IMAGES, rows, place.weights)
        place.aggregate()
        push_embeddings.main([*place.flags, "--dry-run"])
        found = load_dataset(str(place.folder), "images", split="train", cache_dir=str(tmp_path / "cache"))
        np.testing.assert_array_equal(found.with_format("numpy")[:]["embedding"], unit_vectors(seed, 5))


def test_the_card_says_what_it_holds_and_its_examples_run(place, tmp_path, monkeypatch, capsys):
    push_embeddings.main([*place.flags, "--dry-run", "--model-repo", "me/model"])
    made = place.card()
    assert made.data.license == "other"
    assert made.data.license_link.startswith("https://")
    assert made.data.size_categories == "n<1K"
    assert [entry["config_name"] for entry in made.data.configs] == ["images", "buildings"]
    for words in ("60 street-level images", "15 buildings", "no photographs", "non-commercial research", "abc"):
        assert words in made.text
    assert "https://huggingface.co/me/model" in made.text
    assert place.weights in made.text
    for field in (*IMAGES, *BUILDINGS):
        assert re.search(rf"^\| `{field.name}` \| [^|]+ \| [^|]+ \|$", made.text, re.MULTILINE), field.name
    assert "| `embedding` | float32[8] |" in made.text

    capsys.readouterr()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examples = re.findall(r"```python\n(.*?)```", made.text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:  # the folder in the repository's place
        there = example.replace("hf://datasets/me/streets", str(place.folder))
        exec(there.replace("me/streets", str(place.folder)), {})
    told = capsys.readouterr().out
    vectors = unit_vectors(9, 15)
    assert str(np.array([f"0088_{row}" for row in np.argsort(-(vectors @ vectors[0]))[:10]])) in told
    assert re.search(r"│\s+15 │\s+(1\.0|0\.9999)", told)  # rows, and their mean length


def test_duckdb_reads_what_was_written(place):
    push_embeddings.main([*place.flags, "--dry-run"])
    sql = f"SELECT {ID.name}, embedding::FLOAT[{DIM}] FROM '{place.folder}/images/val-*.parquet'"
    ids, vectors = zip(*duckdb.sql(sql).fetchall(), strict=True)
    assert ids == tuple(f"0088_val{i}" for i in range(10))
    np.testing.assert_array_equal(np.array(vectors, np.float32), unit_vectors(3, 10))


def test_pushing_sends_the_listed_files_to_a_private_repository(place, monkeypatch, capsys):
    (place.folder / "images").mkdir(parents=True)
    (place.folder / "photograph.jpg").write_bytes(b"of someone's own")
    (place.folder / "images" / "train-9.parquet").symlink_to(place.cfg.paths.vectors_dir / "gone.parquet")
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    assert push_embeddings.main(place.flags) == 0
    sent = ["README.md", "buildings/buildings.parquet", *(f"images/{s}-0.parquet" for s in sorted(SPLIT_ROWS))]
    deleted = ["images/train-7.parquet", "buildings/buildings.parquet"]
    assert hub.calls == [("me/streets", "dataset", True), ("me/streets", "dataset", sent, deleted)]
    assert "pushed: https://hub/commit" in capsys.readouterr().out


@pytest.mark.parametrize(("gone", "left"), [("images", "buildings"), ("buildings", "images")])
def test_one_table_alone_is_sent_and_the_other_is_named(place, gone, left, capsys):
    paths = place.cfg.paths
    for path in {"images": paths.vectors_dir, "buildings": paths.buildings_dir}[gone].iterdir():
        path.unlink()
    assert push_embeddings.main([*place.flags, "--dry-run"]) == 0
    assert f"without {gone}: publish/" in capsys.readouterr().out
    assert [entry["config_name"] for entry in place.card().data.configs] == [left]
    assert place.card().data.license_name == "3d-street-view-non-commercial-research"
    assert {name.partition("/")[0] for name in dataset_push.going(place.folder)} == {left, "README.md"}


def test_vectors_that_are_not_in_splits_are_one(place, tmp_path):
    for path in place.cfg.paths.vectors_dir.iterdir():
        path.rename(path.with_name(path.name.replace("train", "0088")))
    place.aggregate()
    push_embeddings.main([*place.flags, "--dry-run"])
    found = load_dataset(str(place.folder), "images", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"images": 60}


def test_photographs_of_ones_own_have_their_own_terms(place):
    for path in (*place.cfg.paths.buildings_dir.iterdir(), *place.cfg.paths.vectors_dir.iterdir()):
        path.unlink()
    write(place.cfg.paths.vectors_dir / "train-0.parquet", IMAGES, images("train", 5, 1234), place.weights)
    push_embeddings.main([*place.flags, "--dry-run"])
    made = place.card()
    assert made.data.license_name == "that-of-the-photographs"
    assert "3D Street View" not in made.text


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3)),
        *(pa.struct({"bytes": pa.binary()}), pa.map_(pa.string(), pa.binary())),
        *(pa.list_(pa.binary(3)), pa.list_(pa.large_binary(), 2), pa.list_view(pa.binary())),
        *(pa.dictionary(pa.int32(), pa.binary()), pa.list_(pa.dictionary(pa.int8(), pa.binary()))),
    ],
    ids=str,
)
def test_every_type_that_holds_bytes_is_known(kind):
    others = {"id": pa.string(), "ids": pa.list_(pa.string()), "city": pa.dictionary(pa.int32(), pa.string())}
    schema = pa.schema({**others, "photo": kind, "vector": pa.list_(pa.float32(), 8)})
    assert push.columns_of_bytes(schema) == ["photo"]


def test_columns_that_may_hold_photographs_are_refused(place):
    schema = IMAGES.append(pa.field("photo", pa.dictionary(pa.int32(), pa.binary())))
    rows = {**images("test", 1), "embedding": unit_vectors(0, 1).tolist()}
    made = provenance.record("x", {"model.weights": place.weights}, {})
    with parquet.writer(place.cfg.paths.vectors_dir / "test-1.parquet", schema, made) as out:
        out.append(pa.table({**rows, "photo": pa.array([b"abc"]).dictionary_encode()}, schema))
    with pytest.raises(PipelineError, match=r"test-1\.parquet has columns of bytes.*: photo"):
        push_embeddings.main([*place.flags, "--dry-run"])
    assert not place.folder.exists()


def test_vectors_of_another_model_and_none_at_all_are_refused(place, capsys):
    write(place.cfg.paths.vectors_dir / "train-1.parquet", IMAGES, images("train", 5), "other")
    with pytest.raises(StaleArtefact, match=r"train-1\.parquet was made by another model"):
        push_embeddings.main([*place.flags, "--dry-run"])
    for path in (*place.cfg.paths.buildings_dir.iterdir(), *place.cfg.paths.vectors_dir.iterdir()):
        path.unlink()
    assert cli.exit_code_of(lambda: push_embeddings.main([*place.flags, "--dry-run"])) == 1
    assert "aggregate_buildings.py" in capsys.readouterr().err


def test_buildings_of_other_vectors_than_the_images_are_refused(place):
    write(place.cfg.paths.vectors_dir / "train-0.parquet", IMAGES, images("train", 40), place.weights)
    with pytest.raises(
        StaleArtefact, match=r"(?s)buildings\.parquet was made of other.*aggregate_buildings\.py.*--remake"
    ):
        push_embeddings.main([*place.flags, "--dry-run"])
    assert not place.folder.exists()
    place.aggregate()
    assert push_embeddings.main([*place.flags, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("repo", "message"), [("me/streets", "cannot be reached|network"), ("not a name", "not a valid repository")]
)
def test_a_hub_that_does_not_answer_or_a_wrong_name_is_a_clear_error(place, repo, message):
    with pytest.raises(PipelineError, match=message):  # HF_HUB_OFFLINE is set for all tests
        push_embeddings.main([repo, *place.flags[1:]])
