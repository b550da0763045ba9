"""publish/build_index.py: what it writes, and what it refuses."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_vector_index import made_up, rows_of, write_vectors

from common.errors import ConfigError, PipelineError, StaleArtefact
from publish import build_index
from publish.build_index import main
from publish.retrieval import embedding_tables, inverted_file, vector_index


@pytest.fixture
def vectors(tmp_path):
    """A folder of 50 vectors."""
    write_vectors(tmp_path / "vectors" / "0.parquet", made_up(50))
    return tmp_path / "vectors"


def test_by_default_the_runs_own_vectors_become_its_index(cfg, tmp_path, capsys):
    write_vectors(cfg.paths.vectors_dir / "train-0.parquet", made_up(50))
    settings = ["--set", f"paths.root={tmp_path}"]
    assert main(settings) == 0
    record = json.loads((cfg.paths.index_dir / "index.json").read_text())
    assert [record[key] for key in ("rows", "dim", "kind", "model")] == [50, 24, "exact", "m" * 32]
    files = [cfg.paths.index_dir / name for name in ("vectors.npy", "rows.parquet")]
    assert record["bytes"] == sum(path.stat().st_size for path in files)
    stored = np.load(files[0])  # by NumPy alone, and rows by any reader of Parquet
    assert stored.dtype == np.float16
    assert np.allclose(stored, made_up(50), atol=1e-3)
    assert pq.read_table(files[1]).equals(rows_of(made_up(50)).drop_columns("embedding"))
    capsys.readouterr()
    assert main(settings) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_splits_without_vectors_are_named(cfg, tmp_path, caplog):
    settings = ["--set", f"paths.root={tmp_path}"]
    write_vectors(cfg.paths.vectors_dir / "test-0.parquet", made_up(50))
    for split in ("train", "val", "test"):
        write_vectors(cfg.paths.merged_dir / f"{split}.parquet", made_up(50))
    assert main(settings) == 0
    assert [record.message for record in caplog.records] == [
        f"{cfg.paths.vectors_dir}: the vectors of train and val are missing: "
        "run publish/generate_embeddings_from_parquet.py"
    ]
    caplog.clear()
    for split in ("train", "val"):
        write_vectors(cfg.paths.vectors_dir / f"{split}-0.parquet", made_up(50))
    assert main([*settings, "--remake"]) == 0
    assert not caplog.records


def test_other_vectors_do_not_become_the_runs_own_index(cfg, vectors, tmp_path):
    settings = ["--set", f"paths.root={tmp_path}"]
    for source in (vectors, vectors / "0.parquet"):
        with pytest.raises(ConfigError, match=f"the index of {source}, too: .* is the run's own"):
            main([str(source), *settings])
    write_vectors(cfg.paths.buildings_dir / "buildings.parquet", made_up(50))
    assert main([str(cfg.paths.buildings_dir), *settings]) == 0
    assert len(vector_index.open(cfg.paths.index_dir).vectors) == 50


def test_vectors_of_another_length_and_type_are_made_unit_vectors(tmp_path):
    table = rows_of(made_up(20)).drop_columns("embedding")
    lists = pa.array((3 * made_up(20)).astype(np.float64).tolist(), pa.list_(pa.float64()))
    pq.write_table(table.append_column("embedding", lists), tmp_path / "any.parquet")
    assert main([str(tmp_path / "any.parquet"), str(tmp_path / "index")]) == 0
    index = vector_index.open(tmp_path / "index")
    assert np.allclose(index.vectors, made_up(20), atol=1e-3)
    assert index.model == "unknown"


def test_changed_vectors_and_another_kind_are_refused_until_asked_for(vectors, tmp_path):
    command = [str(vectors), str(tmp_path / "index")]
    assert main(command) == 0
    with pytest.raises(StaleArtefact, match="of kind exact, not ivf"):
        main([*command, "--kind", "ivf"])
    write_vectors(vectors / "0.parquet", made_up(60))
    with pytest.raises(StaleArtefact, match=r"earlier version of 0\.parquet"):
        main(command)
    assert main([*command, "--kind", "ivf", "--remake"]) == 0
    assert len(vector_index.open(tmp_path / "index").vectors) == 60
    assert main(command) == 0  # an ivf by request stays one
    assert vector_index.open(tmp_path / "index").inverted is not None
    assert main([*command, "--kind", "exact", "--remake"]) == 0
    assert not (tmp_path / "index" / "index.faiss").exists()


def test_many_vectors_get_an_inverted_file_by_themselves(vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_index, "IVF_FROM", 50)
    assert main([str(vectors), str(tmp_path / "index")]) == 0
    assert "ivf index of 50 x 24" in capsys.readouterr().out


def test_a_build_that_fails_leaves_the_former_index(vectors, tmp_path, monkeypatch):
    command = [str(vectors), str(tmp_path / "index"), "--kind", "ivf"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(inverted_file, "write", fail)
    with pytest.raises(OSError, match="full"):
        main([*command, "--overwrite"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    assert before.keys() == {"vectors.npy", "rows.parquet", "index.faiss", "index.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"index", "vectors"}  # nothing is left of the other


def test_an_index_does_not_replace_other_files(vectors, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(PipelineError, match=r"thesis holds other files, such as thesis\.tex"):
        main([str(vectors), str(tmp_path / "thesis"), "--overwrite"])
    assert (tmp_path / "thesis" / "thesis.tex").exists()


@pytest.mark.parametrize("names", [["rows.parquet"], ["vectors.npy", "index.faiss"], ["index.faiss"]])
def test_files_of_two_indexes_are_not_read_as_one(names, vectors, tmp_path):
    write_vectors(tmp_path / "other" / "0.parquet", made_up(50, seed=1), model="n" * 32)  # of the same shape
    for source, out in ((vectors, "index"), (tmp_path / "other", "second")):
        assert main([str(source), str(tmp_path / out), "--kind", "ivf"]) == 0
    for name in names:
        (tmp_path / "second" / name).replace(tmp_path / "index" / name)
    with pytest.raises(PipelineError, match="missing, or not of one index"):
        vector_index.open(tmp_path / "index")


@pytest.mark.parametrize("name", ["vectors.npy", "rows.parquet", "index.faiss"])
def test_an_index_that_lacks_a_file_is_made_again(name, vectors, tmp_path):
    command = [str(vectors), str(tmp_path / "index"), "--kind", "ivf"]
    assert main(command) == 0
    (tmp_path / "index" / name).unlink()
    with pytest.raises(PipelineError, match="missing, or not of one index"):
        vector_index.open(tmp_path / "index")
    assert main(command) == 0
    assert len(vector_index.open(tmp_path / "index").vectors) == 50


@pytest.mark.parametrize("other", ["n" * 32, None])
def test_vectors_by_two_models_are_refused(vectors, tmp_path, other):
    write_vectors(vectors / "1.parquet", made_up(50), model=other)
    with pytest.raises(StaleArtefact, match=r"1\.parquet has vectors by another model .* than .*0\.parquet"):
        main([str(vectors), str(tmp_path / "index")])


def test_what_is_no_table_of_vectors_is_refused_by_name(vectors, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match="holds no Parquet file with a column embedding"):
        main([str(tmp_path / "empty"), str(tmp_path / "index")])
    with pytest.raises(PipelineError, match="is the folder of the vectors"):
        main([str(vectors), str(vectors)])
    write_vectors(tmp_path / "zero" / "0.parquet", 0 * made_up(50))
    with pytest.raises(PipelineError, match=r"no row of .*zero can be used: the vectors are missing, zero or not"):
        main([str(tmp_path / "zero"), str(tmp_path / "index")])
    pq.write_table(pq.read_table(vectors / "0.parquet").drop_columns("building"), vectors / "1.parquet")
    with pytest.raises(PipelineError, match=r"1\.parquet has other columns than .*0\.parquet"):
        main([str(vectors), str(tmp_path / "index")])
    pq.write_table(pq.read_table(vectors / "0.parquet").drop_columns("embedding"), vectors / "1.parquet")
    with pytest.raises(PipelineError, match=r"1\.parquet has no column embedding"):
        main([str(vectors), str(tmp_path / "index")])


@pytest.mark.parametrize("batch_rows", [4, 100])
def test_rows_without_a_usable_vector_are_left_out_and_counted(batch_rows, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(embedding_tables, "BATCH_ROWS", batch_rows)
    lists = made_up(60).tolist()
    lists[0], lists[7], lists[55], lists[56] = (
        None,
        [0.0] * 24,
        [float("nan"), *lists[55][1:]],
        [None, *lists[56][1:]],
    )
    for number, rows in enumerate((slice(0, 50), slice(50, 60))):
        table = rows_of(made_up(60)).drop_columns("embedding")[rows.start : rows.stop]
        (tmp_path / "any").mkdir(exist_ok=True)
        pq.write_table(
            table.append_column("embedding", pa.array(lists[rows])), tmp_path / "any" / f"{number}.parquet"
        )
    assert main([str(tmp_path / "any"), str(tmp_path / "index")]) == 0
    assert "60 vectors in, 56 out, 4 rejected (vector_unusable 4)" in capsys.readouterr().out
    rejects = pq.read_table(tmp_path / "index_rejects" / "rows.parquet").to_pylist()
    assert [row["member"] for row in rejects] == ["0:0", "0:7", "1:5", "1:6"]
    assert {row["reason"] for row in rejects} == {"vector_unusable"}

    good = [number for number in range(60) if number not in (0, 7, 55, 56)]
    index = vector_index.open(tmp_path / "index")
    assert index.record["rows"] == 56
    assert np.allclose(np.load(tmp_path / "index" / "vectors.npy"), made_up(60)[good], atol=1e-3)
    gallery = vector_index.of_tables(embedding_tables.tables_at(tmp_path / "any"))
    assert "leaving out 4 rows" in caplog.text
    for one in (index, gallery):
        _, rows = one.search(-made_up(60)[:1], 60)  # away from a building: some cosines are below 0
        assert sorted(row["image"] for row in one.take(rows[0])) == sorted(f"{number}.jpg" for number in good)
    assert np.flatnonzero(gallery.where([("building", "b0")])).tolist() == [1, 2]


def test_without_faiss_an_ivf_is_refused_before_any_work(vectors, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(PipelineError, match="pip install faiss-cpu"):
        main([str(vectors), str(tmp_path / "index"), "--kind", "ivf"])
    assert not (tmp_path / "index").exists()
    assert main([str(vectors), str(tmp_path / "index")]) == 0


def test_a_filter_names_what_it_cannot_match(vectors, tmp_path):
    main([str(vectors), str(tmp_path / "index")])
    index = vector_index.open(tmp_path / "index")
    assert np.flatnonzero(index.where([("dataset_id", "3"), ("building", "b1")])).tolist() == [3]
    with pytest.raises(PipelineError, match="has no column city: it has building, image, dataset_id"):
        index.where([("city", "Rome")])
    with pytest.raises(PipelineError, match=r"dataset_id \(int32\) cannot be Rome"):
        index.where([("dataset_id", "Rome")])
    with pytest.raises(PipelineError, match="has no row with building=b77"):
        index.where([("building", "b77")])
