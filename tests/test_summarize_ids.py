"""preprocess/summarize_ids.py. Oracle: counting with sets, in plain Python."""

import json
import statistics

import numpy as np
import pandas as pd
import pytest
from conftest import paths_below

from common import parquet, provenance, schemas
from common.cli import exit_code_of
from common.errors import StaleArtefact
from common.places import geo
from preprocess import summarize_ids
from preprocess.split import cell_maps
from preprocess.summary import id_summary


def columns(schema, rows):
    """`rows`: (dataset, target, patch, view, heading, distance); the other columns hold nothing of interest."""
    rows = np.array(rows, float).reshape(-1, 6)
    known = dict(
        zip(("dataset_id", "target_id", "patch_id", "street_view_id", "heading", "distance"), rows.T, strict=True)
    )
    known |= {
        "target_lat": 40 + known["dataset_id"] / 100 + known["target_id"] / 1e5,
        "target_lon": -74 + 0 * rows[:, 0],
    }
    found = {}
    for field in schema:
        kind = (
            "str"
            if field.type == "string"
            else "float16"
            if field.name == "embedding"
            else field.type.to_pandas_dtype()
        )
        if field.name == "embedding":
            found[field.name] = np.zeros((len(rows), 2), kind)
        elif field.type == "string":
            found[field.name] = ["x"] * len(rows)
        else:
            found[field.name] = known.get(field.name, np.zeros(len(rows))).astype(kind)
    return found  # fmt: skip


def run(root, *flags):
    return summarize_ids.main(["--set", f"paths.root={root}", "--set", "data.split_cell_m=300", *flags])


def random_rows(seed, n=500):
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            rng.integers(1, 5, n),
            rng.integers(0, 40, n),
            np.arange(n),
            rng.integers(0, 60, n),
            rng.uniform(-180, 360, n),
            rng.uniform(1, 300, n),
        ],
        axis=1,
    )


def write(path, schema, rows, stage):
    with parquet.writer(path, schema, provenance.record(stage, {}, {})) as out:
        out.append(columns(schema, rows))


@pytest.fixture
def merged(tmp_path):
    splits = {name: random_rows(seed) for seed, name in enumerate(("train", "val", "test"))}
    for name, rows in splits.items():
        write(paths_below(tmp_path).merged_dir / f"{name}.parquet", schemas.merged(2), rows, "merge_and_split")
    return tmp_path, splits


def test_two_buildings_of_one_dataset(tmp_path):
    rows = [(88, 1, 0, 5, 0, 10), (88, 1, 1, 6, 359, 20), (88, 2, 2, 5, -1, 600)]
    write(tmp_path / "data/intermediates/0088.parquet", schemas.INTERMEDIATES, rows, "process_tar")
    assert run(tmp_path) == 0
    [row] = parquet.read(
        paths_below(tmp_path).summary_dir.with_name("summary_intermediates") / "summary.parquet"
    ).to_pylist()
    assert (row["split"], row["dataset_id"], row["images"], row["buildings"], row["panoramas"]) == (
        "all",
        88,
        3,
        2,
        2,
    )
    assert (row["views_min"], row["views_median"], row["views_max"], row["distance_median"]) == (1, 1.5, 2, 20)
    report = json.loads(
        (paths_below(tmp_path).summary_dir.with_name("summary_intermediates_report") / "summary.json").read_text()
    )
    assert report["splits"] == {"all": {"images": 3, "buildings": 2, "panoramas": 2, "datasets": 1}}
    assert report["histograms"]["all"]["views"][:3] == [1, 1, 0]
    assert report["histograms"]["all"]["heading"][0] == 1
    assert report["histograms"]["all"]["heading"][-1] == 2  # -1 and 359 degrees are one direction
    assert report["histograms"]["all"]["distance"][-1] == 1  # beyond the last edge, and counted


def test_counts_are_those_of_sets(merged):
    root, splits = merged
    run(root)
    told = {
        (r["split"], r["dataset_id"]): r
        for r in parquet.read(paths_below(root).summary_dir / "summary.parquet").to_pylist()
    }
    assert len(told) == 12
    for split, rows in splits.items():
        for dataset in range(1, 5):
            here = [row for row in rows.tolist() if row[0] == dataset]
            targets = [row[1] for row in here]
            views = [targets.count(target) for target in set(targets)]
            row = told[split, dataset]
            assert row["images"] == len(here)
            assert row["buildings"] == len(set(targets))
            assert row["panoramas"] == len({row[3] for row in here})
            assert row["views_min"] == min(views)
            assert row["views_median"] == statistics.median(views)
            assert row["views_mean"] == pytest.approx(statistics.mean(views))
            assert row["views_max"] == max(views)
            assert row["distance_median"] == pytest.approx(statistics.median(r[5] for r in here), rel=1e-6)
    report = json.loads((paths_below(root).summary_dir.with_name("summary_report") / "summary.json").read_text())
    assert report["datasets"] == [{**row, "split": split} for (split, _), row in told.items()]
    for counts in report["histograms"].values():
        assert sum(counts["distance"]) == sum(counts["heading"]) == 500


def test_the_page_needs_nothing_else(merged):
    root, _ = merged
    run(root)
    page = (paths_below(root).summary_dir.with_name("summary_report") / "summary.html").read_text()
    assert page.count("<svg ") == 3 + 4  # distributions, and a map for each dataset
    assert "<td>train</td><td>500</td>" in page
    assert "src=" not in page
    assert 'href="http' not in page.replace('xmlns:xlink="http', "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 2, 3], [0, 1, 2, 3, 4]),  # as far as there is anything: no 500 empty bins
        ([2] * 200 + [333], [0, 1, 2, 3, np.inf]),  # one far away does not squeeze the others
        ([79.5], np.arange(0, 81, 2)),
        ([700.0], [*np.arange(0, 501, 20), np.inf]),
        (np.arange(500), [*np.arange(0, 500, 20), 500]),
    ],
)
def test_bins_are_where_the_data_is(values, expected):
    edges = np.append(np.arange(0.0, 501.0), np.inf)
    fine = np.histogram(values, edges)[0]
    counts, fitted = id_summary.fit_bins(np.stack([fine, 2 * fine]), edges)
    assert fitted.tolist() == list(expected)
    wanted = np.histogram(values, fitted)[0]
    np.testing.assert_array_equal(counts, [wanted, 2 * wanted])
    assert counts.sum() == 3 * len(values)


@pytest.mark.parametrize(
    ("width_m", "bar_m"), [(3, 1), (300, 100), (599, 100), (600, 200), (2_400, 500), (31_000, 10_000)]
)
def test_a_scale_bar_is_a_round_length_and_at_most_a_third_of_the_map(width_m, bar_m):
    assert cell_maps.scale_m(width_m) == bar_m


def test_maps_name_their_counts_and_scale_and_fit_their_cells(merged):
    root, splits = merged
    run(root)
    page = (paths_below(root).summary_dir.with_name("summary_report") / "summary.html").read_text()
    for dataset in range(1, 5):
        counts = [int(np.sum(rows[:, 0] == dataset)) for rows in splits.values()]
        assert f"{dataset:04d}: {sum(counts)} images" in page
        assert "train {}, val {}, test {}".format(*counts) in page
    assert page.count(">100 m<") == 4  # of cells of 300 m
    columns = pd.DataFrame({"dataset_id": [7, 7, 9], "images": [5, 6, 1], "split": "test"})
    cells = geo.cell_ids(np.array([50.0, 50.0, 60.0]), np.array([8.0, 8.1, 8.0]), 300)
    columns["cell"] = cells
    wide, square = cell_maps.largest(columns)
    assert cell_maps.draw_one(wide, 300).get_figheight() < cell_maps.draw_one(square, 300).get_figheight()


def test_a_second_run_does_nothing_and_other_inputs_are_told(merged, capsys):
    root, _ = merged
    run(root)
    assert run(root) == 0
    assert "nothing to do" in capsys.readouterr().out
    before = (paths_below(root).summary_dir.with_name("summary_report") / "summary.html").read_bytes()
    run(root, "--overwrite")
    assert (paths_below(root).summary_dir.with_name("summary_report") / "summary.html").read_bytes() == before
    write(paths_below(root).merged_dir / "val.parquet", schemas.merged(2), random_rows(9), "merge_and_split")
    with pytest.raises(StaleArtefact, match=r"val\.parquet"):
        run(root)


def test_a_summary_from_before_the_merge_is_not_in_the_way(merged, capsys):
    root, _ = merged
    for split in ("train", "val", "test"):
        (paths_below(root).merged_dir / f"{split}.parquet").rename(root / f"{split}.parquet")
    write(root / "data/intermediates/0001.parquet", schemas.INTERMEDIATES, random_rows(0), "process_tar")
    assert run(root) == 0
    for split in ("train", "val", "test"):
        (root / f"{split}.parquet").rename(paths_below(root).merged_dir / f"{split}.parquet")
    assert run(root) == 0
    assert "1,500 images in" in capsys.readouterr().out
    assert (
        parquet.num_rows(paths_below(root).summary_dir.with_name("summary_intermediates") / "summary.parquet") == 4
    )  # still there, datasets
    assert [path.name for path in paths_below(root).summary_dir.iterdir()] == ["summary.parquet"]


def test_without_inputs_the_stage_to_run_is_named(tmp_path, capsys):
    assert exit_code_of(lambda: run(tmp_path)) == 1
    assert "process_tar.py" in capsys.readouterr().err
