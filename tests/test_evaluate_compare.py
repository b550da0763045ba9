"""train/evaluate.py --compare and --embeddings: further rows, and other files by the same protocol.

Oracle: the row that the same vectors have in the evaluation by itself.
"""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_evaluation
import small_merge
import torch
from small_evaluation import run

from common import config, parquet
from common.errors import PipelineError, StaleArtefact
from train.evaluation import metrics_json

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def own(tmp_path):
    """(Configuration, columns by split, checkpoint) of a merge for a test to spoil."""
    return small_evaluation.write(tmp_path)


def published(cfg, folder, checkpoint_path):
    """A folder as publish/convert_to_hf.py writes it, but for the backbone."""
    from safetensors.torch import save_file

    from common import provenance

    checkpoint = torch.load(checkpoint_path, weights_only=True)
    folder.mkdir(parents=True)
    sizes = {key: checkpoint[key] for key in ("input_dim", "hidden_dim", "output_dim", "dropout")}
    (folder / "config.json").write_text(json.dumps(sizes))
    weights = {f"head.{name}": tensor for name, tensor in checkpoint["head"].items()}
    save_file({**weights, "backbone.weight": torch.zeros(3)}, folder / "model.safetensors")
    trained_on = {"inputs": checkpoint["provenance"]["inputs"], "embedding_model": checkpoint["embedding_model"]}
    made = provenance.record("convert_to_hf", {}, {}).finished("published1", {}, {"trained_on": trained_on})
    (folder / "provenance.json").write_text(json.dumps(made.to_dict()))
    return folder


def other_vectors(path, columns, **changes):
    """A file of another model's vectors as another program would write it: plain lists, in another order."""
    frame = pd.DataFrame({name: list(column) for name, column in {**columns, **changes}.items()})
    frame.sample(frac=1, random_state=0).to_parquet(path)
    return path


def test_checkpoints_published_folders_and_files_are_further_rows(own, tmp_path):
    cfg, columns, first = own
    second = small_merge.write_checkpoint(small_merge.of_run(cfg, "second"), seed=3)
    folder = published(cfg, tmp_path / "hub" / "model", second)
    file = other_vectors(tmp_path / "theirs.parquet", columns["test"])
    assert run(cfg) == 0
    assert run(cfg, "--compare", str(second), str(first.parent), str(folder), str(file)) == 0
    alone = metrics_json.read(cfg.paths.evaluation_dir / "metrics.json")
    found = metrics_json.read(cfg.paths.evaluation_dir / "compared" / "metrics.json")
    assert list(found["methods"]) == ["raw", "pca", "whitening", "trained", "second", "default", "model", "theirs"]
    for name in alone["methods"]:
        assert found["methods"][name] == alone["methods"][name]
    assert found["methods"]["default"] == found["methods"]["trained"]  # the same head
    assert found["methods"]["model"] == found["methods"]["second"] != found["methods"]["trained"]
    assert found["methods"]["theirs"] == found["methods"]["raw"]  # the same vectors
    assert found["differences"]["trained-default"]["map@r"]["value"] == 0
    assert found["provenance"]["inputs"]["model"] == "published1"
    page = (cfg.paths.evaluation_dir / "compared" / "report.html").read_text()
    assert "the published model in" in page
    assert 'href="../explorer.html"' in page  # of the run


def test_what_cannot_be_compared_is_refused(own, tmp_path):
    cfg, columns, first = own
    folder = published(cfg, tmp_path / "model", first)
    few = {name: column[:50] for name, column in columns["test"].items()}
    twice = {
        **columns["test"],
        "streetview_image_id": ["0088_40000", *columns["test"]["streetview_image_id"][:-1]],
    }
    for path, message in (
        (other_vectors(tmp_path / "few.parquet", few), "no vector of image 0088_40050 and 9 more"),
        (other_vectors(tmp_path / "twice.parquet", twice), "twice.parquet holds image 0088_40000 twice"),
        (tmp_path / "gone.pt", "gone.pt does not exist"),
        (cfg.paths.root, "neither a run's folder nor one written by publish/convert_to_hf.py"),
    ):
        with pytest.raises(PipelineError, match=message):
            run(cfg, "--compare", str(path))
    with pytest.raises(PipelineError, match=r"names .* twice"):
        run(cfg, "--compare", *[str(folder)] * 40)
    columns["train"]["heading"][0] += 1
    small_merge.write_split(cfg, "train", columns["train"])
    small_merge.write_checkpoint(cfg)
    with pytest.raises(StaleArtefact, match=r"model was trained on an earlier version of .*train.parquet"):
        run(cfg, "--compare", str(folder))


def test_a_file_of_vectors_is_evaluated_by_the_same_protocol(own, tmp_path):
    cfg, columns, _ = own
    assert run(cfg) == 0
    path = tmp_path / "theirs.parquet"
    vectors = columns["test"]["embedding"].astype(np.float64)
    frame = pd.read_parquet(cfg.paths.merged_dir / "test.parquet")  # these two lines are in docs/training.md
    frame.assign(embedding=list(vectors)).to_parquet(path)
    elsewhere = config.load(None, [f"paths.root={tmp_path / 'elsewhere'}"])  # no merge, no checkpoint
    assert run(elsewhere, "--embeddings", str(path)) == 0
    ours = metrics_json.read(cfg.paths.evaluation_dir / "metrics.json")
    theirs = metrics_json.read(elsewhere.paths.evaluation_dir / "theirs" / "metrics.json")
    assert theirs["methods"] == {"raw": ours["methods"]["raw"]}
    assert theirs["leakage"] is None
    page = (elsewhere.paths.evaluation_dir / "theirs" / "report.html").read_text()
    assert "theirs.parquet" in page
    assert "explorer.html" not in page


def test_a_split_by_itself_is_known_by_its_record(own, tmp_path):
    cfg, *_ = own
    path = cfg.paths.merged_dir / "val.parquet"
    assert run(cfg, "--embeddings", str(path.relative_to(tmp_path))) == 0  # as docs/training.md says
    found = metrics_json.read(cfg.paths.evaluation_dir / "val" / "metrics.json")
    assert found["provenance"]["inputs"] == {"val.parquet": parquet.read_provenance(path).id}
    assert found["counts"]["queries"] == 60


def test_a_file_that_cannot_be_evaluated_is_refused_with_the_reason(own, tmp_path):
    cfg, columns, _ = own
    test, path = columns["test"], tmp_path / "theirs.parquet"
    wrong = {
        "no column pitch": lambda frame: frame.drop(columns="pitch"),
        "image 0088_40001 has 3 dimensions; the rows before it have 24": lambda frame: frame.assign(
            embedding=[*frame["embedding"][:1], np.zeros(3, np.float16), *frame["embedding"][2:]]
        ),
        "image 0088_40002 holds a value that is missing, not finite": lambda frame: frame.assign(
            embedding=[*frame["embedding"][:2], np.full(24, np.inf, np.float16), *frame["embedding"][3:]]
        ),
        "image 0088_40000 has no embedding": lambda frame: frame.assign(embedding=[None, *frame["embedding"][1:]]),
        "building 0088_.* are not contiguous": lambda frame: frame.sample(frac=1, random_state=0),
        "column heading has empty or non-finite values": lambda frame: frame.assign(heading=np.inf),
        "no query has a match": lambda frame: frame.iloc[::3],
        "has no rows": lambda frame: frame.iloc[:0],
        "the column embedding holds double, not lists": lambda frame: frame.assign(embedding=1.0),
        "embedding holds list<element: string>, not": lambda frame: frame.assign(embedding=[["1"]] * len(frame)),
        "embedding of image .* has 0 dimensions": lambda frame: frame.assign(embedding=[np.zeros(0)] * len(frame)),
        "column heading is .*string, not float": lambda frame: frame.assign(heading="north"),
        "column target_id is double, not int64": lambda frame: frame.assign(target_id=frame["target_id"] + 0.5),
    }
    for message, spoil in wrong.items():
        spoil(pd.DataFrame({name: list(column) for name, column in test.items()})).to_parquet(path)
        with pytest.raises(PipelineError, match=message):
            run(cfg, "--embeddings", str(path))
    for gone in (tmp_path / "gone.parquet", tmp_path):
        with pytest.raises(PipelineError, match=rf"{gone} does not exist or is not a file"):
            run(cfg, "--embeddings", str(gone))


def test_types_of_other_programs_are_read_as_ours(own, tmp_path):
    cfg, columns, _ = own
    assert run(cfg) == 0
    frame = pd.DataFrame({name: list(column) for name, column in columns["test"].items()})
    frame = frame.assign(dataset_id=frame["dataset_id"].astype(float), patch_id=0, image_size=1.0)  # as by a join
    table = pa.Table.from_pandas(frame, preserve_index=False)
    place = table.schema.get_field_index("embedding")
    table = table.set_column(
        place, "embedding", table["embedding"].cast(pa.large_list(pa.float64()))
    )  # as by polars
    pq.write_table(table, tmp_path / "theirs.parquet")
    assert run(cfg, "--embeddings", str(tmp_path / "theirs.parquet")) == 0
    ours = metrics_json.read(cfg.paths.evaluation_dir / "metrics.json")
    theirs = metrics_json.read(cfg.paths.evaluation_dir / "theirs" / "metrics.json")
    assert theirs["methods"]["raw"] == ours["methods"]["raw"]
    assert theirs["breakdowns"]["dataset"]["classes"][0]["class"] == "0088"


def test_other_vectors_in_a_file_of_the_same_name_and_size_are_noticed(own, tmp_path):
    cfg, columns, _ = own
    test, path, sizes = columns["test"], tmp_path / "theirs.parquet", set()
    for sign in (1, -1):
        frame = pd.DataFrame({name: list(column) for name, column in test.items()})
        frame = frame.assign(embedding=list(sign * test["embedding"]))
        frame.to_parquet(path, compression=None, use_dictionary=False, write_statistics=False)
        sizes.add(path.stat().st_size)
        if sign == 1:
            assert run(cfg, "--embeddings", str(path)) == 0
    assert len(sizes) == 1
    with pytest.raises(StaleArtefact, match=r"made from an earlier version of theirs.parquet"):
        run(cfg, "--embeddings", str(path))
