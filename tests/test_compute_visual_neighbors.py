"""difficulty/compute_visual_neighbors.py and its bands. Oracle: numpy's percentiles, loops over neighbours."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import small_merge
from conftest import ROOT, paths_below
from made_up_merge import write_merge
from PIL import Image

from common import config, parquet
from common.errors import PipelineError, StaleArtefact
from common.imagery import pictures
from common.places import geo
from difficulty import bands
from difficulty.compute_visual_neighbors import main
from difficulty.report import band_report, band_table


def test_bands_that_one_can_see():
    similarities = np.array([[0.9, 0.8, 0.6, 0.5], [1.0, 1.0, 0.5, -1.0]], np.float32)
    rows = np.array([[3, 2, 1, 0], [9, 8, 7, -1]])
    ratio = bands.ratios(similarities, rows, reference_rank=2)
    # anchor 0: the second neighbour is 0.2 away; anchor 1: two copies of itself, the scale is 1e-4
    np.testing.assert_allclose(ratio, [[0.5, 1.0, 2.0, 2.5], [0, 0, 5e3, np.inf]], rtol=1e-4)
    offsets = bands.offsets(ratio, np.array([0.75, 2.2, 3.0], np.float32))
    assert offsets.tolist() == [[0, 1, 3, 4, 4], [0, 2, 2, 2, 3]]


def test_an_anchor_with_fewer_neighbours_than_the_reference_rank_takes_its_last():
    ratio = bands.ratios(
        np.array([[0.9, 0.6, -1], [-1, -1, -1]], np.float32), np.array([[1, 2, -1], [-1] * 3]), 10
    )
    np.testing.assert_allclose(ratio, [[0.25, 1, np.inf], [np.inf] * 3], rtol=1e-6)
    assert bands.offsets(ratio, np.array([0.5], np.float32)).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_edges_equal_numpys_percentiles_however_the_ratios_are_cut_into_parts():
    rng = np.random.default_rng(0)
    ratio = rng.lognormal(0, 1, (2_000, 50)).astype(np.float32)
    ratio[rng.random(ratio.shape) < 0.1] = np.inf
    percentiles = [2.0, 8.0, 20.0, 60.0, 99.0]
    edges = bands.edges_of(sum(map(bands.histogram, np.array_split(ratio, 7))), percentiles)
    np.testing.assert_array_equal(edges, bands.edges_of(bands.histogram(ratio), percentiles))
    np.testing.assert_allclose(edges, np.percentile(ratio[np.isfinite(ratio)], percentiles), rtol=2**-10)


def test_equal_ratios_leave_bands_empty_and_lose_no_neighbour():
    ratio = np.ones((5, 8), np.float32)
    offsets = bands.offsets(ratio, bands.edges_of(bands.histogram(ratio), [10.0, 50.0, 90.0]))
    assert (np.diff(offsets.astype(int), axis=1).sum(axis=1) == 8).all()


def test_the_table_says_what_each_band_holds():
    xyz_m = np.array([[0.0, 0, 0], [30, 0, 0], [0, 40, 0], [300, 0, 0], [0, 0, 9e6]])
    table = band_table.BandCounts(np.array([1.0], np.float32), xyz_m, np.array([1, 1, 1, 1, 2]))
    rows = np.array([[1, 3, 4, -1], [2, -1, -1, -1]])
    similarities = np.array([[0.9, 0.7, 0.6, -1], [0.5, -1, -1, -1]])
    table.add(0, rows, similarities, np.array([[0, 1, 3], [0, 0, 1]]))
    hard, easy = table.rows()
    assert (hard["pairs"], easy["pairs"]) == (1, 3)
    assert (hard["ratio_from"], hard["ratio_to"], easy["ratio_from"], easy["ratio_to"]) == (0, 1, 1, None)
    assert hard["median_distance_m"] == pytest.approx(30, rel=0.03)  # bins of 2 %
    assert easy["median_distance_m"] == pytest.approx(50, rel=0.03)  # of 50 and 300; row 4 is in another city
    assert easy["similarity_median"] == pytest.approx(0.6, abs=1e-3)
    assert easy["share_same_dataset"] == pytest.approx(2 / 3)
    assert (hard["share_within_50_m"], easy["share_within_50_m"]) == (1, pytest.approx(1 / 3))
    assert (hard["share_of_anchors_without"], easy["share_of_anchors_without"]) == (0.5, 0)
    assert "0.90" in band_table.as_text([hard, easy])


def test_an_empty_bands_line_keeps_the_columns():
    table = band_table.BandCounts(np.array([1.0], np.float32), np.zeros((2, 3)), np.array([1, 1]))
    rows, similarities, offsets = np.array([[1], [0]]), np.full((2, 1), 0.9), np.array([[0, 1, 1], [0, 1, 1]])
    table.add(0, rows, similarities, offsets)
    head, hard, easy = band_table.as_text(table.rows()).splitlines()
    assert len(head) == len(hard) == len(easy)
    assert easy.split() == ["1", "1.00-...", "0", "100.0%"]


def test_quantiles_of_a_histogram_are_those_of_the_values_to_a_bin():
    rng = np.random.default_rng(0)
    values, edges = np.append(rng.normal(0, 0.1, 5_000), rng.normal(0.8, 0.02, 5_000)), np.linspace(-1, 1, 2_001)
    shares = [0.05, 0.25, 0.49, 0.51, 0.95]
    found = band_table.quantiles(np.histogram(values, edges)[0], edges, shares)
    np.testing.assert_allclose(found, np.quantile(values, shares), atol=1e-3)
    assert band_table.quantiles(np.zeros(2_000), edges, [0.5]) == [None]


def test_sample_pairs_lie_in_their_band_and_show_an_anchor_once():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1_000, (60, 20))
    similarities = -np.sort(-rng.random((60, 20)), axis=1)
    offsets = np.stack([np.zeros(60), np.where(np.arange(60) < 3, 4, 0), np.full(60, 20)], axis=1).astype(np.uint8)
    anchors = np.arange(100, 160)
    hard, easy = band_report.choose_pairs(anchors, rows, similarities, offsets, rng)
    assert sorted(anchor for anchor, _, _ in hard) == [100, 101, 102]  # no other has any of band 0
    assert len({anchor for anchor, _, _ in easy}) == band_report.SHOWN
    for pairs, first, last in ((hard, 0, 4), (easy, 0, 20)):
        for anchor, row, similarity in pairs:
            place = similarities[anchor - 100].tolist().index(similarity)
            assert rows[anchor - 100, place] == row
            assert offsets[anchor - 100, 1] * (pairs is easy) <= place < last > first


@pytest.fixture
def flags(tmp_path):
    write_merge(paths_below(tmp_path).merged_dir)
    settings = [f"paths.root={tmp_path}", "data.neighbors=20", "data.rows_per_part=64"]
    return [flag for setting in settings for flag in ("--set", setting)]


def read(tmp_path):
    path = paths_below(tmp_path).difficulty_dir / "difficulty_metadata.parquet"
    return parquet.read(path), parquet.read_provenance(path)


def test_the_command_writes_neighbours_outside_the_zone_and_their_bands(flags, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert main(flags) == 0
    assert "anchors without" in caplog.text
    assert "sample images cannot be read" in caplog.text  # the made-up merge has no tars
    folder = paths_below(tmp_path).difficulty_dir.with_name("difficulty_report")
    assert not (folder / "band_pairs.png").exists()
    assert Image.open(folder / "bands.png").size[0] > 500
    found, record = read(tmp_path)
    train = parquet.read(paths_below(tmp_path).merged_dir / "train.parquet")
    assert found["streetview_image_id"].to_pylist() == train["streetview_image_id"].to_pylist()
    rows, offsets = parquet.to_matrix(found["neighbor_rows"]), parquet.to_matrix(found["band_offsets"])
    xyz_m = geo.to_xyz_m(train["target_lat"].to_numpy(), train["target_lon"].to_numpy())
    assert (np.linalg.norm(xyz_m[:, None] - xyz_m[rows], axis=2) > 25).all()
    x = parquet.to_matrix(train["embedding"]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarities = parquet.to_matrix(found["neighbor_similarities"])
    np.testing.assert_allclose(similarities, (x[:, None] * x[rows]).sum(axis=2), atol=5e-4)  # float16 below 1
    ratio = bands.ratios(similarities.astype(np.float32), rows, 10)
    edges = record.facts["band_edges"]
    assert json.loads((folder / "bands.json").read_text()) == record.facts["bands"]
    assert sum(band["pairs"] for band in record.facts["bands"]) == (rows >= 0).sum()
    for i in range(
        len(rows)
    ):  # the ratios here are float16's: a neighbour within 3 % of an edge may lie beyond it
        for b in range(7):
            inside = ratio[i, offsets[i, b] : offsets[i, b + 1]]
            assert (inside >= 0.97 * ([0, *edges])[b]).all()
            assert (inside <= 1.03 * ([*edges, np.inf])[b]).all()
    assert record.facts["recall"] == 1.0
    assert record.facts["k"] == 20
    assert (
        record.facts["merged_id"] == parquet.read_provenance(paths_below(tmp_path).merged_dir / "train.parquet").id
    )


def test_a_sheet_shows_pairs_of_every_band_read_from_the_tars(flags, tmp_path, monkeypatch):
    cfg = config.load(config.DEFAULT_PATH, [f"paths.root={tmp_path}"])
    columns = small_merge.write_merge(cfg)["train"]
    chosen, drawn = [], []
    choose, sheet = band_report.choose_pairs, pictures.sheet
    monkeypatch.setattr(band_report, "choose_pairs", lambda *args: chosen.extend(choose(*args)) or chosen)
    monkeypatch.setattr(pictures, "sheet", lambda lines: drawn.extend(lines) or sheet(lines))
    main(flags)
    with open(cfg.paths.raw_dir / "0088.tar", "rb") as tar:

        def colour(row):
            tar.seek(columns["image_offset"][row])
            image = Image.open(io.BytesIO(tar.read(columns["image_size"][row])))
            return np.asarray(image, float).mean((0, 1))

        assert len(drawn) == len(chosen) == 7
        for line, pairs in zip(drawn, chosen, strict=True):
            assert len(line.pictures) == len(pairs) > 0
            for image, (anchor, row, _) in zip(line.pictures, pairs, strict=True):
                pixels = np.asarray(image, float)
                np.testing.assert_allclose(pixels[:, : pictures.PX].mean((0, 1)), colour(anchor), atol=2)
                np.testing.assert_allclose(pixels[:, -pictures.PX :].mean((0, 1)), colour(row), atol=2)
    assert (
        Image.open(paths_below(tmp_path).difficulty_dir.with_name("difficulty_report") / "band_pairs.png").size[0]
        > 500
    )


def test_shards_give_the_same_file_and_a_second_run_does_nothing(flags, tmp_path, capsys):
    main(flags)
    whole, record = read(tmp_path)
    target = paths_below(tmp_path).difficulty_dir / "difficulty_metadata.parquet"
    target.unlink()
    for part in paths_below(tmp_path).difficulty_dir.with_name("difficulty_parts").iterdir():
        part.unlink()
    for shard in (2, 0):
        assert main([*flags, "--num-shards", "3", "--shard", str(shard)]) == 0
    with pytest.raises(PipelineError, match=r"2 of 7 parts are missing"):
        main([*flags, "--finish"])
    main([*flags, "--num-shards", "3", "--shard", "1"])
    capsys.readouterr()
    main([*flags, "--num-shards", "3", "--shard", "1"])
    assert "nothing to do" in capsys.readouterr().out
    main([*flags, "--num-shards", "3", "--finish"])
    again, record_again = read(tmp_path)
    assert again.equals(whole)
    assert record_again.id == record.id
    capsys.readouterr()
    main(flags)
    assert "nothing to do" in capsys.readouterr().out


def test_other_bands_use_the_same_parts_and_other_neighbours_are_refused(flags, tmp_path):
    main(flags)
    part = paths_below(tmp_path).difficulty_dir.with_name("difficulty_parts") / "00000.parquet"
    before = part.stat().st_mtime_ns
    other = [*flags, "--set", "data.band_percentiles=[50]"]
    with pytest.raises(StaleArtefact, match="band_percentiles"):
        main(other)
    target = paths_below(tmp_path).difficulty_dir / "difficulty_metadata.parquet"
    target.unlink()
    assert main(other) == 0
    assert part.stat().st_mtime_ns == before
    assert parquet.to_matrix(read(tmp_path)[0]["band_offsets"]).shape[1] == 3
    target.unlink()
    with pytest.raises(StaleArtefact, match=r"data\.neighbors = 20 \(now 10"):
        main([*flags, "--set", "data.neighbors=10"])


def test_balltree_records_its_recall_and_warns_when_it_is_low(flags, tmp_path, caplog):
    main([*flags, "--set", "data.search=balltree", "--set", "data.balltree_dim=2"])
    recall = read(tmp_path)[1].facts["recall"]
    assert 0.05 < recall < 0.95
    assert "of the true neighbours" in caplog.text


def test_asking_for_the_record_and_the_parts_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys; from difficulty.search import search_parts; print(*{'torch', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_a_zone_that_holds_the_whole_map_is_an_error_with_advice(flags):
    with pytest.raises(PipelineError, match="ignore_radius_m"):
        main([*flags, "--set", "data.ignore_radius_m=1e6"])


def test_missing_merge_is_named(tmp_path):
    with pytest.raises(
        PipelineError, match=r"train\.parquet does not exist: run preprocess/merge_and_split\.py first"
    ):
        main(["--set", f"paths.root={tmp_path}"])
