"""New data through the published model in shards (publish/inference/vector_stage.py), with ids and validity.

Oracle: one undisturbed process; the published model run plainly.
"""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from embedding_setup import cosines, jpeg, photographs, picture
from test_generate_embeddings_from_hf import flags, image_folder, model, plain_vectors  # noqa: F401 - fixtures
from test_generate_embeddings_from_parquet import EMBEDDINGS, head_vectors
from trained_model import JPEGS

from common import cli, parquet
from common.errors import PipelineError, StaleArtefact
from publish import generate_embeddings_from_hf, generate_embeddings_from_parquet

EMBED = {"hf": generate_embeddings_from_hf.main, "parquet": generate_embeddings_from_parquet.main}


def write_photographs(folder: Path) -> None:
    """Three files in row groups of 3: parts of 3, 3, 1 rows, one without a row, and one of 2 rows."""
    folder.mkdir()
    for name, jpegs in {"a": JPEGS, "b": [], "c": JPEGS[2:4]}.items():
        ids = [100 * len(jpegs) + number for number in range(len(jpegs))]
        valid = [number % 4 != 3 for number in range(len(jpegs))]
        images = [content if number != 5 else content[:600] for number, content in enumerate(jpegs)]
        columns = {
            "osm_id": pa.array(ids, pa.int64()),
            "jpeg": pa.array(images, pa.binary()),
            "is_valid": pa.array(valid, pa.bool_()),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=3)


def write_embeddings(folder: Path) -> None:
    folder.mkdir()
    for name, count in {"a": 10, "b": 0, "c": 4}.items():
        columns = {"embedding": pa.array(list(EMBEDDINGS[:count]), pa.list_(pa.float32()))}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=4)


SOURCES = {  # script, how its input is written, further flags, parts
    "photographs": ("parquet", write_photographs, ["--id", "osm_id", "--valid", "is_valid"], 5),
    "embeddings": ("parquet", write_embeddings, [], 5),
    "images": ("hf", image_folder, [], 3),
}


def written(out: Path) -> dict[str, tuple[str, pa.Table]]:
    """Each file of vectors or rejects, with the digest of its rows as written."""
    paths = [*out.glob("*"), *Path(f"{out}_rejects").glob("*")]
    return {f"{p.parent.name}/{p.name}": (parquet.read_provenance(p).id, parquet.read(p)) for p in sorted(paths)}


@pytest.fixture(params=SOURCES)
def source(request, flags, tmp_path):  # noqa: F811
    """(a function that embeds the source into a folder, the number of its parts)"""
    script, write, more, num_parts = SOURCES[request.param]
    write(tmp_path / "in")

    def embed(out: Path, *arguments: str) -> int:
        return EMBED[script]([str(tmp_path / "in"), str(out), *flags, *more, *arguments])

    return embed, num_parts


@pytest.mark.parametrize("num_shards", [2, 9])  # 9: more than there are parts
def test_any_number_of_shards_leaves_the_files_of_one_process(num_shards, source, tmp_path, capsys):
    embed, num_parts = source
    assert embed(tmp_path / "one" / "out") == 0
    out, counts = tmp_path / "many" / "out", []
    for shard in reversed(range(num_shards)):
        before = len(list(out.glob("*")))
        capsys.readouterr()
        assert embed(out, "--shard", str(shard), "--num-shards", str(num_shards)) == 0
        counts.append(len(list(out.glob("*"))) - before)
        assert ("nothing to do, 0 files" in capsys.readouterr().out) == (counts[-1] == 0)
    assert sum(counts) == num_parts
    assert max(counts) - min(counts) == 1  # as even as it can be, over all files of the input
    assert written(out) == written(tmp_path / "one" / "out")


def test_a_stopped_shard_ends_with_85_and_its_next_run_makes_the_rest(source, tmp_path, monkeypatch, capsys):
    embed, num_parts = source
    assert embed(tmp_path / "one" / "out") == 0
    out, shard = tmp_path / "many" / "out", ("--shard", "0", "--num-shards", "2")
    monkeypatch.setattr(cli, "_stop_signal", signal.SIGUSR2)
    assert cli.exit_code_of(lambda: embed(out, *shard)) == cli.EXIT_STOPPED
    (first,) = out.glob("*")
    written_at = first.stat().st_mtime_ns
    monkeypatch.setattr(cli, "_stop_signal", None)
    assert embed(out, *shard) == 0
    assert first.stat().st_mtime_ns == written_at
    assert len(list(out.glob("*"))) == -(-num_parts // 2)
    assert embed(out, "--shard", "1", "--num-shards", "2") == 0
    assert written(out) == written(tmp_path / "one" / "out")
    capsys.readouterr()
    assert embed(out) == 0  # also in another number of shards there is nothing left
    assert f"nothing to do, {num_parts} files up to date" in capsys.readouterr().out


RUN_AND_KILL = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
out, arguments = Path(sys.argv[2]), sys.argv[3:]
from publish.inference import vector_parts
from publish.generate_embeddings_from_parquet import main
for wanted in (0, 1, 3, 4, 6):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    ended = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while len(list(out.glob("*.parquet"))) < wanted and not ended():
        time.sleep(0.001)
    time.sleep(0.01 * (wanted % 3))
    os.kill(child, signal.SIGKILL)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
"""


def test_a_shard_killed_at_any_moment_ends_with_the_same_bits(flags, tmp_path):  # noqa: F811
    jpegs = photographs(40)
    rows = {"osm_id": list(range(40)), "jpeg": jpegs, "ok": [number % 5 > 0 for number in range(40)]}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet", row_group_size=1)
    flags = [*flags, "--set", "data.rows_per_part=1", "--id", "osm_id", "--valid", "ok"]
    flags += ["--shard", "1", "--num-shards", "2"]
    arguments = [str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags]
    command = [sys.executable, "-c", RUN_AND_KILL, str(ROOT), str(tmp_path / "out"), *arguments]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.stdout.split() == ["True"] * 5, killed.stderr  # none had ended by itself
    assert len(list((tmp_path / "out").glob("in-*.parquet"))) < 20
    assert EMBED["parquet"](arguments) == 0
    assert EMBED["parquet"]([str(tmp_path / "in.parquet"), str(tmp_path / "one" / "out"), *flags]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 20  # no temporary file
    assert written(tmp_path / "out") == written(tmp_path / "one" / "out")


# ------------------------------------------------------------------------------------------- ids, validity


def test_each_row_of_photographs_has_a_vector_or_a_reject_by_its_id(model, flags, tmp_path, capsys):  # noqa: F811
    write_photographs(tmp_path / "in")
    command = [str(tmp_path / "in"), str(tmp_path / "out"), *flags, "--id", "osm_id", "--valid", "is_valid"]
    assert EMBED["parquet"](command) == 0
    told = capsys.readouterr().out
    assert "9 rows in, 7 out, 2 rejected" in told
    assert "marked_invalid 1" in told
    vectors = pa.concat_tables([parquet.read(path) for path in sorted((tmp_path / "out").glob("*"))])
    assert vectors.column_names == ["osm_id", "is_valid", "embedding"]
    assert vectors["osm_id"].to_pylist() == [700, 701, 702, 704, 706, 200, 201]
    expected = plain_vectors(model, [JPEGS[n] for n in (0, 1, 2, 4, 6, 2, 3)])
    assert (cosines(parquet.to_matrix(vectors["embedding"]), expected) > 0.9999).all()
    rejects = parquet.read(tmp_path / "out_rejects" / "a-1.parquet").to_pylist()
    assert {row["member"]: row["reason"] for row in rejects} == {"703": "marked_invalid", "705": "jpeg_corrupt"}
    assert [path.name for path in (tmp_path / "out_rejects").iterdir()] == ["a-1.parquet"]
    record = parquet.read_provenance(tmp_path / "out" / "a-1.parquet")
    assert record.rows == {"in": 3, "out": 1, "marked_invalid": 1, "jpeg_corrupt": 1}


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8()], ids=str)
def test_what_a_validity_column_rules_out_is_not_looked_at(kind, model, flags, tmp_path):  # noqa: F811
    """Neither as an embedding, which would be an error, nor as an image; empty is not true."""
    valid = pa.array([True, False, None, True, False, True, True, True, True, True]).cast(kind)
    wrong = [*EMBEDDINGS[:1], [0.5] * 3, None, EMBEDDINGS[3], [float("nan")] * 32, *EMBEDDINGS[5:]]
    table = {"v": pa.array(wrong, pa.list_(pa.float32())), "ok": valid, "id": [f"n{i}" for i in range(9)] + [None]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet", row_group_size=4)
    command = [str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags, "--valid", "ok", "--id", "id"]
    assert EMBED["parquet"](command) == 0
    found = pa.concat_tables([parquet.read(path) for path in sorted((tmp_path / "out").glob("*"))])
    kept = [0, 3, 5, 6, 7, 8, 9]
    assert found["id"].to_pylist() == [table["id"][row] for row in kept]
    assert np.allclose(parquet.to_matrix(found["embedding"]), head_vectors(model, EMBEDDINGS[kept]), atol=1e-6)
    rejects = [parquet.read(path) for path in sorted((tmp_path / "out_rejects").glob("*"))]
    assert pa.concat_tables(rejects)["member"].to_pylist() == ["n1", "n2", "n4"]
    wrong[9] = [0.5] * 3  # of the row without an id
    pq.write_table(pa.table(table | {"v": pa.array(wrong, pa.list_(pa.float32()))}), tmp_path / "in.parquet")
    with pytest.raises(PipelineError, match="the v of row 9 has 3 dimensions"):
        EMBED["parquet"]([*command, "--overwrite"])


def test_a_part_in_which_nothing_is_valid_has_no_rows(flags, tmp_path):  # noqa: F811
    for number, column in enumerate([pa.array(JPEGS[:3]), pa.array([[0.5] * 32] * 3)]):
        path, out = tmp_path / f"{number}.parquet", tmp_path / f"out{number}"
        pq.write_table(pa.table({"v": column, "ok": [False] * 3}), path)
        assert EMBED["parquet"]([str(path), str(out), *flags, "--valid", "ok"]) == 0
        part = parquet.read(out / f"{number}-0.parquet")
        assert (part.num_rows, part.schema.field("embedding").type.list_size) == (0, 16)
        rejects = parquet.read(Path(f"{out}_rejects") / f"{number}-0.parquet")
        assert rejects["member"].to_pylist() == ["row 0", "row 1", "row 2"]


def test_another_validity_column_makes_the_files_stale_and_another_id_does_not(flags, tmp_path, capsys):  # noqa: F811
    write_photographs(tmp_path / "in")
    command = [str(tmp_path / "in"), str(tmp_path / "out"), *flags]
    assert EMBED["parquet"](command) == 0
    with pytest.raises(StaleArtefact, match=r'valid = null \(now "is_valid"'):
        EMBED["parquet"]([*command, "--valid", "is_valid"])
    part = tmp_path / "out" / "a-0.parquet"
    record, rows = parquet.read_provenance(part), parquet.read(part)
    older = dataclasses.replace(record, config={key: v for key, v in record.config.items() if key != "valid"})
    with parquet.writer(part, rows.schema.remove_metadata(), older) as out:  # as of before there was --valid
        out.append(rows)
    capsys.readouterr()
    assert EMBED["parquet"]([*command, "--id", "osm_id"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--valid", "nothing"], "has no column nothing beside that of the data: where, osm_id"),
        (["--valid", "osm_id"], r"the column osm_id \(string\) cannot be read as true or false"),
        (["--id", "where"], r"the column where \(struct<lat: double>\) cannot be read as names"),
        (["--id", "jpeg"], "has no column jpeg beside"),
    ],
)
def test_columns_that_cannot_be_used_are_refused_before_the_model_is_loaded(arguments, message, flags, tmp_path):  # noqa: F811
    rows = {"where": [{"lat": 0.5}], "osm_id": ["n1"], "jpeg": [jpeg(picture(20, 20))]}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    with pytest.raises(PipelineError, match=message):
        EMBED["parquet"]([str(tmp_path / "in.parquet"), str(tmp_path / "out"), *flags, *arguments])
