"""difficulty/compute_visual_neighbors.py and its bands. Oracle: numpy's percentiles, loops over neighbours."""

import numpy as np
import pytest
from made_up_merge import write_merge

from common import geo, parquet
from common.errors import PipelineError, StaleArtefact
from difficulty import bands
from difficulty.compute_visual_neighbors import main


def test_bands_that_one_can_see():
    similarities = np.array([[0.9, 0.8, 0.6, 0.5], [1.0, 1.0, 0.5, -1.0]], np.float32)
    rows = np.array([[3, 2, 1, 0], [9, 8, 7, -1]])
    ratio = bands.ratios(similarities, rows, reference_rank=2)
    # anchor 0: the second neighbour is 0.2 away; anchor 1: two copies of itself, the scale is 1e-6
    np.testing.assert_allclose(ratio, [[0.5, 1.0, 2.0, 2.5], [0, 0, 5e5, np.inf]], rtol=1e-4)
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


def test_table_sums_what_lies_in_each_band():
    table = bands.Table.of(np.array([1.0], np.float32))
    xyz_m = np.array([[0.0, 0, 0], [30, 0, 0], [0, 40, 0], [300, 0, 0]])
    rows, similarities = np.array([[1, 3, -1], [2, -1, -1]]), np.array([[0.9, 0.7, -1], [0.5, -1, -1]])
    table.add(0, rows, similarities, np.array([[0, 1, 2], [0, 0, 1]]), xyz_m)
    hard, easy = table.rows()
    assert (hard["pairs"], easy["pairs"]) == (1, 2)
    assert hard["mean_distance_m"] == 30
    assert easy["mean_distance_m"] == (300 + 50) / 2
    assert easy["mean_similarity"] == pytest.approx(0.6)
    assert (hard["share_within_50_m"], easy["share_within_50_m"]) == (1, 0.5)
    assert (hard["share_of_anchors_without"], easy["share_of_anchors_without"]) == (0.5, 0)


@pytest.fixture
def flags(tmp_path):
    write_merge(tmp_path / "data" / "merged")
    settings = [f"paths.root={tmp_path}", "data.neighbors=20", "data.rows_per_part=64"]
    return [flag for setting in settings for flag in ("--set", setting)]


def read(tmp_path):
    path = tmp_path / "data" / "difficulty" / "difficulty_metadata.parquet"
    return parquet.read(path), parquet.read_provenance(path)


def test_the_command_writes_neighbours_outside_the_zone_and_their_bands(flags, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert main(flags) == 0
    assert "anchors without" in caplog.text
    found, record = read(tmp_path)
    train = parquet.read(tmp_path / "data" / "merged" / "train.parquet")
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
    for i in range(
        len(rows)
    ):  # the ratios here are float16's: a neighbour within 3 % of an edge may lie beyond it
        for b in range(7):
            inside = ratio[i, offsets[i, b] : offsets[i, b + 1]]
            assert (inside >= 0.97 * ([0, *edges])[b]).all()
            assert (inside <= 1.03 * ([*edges, np.inf])[b]).all()
    assert record.facts["recall"] == 1.0
    assert record.facts["k"] == 20
    assert record.facts["merged_id"] == parquet.read_provenance(tmp_path / "data" / "merged" / "train.parquet").id


def test_shards_give_the_same_file_and_a_second_run_does_nothing(flags, tmp_path, capsys):
    main(flags)
    whole, record = read(tmp_path)
    target = tmp_path / "data" / "difficulty" / "difficulty_metadata.parquet"
    target.unlink()
    for part in (tmp_path / "data" / "difficulty" / "parts").iterdir():
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
    part = tmp_path / "data" / "difficulty" / "parts" / "00000.parquet"
    before = part.stat().st_mtime_ns
    other = [*flags, "--set", "data.band_percentiles=[50]"]
    with pytest.raises(StaleArtefact, match="band_percentiles"):
        main(other)
    target = tmp_path / "data" / "difficulty" / "difficulty_metadata.parquet"
    target.unlink()
    assert main(other) == 0
    assert part.stat().st_mtime_ns == before
    assert parquet.to_matrix(read(tmp_path)[0]["band_offsets"]).shape[1] == 3
    target.unlink()
    with pytest.raises(StaleArtefact, match=r"data\.neighbors = 20; this run says 10"):
        main([*flags, "--set", "data.neighbors=10"])


def test_balltree_records_its_recall_and_warns_when_it_is_low(flags, tmp_path, caplog):
    main([*flags, "--set", "data.search=balltree", "--set", "data.balltree_dim=2"])
    recall = read(tmp_path)[1].facts["recall"]
    assert 0.05 < recall < 0.95
    assert "of the true neighbours" in caplog.text


def test_a_zone_that_holds_the_whole_map_is_an_error_with_advice(flags):
    with pytest.raises(PipelineError, match="ignore_radius_m"):
        main([*flags, "--set", "data.ignore_radius_m=1e6"])


def test_missing_merge_is_named(tmp_path):
    with pytest.raises(
        PipelineError, match=r"train\.parquet does not exist: run preprocess/merge_and_split\.py first"
    ):
        main(["--set", f"paths.root={tmp_path}"])
