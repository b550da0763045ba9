"""generate/vector_table.py: another network's vectors in place of a backbone's. Oracle: the vectors that were put
into the table, image by image. (A whole run is in test_pipeline.py.)
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_setup import Setup, photographs

from common import config, files, parquet, provenance
from common.errors import ConfigError, PipelineError, StaleArtefact
from generate import generate_embeddings, model_files
from publish import estimate_model_size

KINDS = {
    "list of float64": pa.list_(pa.float64()),
    "large list of float16": pa.large_list(pa.float16()),
    "fixed-size list of float32": pa.list_(pa.float32(), 11),
}


@pytest.fixture
def setup(tmp_path):
    """Two tars of seven and three images, in parts of five."""
    return Setup(tmp_path, {"0088": photographs(7), "0089": photographs(3, seed=7)})


def ids_of(setup) -> list[str]:
    files = sorted(setup.cfg.paths.intermediates_dir.glob("*.parquet"))
    return [image for file in files for image in parquet.read(file)["streetview_image_id"].to_pylist()]


def vectors_of(ids, dim=11) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(ids), dim)).astype(np.float16)


def write(path, ids, vectors, kind=KINDS["list of float64"], **options):
    """A table of vectors, as any program might write it; the flags that name it."""
    path.parent.mkdir(exist_ok=True)
    lists = pa.array(list(vectors), kind)
    pq.write_table(pa.table({"note": ids, "embedding": lists, "streetview_image_id": ids}), path, **options)


def run(setup, name, *more):
    same_folders = f"embedding_model.label={config.label_of(setup.cfg.embedding_model)}"
    flags = [*setup.flags, "--set", f"embedding_model.name={name}", "--set", same_folders, *more]
    assert generate_embeddings.main(flags) == 0


def stored(setup) -> dict[str, np.ndarray]:
    parts = [parquet.read(path) for path in sorted(setup.cfg.paths.embeddings_dir.glob("*.parquet"))]
    return {
        i: v
        for part in parts
        for i, v in zip(part["streetview_image_id"].to_pylist(), parquet.to_matrix(part["embedding"]), strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_gets_its_vector_whatever_the_order_the_files_and_the_type(kind, setup, tmp_path):
    ids = ids_of(setup)
    vectors = vectors_of(ids)
    order = np.random.default_rng(1).permutation(len(ids) + 4)  # four images that are in no tar
    everything, values = [*ids, *(f"0001_{n}" for n in range(4))], np.concatenate([vectors, vectors[:4]])
    for number, rows in enumerate(np.array_split(order, 3)):
        write(
            tmp_path / "theirs" / f"{number}.parquet",
            [everything[r] for r in rows],
            values[rows],
            KINDS[kind],
            row_group_size=2,
        )
    run(setup, tmp_path / "theirs")
    found = stored(setup)
    assert found.keys() == set(ids)
    for image, vector in zip(ids, vectors, strict=True):
        assert found[image].tobytes() == vector.tobytes()
    names = [path.name for path in sorted(setup.cfg.paths.embeddings_dir.iterdir())]
    assert names == ["0088-0.parquet", "0088-1.parquet", "0089-0.parquet"]
    images = parquet.read(setup.part("0088-0"))["streetview_image_id"].to_pylist()
    assert images == ids[:5]  # in the order of the intermediates


def test_the_record_names_the_content_and_no_setting_of_a_backbone(setup, tmp_path, capsys):
    ids = ids_of(setup)
    write(tmp_path / "theirs.parquet", ids, vectors_of(ids))
    run(setup, tmp_path / "theirs.parquet")
    record = parquet.read_provenance(setup.part("0088-0"))
    content = record.config["embedding_model.weights"]
    assert record.config == {
        "data.rows_per_part": 5,
        "embedding_model.name": "theirs",
        "embedding_model.weights": content,
    }
    assert record.facts == {"dim": 11}
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "theirs.parquet").rename(other / "theirs.parquet")
    capsys.readouterr()
    run(
        setup,
        other / "theirs.parquet",
        "--set",
        "embedding_model.pooling=mean",
        "--set",
        "embedding_model.dtype=float16",
    )
    assert "nothing to do, 3 files up to date" in capsys.readouterr().out
    changed = vectors_of(ids)
    changed[4, 3] += 1
    write(other / "theirs.parquet", ids, changed)
    with pytest.raises(StaleArtefact, match=r"embedding_model\.weights"):
        run(setup, other / "theirs.parquet")
    with pytest.raises(StaleArtefact, match=r'embedding_model\.name = "theirs"'):
        generate_embeddings.main(setup.flags)  # by the backbone


def test_a_file_that_this_pipeline_wrote_is_known_by_its_own_id(setup, tmp_path):
    generate_embeddings.main(setup.flags)
    part = setup.part("0088-0").rename(tmp_path / "ours.parquet")
    settings = config.load(None, [*setup.overrides, f"embedding_model.name={part}"]).embedding_model
    expected = provenance.digest_of(parquet.read_provenance(part).id)
    assert model_files.identity(settings, "auto")["embedding_model.weights"] == expected


def test_images_without_a_vector_are_rejects_with_a_reason(setup, tmp_path, capsys):
    ids = ids_of(setup)
    kept = [image for image in ids if image != ids[2]]
    zero = kept[1]  # as some programs write what they could not read
    vectors = vectors_of(kept) * (np.array(kept) != zero)[:, None]
    write(tmp_path / "theirs.parquet", kept, vectors)
    flags = ["data.max_reject_share=0.5", "infrastructure.device=cuda"]  # there is none, and it is of no concern
    run(setup, tmp_path / "theirs.parquet", *(word for flag in flags for word in ("--set", flag)))
    kept.remove(zero)
    assert "10 images in, 8 out, 2 rejected (vector_missing 2)" in capsys.readouterr().out
    rejects = parquet.read(files.beside(setup.cfg.paths.embeddings_dir, "rejects") / "0088-0.parquet").to_pylist()
    why = ("vector_missing", "not in theirs.parquet, or zero there")
    assert [(row["reason"], row["detail"]) for row in rejects] == [why] * 2
    assert (
        rejects[1]["member"]
        == parquet.read(setup.cfg.paths.intermediates_dir / "0088.parquet")["image_path"][2].as_py()
    )
    assert list(stored(setup)) == kept
    few = ids[3:5]
    write(tmp_path / "few.parquet", few, vectors_of(few))
    with pytest.raises(
        PipelineError, match=r"3 of the 5 images .* have no vector in .*few\.parquet \(more than data\.max"
    ):
        run(setup, tmp_path / "few.parquet", "--overwrite")
    assert not setup.part("0088-0").exists()


def spoilt(ids, place, value):
    vectors = vectors_of(ids).astype(np.float64)
    vectors[place, 3] = value
    return vectors


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda ids: ([*ids, ids[6]], vectors_of([*ids, ""])), "holds image {id} twice"),
        (lambda ids: (ids, spoilt(ids, 6, np.nan)), "embedding of image {id} holds a value that is .* not finite"),
        (lambda ids: (ids, spoilt(ids, 6, -1e5)), "embedding of image {id} has a value above 65,504"),
        (lambda ids: (ids, [*vectors_of(ids)[:6], None, *vectors_of(ids)[7:]]), "image {id} has no embedding"),
        (
            lambda ids: (ids, [*vectors_of(ids)[:6], [1.0], *vectors_of(ids)[7:]]),
            "image {id} has 1 dimensions; the first one has 11",
        ),
    ],
)
def test_what_is_wrong_with_a_vector_is_told_with_its_image(case, message, setup, tmp_path):
    ids = ids_of(setup)
    write(tmp_path / "theirs.parquet", *case(ids))
    with pytest.raises(PipelineError, match=message.format(id=ids[6])):
        run(setup, tmp_path / "theirs.parquet")
    assert not setup.part("0088-1").exists()


def test_a_table_that_cannot_be_used_says_what_is_expected(setup, tmp_path):
    ids = ids_of(setup)
    pd.DataFrame({"image": ids, "embedding": list(vectors_of(ids))}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        PipelineError, match=r"(?s)no column streetview_image_id, only image, embedding.*name the ids"
    ):
        run(setup, tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [], np.empty((0, 11)))
    with pytest.raises(PipelineError, match=r"b\.parquet has no rows"):
        run(setup, tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"no such folder or Parquet file: .*c\.parquet"):
        run(setup, tmp_path / "c.parquet")
    write(tmp_path / "d.parquet", ids, vectors_of(ids))
    with pytest.raises(
        PipelineError, match=r"d\.parquet holds vectors that another network has made: there is no backbone"
    ):
        estimate_model_size.main(["--backbone", str(tmp_path / "d.parquet")])


def test_parts_of_different_tables_are_not_merged(setup, tmp_path):
    ids = ids_of(setup)
    for name in ("one", "two"):
        write(tmp_path / f"{name}.parquet", ids, vectors_of(ids))
    run(setup, tmp_path / "one.parquet")
    one = provenance.embedding_model(parquet.read_provenance(setup.part("0088-0")))
    assert one.keys() == {"name", "weights", "dim"}
    setup.part("0088-0").unlink()
    with pytest.raises(StaleArtefact, match=r'embedding_model\.name = "one" \(now "two"'):
        run(setup, tmp_path / "two.parquet")
