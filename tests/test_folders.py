"""The artefacts' folders, read whole by pandas, polars, DuckDB and datasets. Oracle: our own reading, by file.

All stages have run, and have written what else they write: rejects, parts of a search, pictures, reports.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import torch
from embedding_setup import photographs
from local_backbone import write_local_backbone
from synthetic import write_dataset
from trained_model import write_checkpoint

from common import config, parquet, sections
from common.errors import PipelineError
from common.layout.former_layout import FORMER
from difficulty import compute_visual_neighbors
from generate import generate_embeddings
from preprocess import compute_fingerprints, merge_and_split, process_tar, summarize_ids
from publish import generate_embeddings_from_hf, generate_embeddings_from_parquet
from publish.hub import published_folder

SETTINGS = (
    *("embedding_model.pooling=mean", "data.max_reject_share=1", "data.rows_per_part=50", "data.neighbors=20"),
    *("data.split_by=building", "data.split_cell_m=300", "infrastructure.embedding_batch_size=16"),
    *(f"paths.{setting}={place}" for setting, place in FORMER.items()),  # which remain a choice
)
ARTEFACTS = (
    *("intermediates", "fingerprints", "embeddings", "merged", "difficulty", "summary", "summary_intermediates"),
    *("vectors", "projected"),  # by the published model: of images, one of which is damaged, and of merged/
)
IDS = ("image", "streetview_image_id", "split", "dataset_id")  # of a row, as far as a folder has them
READERS = ("pandas", "polars", "polars, lazily", "duckdb", "datasets", "datasets, by data_dir")
READ = """
import sys
from pathlib import Path

import datasets
import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.feather


def of_all_splits(found):
    return pa.concat_tables([split.data.table for split in found.values()])


def read(folder):
    yield pa.Table.from_pandas(pandas.read_parquet(folder))
    yield polars.read_parquet(folder).to_arrow()
    yield polars.scan_parquet(folder).collect().to_arrow()
    yield duckdb.sql(f"from read_parquet('{folder}/**/*.parquet')").to_arrow_table()
    yield of_all_splits(datasets.load_dataset(folder))
    yield of_all_splits(datasets.load_dataset("parquet", data_dir=folder))


datasets.disable_progress_bars()
for folder in sys.argv[1:]:
    for number, table in enumerate(read(folder)):
        pa.feather.write_feather(table, f"{Path(folder).name}-{number}.arrow", "uncompressed")
"""


def flags(root: Path) -> list[str]:
    settings = (f"paths.root={root}", f"embedding_model.name={root / 'backbone'}", *SETTINGS)
    return [word for setting in settings for word in ("--set", setting)]


def write_model(cfg: sections.Config) -> Path:
    """A published folder with a random head."""
    write_checkpoint(cfg)
    path, folder = cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt", cfg.paths.root / "published"
    checkpoint = torch.load(path, weights_only=True)
    folder.mkdir()
    published_folder.write_model(
        folder, published_folder.backbone_settings(cfg, path, checkpoint), path, checkpoint
    )
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """The folder with all artefacts' folders."""
    root = tmp_path_factory.mktemp("chain")
    data = root / "data"
    write_dataset(data / "raw", streets=4, cities=2, image_px=64, facades_per_street=3, damage=True)
    good, bad = photographs(2)
    (root / "good.jpg").write_bytes(good)
    (root / "half.jpg").write_bytes(bad[:700])
    (root / "both.txt").write_text("good.jpg\nhalf.jpg\n")
    (root / "a_half.txt").write_text("half.jpg\n")  # makes a file without a row, the first of its folder
    write_local_backbone(root / "backbone")
    stages = (process_tar, summarize_ids, compute_fingerprints, generate_embeddings)  # the first summary
    for stage in (*stages, merge_and_split, summarize_ids, compute_visual_neighbors):
        assert stage.main(flags(root)) == 0
    model = ("--model", str(write_model(config.load(None, flags(root)[1::2]))))
    for images in ("both.txt", "a_half.txt"):
        arguments = [str(root / images), str(data / "vectors"), *model]
        assert generate_embeddings_from_hf.main([*arguments, *flags(root)]) == 0
    merged = [str(data / "merged"), str(data / "projected"), *model]
    assert generate_embeddings_from_parquet.main([*merged, *flags(root)]) == 0
    return data


@pytest.fixture(scope="module")
def read(chain, tmp_path_factory) -> Path:
    """What each program reads in each folder, in a process of its own: train/datasets.py is another module."""
    out = tmp_path_factory.mktemp("read")
    (out / "read.py").write_text(READ)
    environment = {**os.environ, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1"}
    folders = [str(chain / name) for name in ARTEFACTS]
    subprocess.run([sys.executable, "read.py", *folders], cwd=out, env=environment, check=True, timeout=120)
    return out


def test_what_is_about_a_folder_lies_beside_it(chain):
    beside = {path.relative_to(chain).as_posix() for path in chain.glob("*_*/*")}
    assert beside == {
        *(f"intermediates_rejects/{path.name}" for path in (chain / "intermediates").iterdir()),
        *(f"intermediates_index/{path.name}" for path in (chain / "intermediates").iterdir()),
        *(f"merged_report/{name}" for name in ("split_report.json", "split_map.png", "duplicates.png")),
        *("summary_report/summary.json", "summary_report/summary.html", "summary_intermediates/summary.parquet"),
        *("summary_intermediates_report/summary.json", "summary_intermediates_report/summary.html"),
        *("difficulty_parts/00000.parquet", "difficulty_parts/00001.parquet"),
        *(f"difficulty_report/{name}" for name in ("bands.json", "bands.png", "band_pairs.png")),
        *("vectors_rejects/both-0.parquet", "vectors_rejects/a_half-0.parquet"),
    }


@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.parametrize("number", range(len(READERS)), ids=READERS)
def test_a_program_that_reads_a_folder_gets_exactly_its_rows(chain, read, name, number):
    expected = pa.concat_tables([parquet.read(path) for path in (chain / name).glob("*.parquet")])
    found = pa.feather.read_table(read / f"{name}-{number}.arrow")
    assert found.num_rows == expected.num_rows > 0
    assert found.column_names == expected.column_names
    keys = [(name, "ascending") for name in IDS if name in found.column_names]
    found, expected = found.sort_by(keys), expected.sort_by(keys)
    for column, kind in zip(expected.schema.names, expected.schema.types, strict=True):
        ours, theirs = expected[column], found[column]
        if pa.types.is_fixed_size_list(kind):
            ours, theirs = parquet.to_matrix(ours), np.array(theirs.to_pylist(), kind.value_type.to_pandas_dtype())
            assert np.array_equal(ours, theirs), column
        else:
            assert theirs.to_pylist() == ours.to_pylist(), column


OLD = {  # stage -> where older versions wrote, and where it writes now
    process_tar: {"intermediates/rejects": "intermediates_rejects/0088.parquet"},
    generate_embeddings: {"embeddings/rejects": "embeddings_rejects/0088-0.parquet"},
    merge_and_split: {"merged": "merged_report/*"},
    summarize_ids: {"summary": "summary_report/*"},
    compute_visual_neighbors: {"difficulty/parts": "difficulty_parts/*", "difficulty": "difficulty_report/*"},
}


@pytest.mark.parametrize("stage", OLD, ids=lambda stage: stage.__name__)
def test_files_of_the_old_layout_are_refused_until_the_command_that_is_told_has_moved_them(chain, tmp_path, stage):
    root = tmp_path / "a root"  # paths with spaces are quoted
    shutil.copytree(chain.parent, root)
    (root / "data/embeddings_rejects").mkdir()
    shutil.copy(root / "data/intermediates_rejects/0088.parquet", root / "data/embeddings_rejects/0088-0.parquet")
    before = set(root.rglob("*.*"))
    for old, now in OLD[stage].items():
        (root / "data" / old).mkdir(exist_ok=True)
        for path in (root / "data").glob(now):
            path.rename(root / "data" / old / path.name)
    for _ in OLD[stage]:  # one error for each folder beside
        with pytest.raises(PipelineError, match="move them out") as refused:
            stage.main(flags(root))
        subprocess.run(str(refused.value).split("move them out:")[1], shell=True, check=True)
    assert set(root.rglob("*.*")) == before
    assert stage.main(flags(root)) == 0
