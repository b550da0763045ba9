"""publish/generate_embeddings_from_parquet.py. Oracle: the head, and the published model run plainly."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_setup import cosines, write_intermediates, write_tar
from test_generate_embeddings_from_hf import flags, model, plain_vectors  # noqa: F401 - fixtures
from trained_model import JPEGS

from common import config, parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact
from generate import loop
from publish.generate_embeddings_from_parquet import main
from publish.inference import vector_tables
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsModel

DIM = 32  # of the tiny backbone
RNG = np.random.default_rng(0)
EMBEDDINGS = RNG.normal(size=(10, DIM)).astype(np.float32)


@pytest.fixture
def run(flags, tmp_path):  # noqa: F811
    """Run the command on a table written to in.parquet, in row groups of 4 rows; the table that comes out."""

    def run(columns: dict, *arguments: str, group_rows: int = 4) -> pa.Table:
        pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=group_rows)
        command = [str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags, *arguments]
        assert main(command) == 0
        found = sorted((tmp_path / "out").glob("in-*.parquet"))
        return pa.concat_tables([parquet.read(path) for path in found])

    return run


def head_vectors(model, embeddings) -> np.ndarray:  # noqa: F811
    with torch.inference_mode():
        return SpatialEmbeddingsModel.from_pretrained(model).project(torch.from_numpy(embeddings)).numpy()


def as_lists(embeddings: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(list(embeddings), kind)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (pa.list_(pa.float32()), 1e-6),
        (pa.list_(pa.float64()), 1e-6),
        (pa.large_list(pa.float32()), 1e-6),
        (pa.list_(pa.float32(), DIM), 1e-6),
        (pa.list_(pa.float16(), DIM), 2e-3),  # float16 has 11 bits
        (pa.list_view(pa.float32()), 1e-6),
        (pa.large_list_view(pa.float32()), 1e-6),
    ],
    ids=str,
)
def test_embeddings_of_every_kind_of_list_go_through_the_head(kind, tolerance, model, run):  # noqa: F811
    values = EMBEDDINGS.astype(kind.value_type.to_pandas_dtype())
    table = run({"embedding": as_lists(values, kind)})
    vectors = parquet.to_matrix(table["embedding"])
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, head_vectors(model, EMBEDDINGS), atol=tolerance)


def test_other_columns_are_carried_through_with_the_row_groups(run, tmp_path):
    others = {
        "id": pa.array(range(10), pa.int64()),
        "name": pa.array([f"n{i}" for i in range(9)] + [None]),
        "tags": pa.array([["a"] * i for i in range(10)]),
        "place": pa.array([{"lat": float(i), "lon": None} for i in range(10)]),
    }
    table = run({"id": others["id"], "v": as_lists(EMBEDDINGS, pa.list_(pa.float32())), **others}, "--column", "v")
    assert table.column_names == [*others, "embedding"]
    assert table.drop(["embedding"]).equals(pa.table(others))
    groups = []
    for part in range(3):  # rows_per_part is 3: each row group of 4 is a part
        with parquet.open_file(tmp_path / "out" / f"in-{part}.parquet") as file:
            groups += [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert groups == [4, 4, 2]


def test_columns_of_arrows_view_types_are_carried_through_as_what_they_view(run, monkeypatch):
    monkeypatch.setattr(vector_tables, "BATCH_ROWS", 3)  # not all of a row group
    names = pa.array([f"n{i}" for i in range(9)] + [None])
    tags, place = pa.array([["a"] * i or None for i in range(10)]), pa.array([{"at": "x"}] * 10)
    views = {
        "name": names.cast(pa.string_view()),
        "tags": pa.array(tags.to_pylist(), pa.list_view(pa.string_view())),
        "place": place.cast(pa.struct([("at", pa.string_view())])),
    }
    columns = {**views, "v": as_lists(EMBEDDINGS, pa.list_(pa.float32())), "ok": [True] * 9 + [False]}
    table = run(columns, "--id", "name", "--valid", "ok", group_rows=10)  # pyarrow cuts no views
    assert table.drop(["embedding", "ok"]).equals(
        pa.table({"name": names, "tags": tags, "place": place}).slice(0, 9)
    )


IMAGES = {  # as a program may store JPEGS
    "bytes": pa.array(JPEGS),
    "struct": pa.array([{"bytes": b, "path": None} for b in JPEGS]),
    "alone": pa.array(JPEGS),
    "view": pa.array(JPEGS).cast(pa.binary_view()),
    "struct of a view": pa.StructArray.from_arrays([pa.array(JPEGS).cast(pa.binary_view())], ["bytes"]),
    "fixed size": pa.array([b.ljust(max(map(len, JPEGS)), b"\0") for b in JPEGS], pa.binary(max(map(len, JPEGS)))),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_go_through_the_whole_model(form, model, run):  # noqa: F811
    images = IMAGES[form]
    others = {} if form == "alone" else {"id": list(range(7))}
    table = run({**others, "image": images}, group_rows=7 if "view" in form else 4)
    assert table.column_names == [*others, "embedding"]
    assert table.drop(["embedding"]).to_pydict() == others
    assert (cosines(parquet.to_matrix(table["embedding"]), plain_vectors(model, JPEGS)) > 0.9999).all()


def test_files_of_images_go_through_one_loop_each_into_its_own(model, flags, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "in").mkdir()
    for number, count in enumerate([3, 0, 4]):
        rows = {"id": list(range(count)), "image": pa.array(JPEGS[:count], pa.binary())}
        pq.write_table(pa.table(rows), tmp_path / "in" / f"{number}.parquet")
    calls, embed = [], loop.embed
    monkeypatch.setattr(loop, "embed", lambda *arguments: calls.append(1) or embed(*arguments))
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *flags, "--set", "data.rows_per_part=100"]) == 0
    tables = [parquet.read(tmp_path / "out" / f"{number}-0.parquet") for number in range(3)]
    assert [table.num_rows for table in tables] == [3, 0, 4]
    expected = plain_vectors(model, JPEGS[:4])
    assert (cosines(parquet.to_matrix(tables[2]["embedding"]), expected) > 0.9999).all()
    assert len(calls) == 1  # else the device waits, and "auto" is tried out, for every file


def test_rows_without_a_whole_image_are_rejects_by_number(model, run, tmp_path, capsys):  # noqa: F811
    images = [*JPEGS[:5], JPEGS[5][:600], None]
    table = run({"id": list(range(7)), "image": pa.array(images)})
    assert table["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert "7 rows in, 5 out, 2 rejected" in capsys.readouterr().out
    rejects = parquet.read(tmp_path / "out_rejects" / "in-1.parquet")
    assert rejects["member"].to_pylist() == ["row 5", "row 6"]


def test_a_folder_gives_a_file_per_file_and_a_second_run_does_nothing(flags, tmp_path, capsys):  # noqa: F811
    (tmp_path / "in").mkdir()
    for number in range(3):
        rows = {"embedding": as_lists(EMBEDDINGS[: 4 * number], pa.list_(pa.float32()))}
        pq.write_table(pa.table(rows), tmp_path / "in" / f"{number}.parquet")
    command = [str(tmp_path / "in"), str(tmp_path / "out"), *flags]
    assert main(command) == 0
    assert [parquet.num_rows(tmp_path / "out" / f"{n}-0.parquet") for n in range(3)] == [0, 4, 8]
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing to do, 3 files up to date" in capsys.readouterr().out
    (tmp_path / "out" / "1-0.parquet").unlink()
    assert main(command) == 0
    assert "4 rows in, 4 out" in capsys.readouterr().out
    changed = pa.table({"embedding": as_lists(EMBEDDINGS[4:8] + 1, pa.list_(pa.float32()))})
    pq.write_table(changed, tmp_path / "in" / "1.parquet")
    with pytest.raises(StaleArtefact, match=r"an earlier version of 1\.parquet"):
        main(command)


def test_parts_are_whole_row_groups_and_only_a_missing_one_is_made(run, tmp_path, capsys):
    columns = {"id": list(range(10)), "v": as_lists(EMBEDDINGS, pa.list_(pa.float32()))}
    whole = run(columns, "--set", "data.rows_per_part=5")
    assert [parquet.num_rows(tmp_path / "out" / f"in-{part}.parquet") for part in range(2)] == [8, 2]
    (tmp_path / "out" / "in-0.parquet").unlink()
    capsys.readouterr()
    assert run(columns, "--set", "data.rows_per_part=5").equals(whole)
    assert "8 rows in, 8 out" in capsys.readouterr().out
    with pytest.raises(StaleArtefact, match="rows_per_part"):
        run(columns)


def test_intermediates_are_read_from_their_tars(model, flags, tmp_path):  # noqa: F811
    write_tar(tmp_path / "data" / "raw" / "0088.tar", [*JPEGS[:3], JPEGS[3][:600], *JPEGS[4:]])
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    write_intermediates(cfg)
    assert main([str(cfg.paths.intermediates_dir), str(tmp_path / "out"), *flags]) == 0
    table = parquet.read(tmp_path / "out" / "0088-0.parquet")
    rows = parquet.read(cfg.paths.intermediates_dir / "0088.parquet").to_pylist()
    assert table.drop(["embedding"]).to_pylist() == rows[:3] + rows[4:]
    vectors = plain_vectors(model, JPEGS[:3] + JPEGS[4:])
    assert (cosines(parquet.to_matrix(table["embedding"]), vectors) > 0.9999).all()
    assert parquet.read(tmp_path / "out_rejects" / "0088-0.parquet")["member"].to_pylist() == ["row 3"]


WRONG = {
    "no usable column": ({"a": [1, 2], "b": ["x", "y"]}, r"no column of embeddings .* or images .*a \(int64\)"),
    "two usable columns": ({"a": [[0.5]], "b": [b"x"]}, r"choose one of a, b with --column"),
    "another dimension": ({"v": [[0.5] * 31]}, r"row 0 has 31 dimensions; the model takes 32"),
    "ragged": ({"v": [[0.5] * 32, [0.5] * 3]}, r"row 1 has 3 dimensions"),
    "a row without one": ({"v": [[0.5] * 32, None]}, r"row 1 has no v"),
    "not finite": ({"v": [[0.5] * 31 + [float("nan")]]}, r"row 0 holds a value that is .*not finite"),
    "too large to square": ({"v": [[0.5] * 31 + [-1e30]]}, r"above 1e\+17"),
    "a missing number": ({"v": [[0.5] * 31 + [None]]}, r"value that is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_one_clear_error(case, run, tmp_path):
    columns, message = WRONG[case]
    with pytest.raises(PipelineError, match=message):
        run(columns)
    assert not list((tmp_path / "out").glob("*"))


def test_damaged_pages_are_one_clear_error_and_no_file(run, tmp_path, monkeypatch):
    writing = pq.write_table

    def damaging(table, path, **options):
        writing(table, path, compression="zstd", **options)
        content = bytearray(path.read_bytes())
        content[4:200] = bytes(196)
        path.write_bytes(content)

    monkeypatch.setattr(pq, "write_table", damaging)
    for column in (as_lists(EMBEDDINGS, pa.list_(pa.float32())), JPEGS):
        with pytest.raises(PipelineError, match=r"in\.parquet is damaged"):
            run({"v": column})
        assert not list((tmp_path / "out").glob("*"))


def test_a_column_that_is_not_there_and_a_name_that_is_taken_are_refused(run):
    with pytest.raises(PipelineError, match=r"no column nothing of embeddings"):
        run({"v": [[0.5] * 32]}, "--column", "nothing")
    with pytest.raises(PipelineError, match=r"already has a column embedding"):
        run({"v": [[0.5] * 32], "embedding": [1]}, "--column", "v")


def test_the_input_is_never_replaced(flags, tmp_path):  # noqa: F811
    pq.write_table(pa.table({"v": [[0.5] * 32]}), tmp_path / "in.parquet")
    with pytest.raises(PipelineError, match="is the folder of the input"):
        main([str(tmp_path / "in.parquet"), str(tmp_path), *flags])
    with pytest.raises(PipelineError, match=r"nothing\.parquet does not exist"):
        main([str(tmp_path / "nothing.parquet"), str(tmp_path / "out"), *flags])


def test_an_embedding_without_a_direction_is_refused(flags, tmp_path):  # noqa: F811
    pq.write_table(pa.table({"v": [[0.5] * 32, [1e-13] * 32]}), tmp_path / "in.parquet")
    with pytest.raises(PipelineError, match="the v of row 1 is zero, or too short to have a direction"):
        main([str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags])


def test_a_matrix_of_lists_keeps_float16_and_takes_its_dimensions_from_the_first_row(tmp_path):
    def matrix(column: pa.Array) -> np.ndarray:
        table = pa.table({"v": column})
        return parquet.embedding_matrix(tmp_path / "x.parquet", table, "v", lambda row: f"image {row}")

    assert matrix(as_lists(EMBEDDINGS.astype(np.float16), pa.list_(pa.float16()))).dtype == np.float16
    assert matrix(pa.array([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]
    wrong = {
        "holds string, not lists of numbers": pa.array(["a"]),
        "the v of image 1 has 1 dimensions; the rows before it have 2": pa.array([[1.0, 2.0], [3.0]]),
        "the v of image 0 has 0 dimensions": pa.array([[]], pa.list_(pa.float32())),
        "image 1 has no v": pa.array([[1.0], None]),
        "the v of image 1 holds a value": as_lists(
            np.array([[1.0], [np.inf]], np.float16), pa.list_(pa.float16())
        ),
    }
    for message, column in wrong.items():
        with pytest.raises(PipelineError, match=message):
            matrix(column)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, ""),  # the same vectors, rounded
        ({"views": [1.0]}, r"views = \[1.0\]; the head .* was trained on embeddings with views = \[1.0, 0.5\]"),
        ({"views": None}, r"views = \[1.0\]; the head"),  # as of files older than views
        ({"pooling": "mean"}, 'pooling = "mean"; the head'),
        ({"weights": "w1"}, 'weights = "w1"; the head'),
    ],
)
def test_our_embeddings_of_another_backbone_or_other_views_are_refused(changed, refused, model, flags, tmp_path):  # noqa: F811
    published = shutil.copytree(model, tmp_path / "published")
    trained_on = {"name": "tiny", "weights": "w0", "pooling": "cls", "views": [1.0, 0.5], "dtype": "float32"}
    record = provenance.record("convert_to_hf", {}, {})
    record = record.finished("", {}, {"trained_on": {"embedding_model": trained_on}})
    (published / "provenance.json").write_text(record.to_json())
    settings = {f"embedding_model.{key}": value for key, value in {**trained_on, **changed}.items() if value}
    made = provenance.record("generate_embeddings", settings, {})
    schema = pa.schema([("embedding", schemas.vector(pa.float32(), DIM))])
    with parquet.writer(tmp_path / "part.parquet", schema, made) as out:
        out.append({"embedding": EMBEDDINGS})
    command = [str(tmp_path / "part.parquet"), str(tmp_path / "out"), *flags, "--model", str(published)]
    if refused:
        with pytest.raises(StaleArtefact, match=refused):
            main(command)
    else:
        assert main(command) == 0
