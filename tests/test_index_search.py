"""demo_usage.py search with an index or a folder of vectors. Oracle: vectors at known angles to the query's."""

import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_setup import jpeg, picture, write_intermediates, write_tar
from PIL import Image
from test_demo_usage import results_of, verdicts
from test_generate_embeddings_from_hf import image_folder, model, plain_vectors  # noqa: F401 - a fixture
from test_vector_index import write_vectors
from trained_model import JPEGS

from common import config, parquet, provenance, schemas
from common.errors import ConfigError, PipelineError, StaleArtefact
from generate.model_files import weights_digest
from publish import (
    aggregate_buildings,
    build_index,
    demo_usage,
    generate_embeddings_from_hf,
    generate_embeddings_from_parquet,
)
from publish.demo_usage import main

QUERY = jpeg(picture(90, 70, seed=500))
COSINES = [0.3, 0.9, -0.5, 0.7, 0.1, 0.5, 0.8]  # of the images, in the order of their names


def write_around(path, query: np.ndarray, names: list[str], weights: str) -> None:
    """A table of vectors with COSINES to a query's, as generate_embeddings_from_hf.py writes it."""
    noise = np.random.default_rng(0).normal(size=(len(names), len(query)))
    noise -= (noise @ query)[:, None] * query
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosine = np.array(COSINES)[:, None]
    vectors = (cosine * query + np.sqrt(1 - cosine**2) * noise).astype(np.float32)
    fields = [("image", pa.string()), ("embedding", schemas.vector(pa.float32(), len(query)))]
    made = provenance.record("generate_embeddings_from_hf", {"model.weights": weights}, {})
    with parquet.writer(path, pa.schema(fields), made) as out:
        out.append({"image": names, "embedding": vectors})


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):  # noqa: F811
    """A query, images, their vectors and an index of them; a tar with its intermediates and vectors."""
    root = tmp_path_factory.mktemp("search")
    settings = {"paths.root": root, "infrastructure.embedding_batch_size": 2}
    flags = ["--model", str(model), *(word for k, v in settings.items() for word in ("--set", f"{k}={v}"))]
    (root / "query.jpg").write_bytes(QUERY)
    names = image_folder(root / "photos")
    cfg = config.load(None, [f"paths.root={root}"])
    write_tar(cfg.paths.raw_dir / "0088.tar", JPEGS)
    write_intermediates(cfg)
    write_around(root / "vectors" / "0.parquet", plain_vectors(model, [QUERY])[0], names, weights_digest(model))
    ours = [str(cfg.paths.intermediates_dir), str(cfg.paths.vectors_dir), *flags]
    assert generate_embeddings_from_parquet.main(ours) == 0
    assert build_index.main([str(root / "vectors"), str(root / "index")]) == 0
    return SimpleNamespace(root=root, names=names, flags=flags, cfg=cfg, query=str(root / "query.jpg"))


@pytest.fixture
def found(place, tmp_path, capsys):
    """What a search prints."""

    def run(*arguments, query=place.query) -> str:
        capsys.readouterr()
        out = ["--out", str(tmp_path / "found.png"), *place.flags]
        assert main(["search", query, *map(str, arguments), *out]) == 0
        return capsys.readouterr().out

    return run


def test_an_index_and_a_folder_of_vectors_give_the_most_similar_first(place, found, tmp_path):
    order = np.argsort(COSINES)[::-1][:5]
    expected = [(COSINES[number], place.names[number]) for number in order]
    for source in (("--index", place.root / "index"), ("--gallery", place.root / "vectors")):
        told = found(*source)
        assert results_of(told) == expected
        assert "the nearest of 7 images" in told
        assert "no picture" in told
        assert not (tmp_path / "found.png").exists()
    assert f"picture: {tmp_path / 'found.png'}" in found(
        "--index", place.root / "index", "--images", place.root / "photos"
    )
    assert Image.open(tmp_path / "found.png").width > 2 * Image.open(tmp_path / "found.png").height  # 5 results


def test_the_runs_own_index_has_buildings_and_pictures(place, found, tmp_path):
    assert build_index.main(place.flags[2:]) == 0
    query = f"{place.cfg.paths.raw_dir}/0088.tar:0088/0088_0_0_0.jpg"
    told = found("--index", query=query)
    lines = [line.split() for line in told.splitlines()[1:6]]
    names = [next(word for word in line if word.startswith("0088_")) for line in lines]
    assert "0088_0" not in names  # the query itself, by its bytes
    assert [line[2:4] == ["same", "building"] for line in lines] == [name == "0088_1" for name in names]
    assert all(f"building_id=0088_{int(name[5:]) // 2}" in line for name, line in zip(names, lines, strict=True))
    Image.open(tmp_path / "found.png").verify()
    assert not any(verdict is not None for verdict in verdicts(found("--index")).values())  # no label of the query
    for condition in re.findall(r"\[--where (\S+)\]", demo_usage.__doc__):  # the examples of --help
        assert "the nearest of 7 images" in found("--gallery", place.cfg.paths.vectors_dir, "--where", condition)
    told = found("--index", "--where", "building_id=0088_2", "--where", "dataset_id=88")
    assert "the nearest of 2 images" in told
    assert sorted(line.split()[2] for line in told.splitlines()[1:3]) == ["0088_4", "0088_5"]


def test_a_table_of_labels_goes_before_those_of_an_index(place, found, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(f"image,building\n{place.query},a\n{place.names[0]},a\n{place.names[1]},b\n")
    told = verdicts(found("--index", place.root / "index", "--labels", labels, "--top", 7))
    assert told == dict.fromkeys(place.names) | {place.names[0]: True, place.names[1]: False}


def test_buildings_named_otherwise_than_the_query_get_no_verdict(place, found, tmp_path):
    """0088_<n> by the pipeline's own column, w<n> by osm_id: two of the former each."""
    rows = parquet.read(next(place.cfg.paths.vectors_dir.glob("*.parquet")))
    osm = pa.array([f"w{int(name[5:]) // 2}" for name in rows["building_id"].to_pylist()])
    (tmp_path / "images").mkdir()
    pq.write_table(rows.append_column("osm_id", osm), tmp_path / "images" / "0.parquet")
    query, labels = f"{place.cfg.paths.raw_dir}/0088.tar:0088/0088_0_0_0.jpg", tmp_path / "labels.csv"
    for by, own in (("building_id", "0088_0"), ("osm_id", "w0")):
        flags = ["--by", by, "--clusters", "0", *place.flags[2:]]
        assert aggregate_buildings.main([str(tmp_path / "images"), str(tmp_path / by), *flags]) == 0
        assert build_index.main([str(tmp_path / by), str(tmp_path / f"{by}-index")]) == 0
        labels.write_text(f"image,building\n{query},{own}\n")
        names = parquet.read(tmp_path / by / "buildings.parquet")["building"].to_pylist()
        known = {name: name == own for name in names}
        for source in (("--gallery", tmp_path / by), ("--index", tmp_path / f"{by}-index")):
            told = [found(*source, *more, query=query) for more in ((), ("--labels", labels))]
            assert all("picture: " in one and " lat=" in one and "target" not in one for one in told)
            without, labelled = (verdicts(re.sub("  images=.*", "", one)) for one in told)
            assert without == (known if by == "building_id" else dict.fromkeys(names))
            assert labelled == known


def test_the_query_is_left_out_by_its_name_where_its_bytes_are_not_here(place, found, model, tmp_path):  # noqa: F811
    photos = place.root / "photos"
    assert generate_embeddings_from_hf.main([str(photos), str(tmp_path / "vectors"), *place.flags]) == 0
    name, others = place.names[0], place.names[1:]
    query = str(photos / name)
    for source in (("--gallery", tmp_path / "vectors"), ("--images", photos, "--gallery", tmp_path / "vectors")):
        told = [one for _, one in results_of(found(*source, "--top", 7, query=query))]
        assert sorted(told) == sorted(others)
    (tmp_path / "holiday" / name).parent.mkdir(parents=True)
    (tmp_path / "holiday" / name).write_bytes(QUERY)  # another photograph of that name
    told = found("--gallery", place.root / "vectors", "--top", 7, query=str(tmp_path / "holiday" / name))
    assert name in [one for _, one in results_of(told)]


def test_a_table_of_buildings_is_searched_like_one_of_images(place, found, model, tmp_path):  # noqa: F811
    vectors = plain_vectors(model, JPEGS[:2])
    columns = {
        "building": ["town hall", "library"],
        "images": [3, 1],
        "image_ids": [[place.names[0], "x"], [place.names[1]]],
        "lat": [45.5, float("nan")],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    (tmp_path / "buildings").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "buildings" / "buildings.parquet")
    told = found("--gallery", tmp_path / "buildings", "--images", place.root / "photos")
    assert "the nearest of 2 buildings" in told
    assert any(line.endswith("town hall  images=3 lat=45.50000") for line in told.splitlines())
    assert any(line.endswith("library  images=1") for line in told.splitlines())
    assert "does not say which model made its vectors; their dimension, 16" in told
    assert "picture:" in told


def test_vectors_by_another_model_are_refused_before_the_model_is_loaded(place, tmp_path):
    dim = pq.read_table(place.root / "vectors")["embedding"].type.list_size
    other = np.random.default_rng(0).normal(size=(5, dim)).astype(np.float32)
    search = ["search", place.query, *place.flags, "--gallery"]
    write_vectors(tmp_path / "other" / "0.parquet", other)
    with pytest.raises(StaleArtefact, match=r"by another model \(weights mmmmmmmm\) than the one in .*published"):
        main([*search, str(tmp_path / "other")])
    write_vectors(tmp_path / "short" / "0.parquet", other[:, :-1], model=None)
    with pytest.raises(StaleArtefact, match=f"has vectors of {dim - 1} dimensions; those of .* have {dim}"):
        main([*search, str(tmp_path / "short")])


def test_options_that_do_not_go_together_are_refused(place, tmp_path):
    search = ["search", place.query, *place.flags]
    with pytest.raises(ConfigError, match="not both"):
        main([*search, "--index", "--gallery", str(place.root / "photos")])
    with pytest.raises(ConfigError, match=r"query\.jpg was taken for the index's folder\. Write the QUERY before"):
        main(["search", "--index", place.query, *place.flags])
    with pytest.raises(ConfigError, match="for an index"):
        main([*search, "--gallery", str(place.root / "photos"), "--where", "split=test"])
    with pytest.raises(ConfigError, match="--labels is for a QUERY"):
        main(["search", *place.flags, "--labels", "labels.csv"])
    with pytest.raises(PipelineError, match=r"holds no index .*: run publish/build_index\.py"):
        main([*search, "--index", str(tmp_path)])
    with pytest.raises(PipelineError, match="has no row with image=x"):
        main([*search, "--index", str(place.root / "index"), "--where", "image=x"])


def test_images_whose_tar_is_gone_leave_the_table(place, found, tmp_path, caplog):
    rows = parquet.read(next(place.cfg.paths.vectors_dir.glob("*.parquet")))
    rows = rows.drop_columns("tar_file").append_column("tar_file", pa.array(["gone.tar"] * len(rows)))
    (tmp_path / "moved").mkdir()
    pq.write_table(rows, tmp_path / "moved" / "0.parquet")
    told = found("--gallery", tmp_path / "moved")
    assert len(results_of(told)) == 5
    assert "no picture" in told
    assert [record.message for record in caplog.records if "gone.tar" in record.message]
