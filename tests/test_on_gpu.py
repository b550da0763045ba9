"""tests/benchmarks/on_gpu.py: what it does on a card, tried on a simulated one; and what it says without any."""

import json
import sys

import generated_docs
import numpy as np
import pytest
import simulated_cuda
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import bench_neighbors
import gpu_equality
import gpu_rows
import gpu_speed
import on_gpu
import run_all

from common.errors import PipelineError
from publish.inference import model_sizes
from train.evaluation import heads


def test_a_dry_run_has_all_rows_and_the_results_of_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generated_docs, "MEASURED", tmp_path)
    assert generated_docs.on_gpu().startswith("No GPU has been measured")
    with simulated_cuda.installed() as cuda:
        code = on_gpu.main(["--small", "--json", str(tmp_path / "on_gpu.json")])
    text = capsys.readouterr().out
    assert code == 0, text
    assert not cuda.races
    found = json.loads((tmp_path / "on_gpu.json").read_text())
    assert found["machine"].startswith("simulated, torch ")
    assert all(row["is_right"] for row in found["rows"])
    of_cpu = [row for row in found["rows"] if row["against"].startswith("the CPU")]
    stages = ("search", "moments", "training", "evaluation", "head embedding", "generation")
    assert {row["what"].partition(",")[0].partition(":")[0] for row in of_cpu} == set(stages)
    measured = [row for row in found["rows"] if row not in of_cpu]
    assert all(row["value"] > 0 for row in measured if "compiled" not in row["what"])
    assert [row["note"] for row in measured if "compiled" in row["what"]] == 3 * ["--small"]
    for size in "SBL":
        units = [row["unit"] for row in measured if f"ViT-{size}/14, " in row["what"] and row["value"]]
        assert units == ["images/s"] * 3 + ["MB"]  # beside the bare pass, of the peak, from JPEGs
    assert [row["against"] for row in measured if row["unit"] == "anchors/s"] == [
        "plain tiles",
        "the product alone",
    ]
    assert all(row["what"] in text for row in found["rows"])
    table = generated_docs.on_gpu()
    assert table.startswith("Measured on simulated, torch ")
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [
        f"| {row['what']}" for row in found["rows"]
    ]
    assert table.count("| skipped |") == 3


def test_a_check_that_fails_costs_no_other_row(monkeypatch, tmp_path, capsys):
    def fails(gpu):
        yield gpu_rows.Row("before it fails", 1.0, "images/s")
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf all that there is")

    differs = lambda gpu: iter([gpu_rows.equality("the same", np.int64(1), 0, "of 2 differ")])  # noqa: E731
    last = lambda gpu: iter([gpu_rows.Row("the last one", 2.0, "images/s")])  # noqa: E731
    monkeypatch.setattr(gpu_equality, "CHECKS", {"the first": fails})
    monkeypatch.setattr(gpu_speed, "CHECKS", {"the second": differs, "the third": last})
    with simulated_cuda.installed():
        assert on_gpu.main(["--small", "--json", str(tmp_path / "on_gpu.json")]) == 1
    rows = [gpu_rows.Row(**row) for row in json.loads((tmp_path / "on_gpu.json").read_text())["rows"]]
    monkeypatch.setattr(generated_docs, "MEASURED", tmp_path)
    found = [line.split(" | ")[1] for line in generated_docs.on_gpu().splitlines()[4:]]
    assert found == ["1 images/s", "**failed**", "1 of 2 differ, **wrong**", "2 images/s"]
    assert [gpu_rows.found(row) for row in rows] == ["1 images/s", "failed", "1 of 2 differ", "2 images/s"]
    assert [row.is_right for row in rows] == [True, False, False, True]
    assert rows[1].note == "OutOfMemoryError: CUDA out of memory."
    assert capsys.readouterr().out.count("WRONG") == 2


def test_results_that_differ_a_little_are_wrong(monkeypatch):
    embed, nearest = heads.embed, gpu_equality.nearest

    def embedded(head, embeddings, device):
        return embed(head, embeddings, device) * (1 + 1e-3 * (device.type == "cuda"))

    def found(*args):
        rows, similarities = nearest(*args)
        if args[-1].type == "cuda":
            rows[7, :2] = rows[7, 1::-1]  # two neighbours in the other order
        return rows, similarities

    monkeypatch.setattr(heads, "embed", embedded)
    monkeypatch.setattr(gpu_equality, "nearest", found)
    with simulated_cuda.installed():
        gpu = gpu_rows.Gpu(torch.device("cuda"), "", gpu_rows.SMALL)
        assert [row.is_right for row in gpu_equality.head(gpu)] == [False]
        assert [row.is_right for row in gpu_equality.search(gpu)] == [False, True] * 2


def test_no_check_begins_when_there_is_no_time_left(monkeypatch):
    monkeypatch.setattr(gpu_equality, "CHECKS", {})
    monkeypatch.setattr(on_gpu, "LATEST_S", -1)
    rows = on_gpu.all_rows(gpu_rows.Gpu(torch.device("cuda"), "", gpu_rows.FULL))
    assert len(rows) == len(gpu_speed.CHECKS)
    assert {gpu_rows.found(row) for row in rows} == {"skipped"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_known_by_its_name(name, peak):
    known = gpu_rows.Gpu(torch.device("cuda"), name, gpu_rows.FULL).peak
    assert known == (peak and (peak, model_sizes.GPUS[peak][0]))


def test_plain_tiles_find_what_products_in_float64_find(monkeypatch):
    monkeypatch.setattr(bench_neighbors, "PLAIN_TILE", {"cpu": (50, 70)})
    vectors, zones = bench_neighbors.made_up(400)
    rows = np.arange(100, 260)
    found = bench_neighbors.plain_tiles(torch.from_numpy(vectors), zones, 150, torch.device("cpu"), rows).numpy()
    expected = bench_neighbors.in_float64(vectors, zones, rows)
    assert np.mean(found == expected) > 0.999  # float32: near ties
    few, zones = bench_neighbors.made_up(40)  # of which 12 or more are in each row's zone
    found = bench_neighbors.plain_tiles(torch.from_numpy(few), zones, 150, torch.device("cpu")).numpy()
    for row, neighbors in enumerate(found):
        allowed = np.setdiff1d(np.arange(40), zones.rows_of(np.array([row]), own=True)[1])
        np.testing.assert_array_equal(np.sort(neighbors[: len(allowed)]), allowed)
        assert (neighbors[len(allowed) :] == -1).all()


def test_without_a_card_two_lines_say_what_it_needs_and_make_bench_goes_on(run_script, capsys):
    with pytest.raises(PipelineError, match=r"^torch .* sees no CUDA device.*\n.*nvidia-smi.*$"):
        on_gpu.main([])
    assert run_all.on_gpu() == 0
    assert "on_gpu: skipped" in capsys.readouterr().out
    shown = run_script("tests/benchmarks/on_gpu.py", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Command  python tests/benchmarks/on_gpu.py" in shown.stdout
