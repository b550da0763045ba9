"""publish/explore.py and publish/explorer. Oracles: numpy's brute force, plain loops, and the page read back."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import small_explorer
import torch
from PIL import Image

from common import cli, config, parquet
from common.errors import PipelineError, StaleArtefact
from common.places import geo
from publish import explore
from publish.explorer import explorer_data, explorer_failures, explorer_page, explorer_pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The settings, the two tables, and the page of them."""
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('explore')}"])
    buildings, queries = small_explorer.write(cfg)
    assert explore.main(flags(cfg)) == 0
    return cfg, buildings, queries, cfg.paths.evaluation_dir / "explorer.html"


def flags(cfg, *words: str) -> list[str]:
    return [*words, "--set", f"paths.root={cfg.paths.root}"]


def part_of(page, name: str):
    """What a <script> of the page holds, arrays unpacked."""
    text = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(text, object_hook=unpacked)


def unpacked(value: dict):
    if "bytes" in value:
        return np.frombuffer(base64.b64decode(value["bytes"]), value["type"])
    return value


# ----------------------------------------------------------------------------------------- the whole page


def test_the_page_holds_the_buildings_with_their_nearest_ones_and_pictures(made):
    _, buildings, _, page = made
    data = part_of(page, "data")
    n = len(buildings["building"])
    assert (data["names"], data["total"]) == (buildings["building"], n)
    vectors = buildings["embedding"].astype(np.float64)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    best = np.sort(cosines, axis=1)[:, : -explorer_data.NEAREST - 1 : -1]
    np.testing.assert_allclose(data["cosines"].reshape(n, -1), best, atol=1e-6)  # float32
    nearest = data["nearest"].reshape(n, -1)
    np.testing.assert_allclose(np.take_along_axis(cosines, nearest, axis=1), best, atol=1e-6)
    assert all(len(set(row)) == explorer_data.NEAREST and k not in row for k, row in enumerate(nearest.tolist()))
    for row, ids in enumerate(buildings["image_ids"]):  # three images each, the most typical first
        assert [data["image_names"][number] for number in data["images_of"][row]] == ids
    assert len(part_of(page, "pictures")) == len(data["image_names"]) == 3 * n
    assert all(base64.b64decode(jpeg).startswith(b"\xff\xd8\xff") for jpeg in part_of(page, "pictures"))


def test_a_rerun_has_nothing_to_do_until_a_table_changes(made, capsys, tmp_path):
    cfg, buildings, _, page = made
    before = page.read_bytes()
    assert explore.main(flags(cfg)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert page.read_bytes() == before
    with pytest.raises(StaleArtefact, match=r"pictures_mb = 25.0 \(now 0.1\)"):
        explore.main(flags(cfg, "--pictures-mb", "0.1"))
    other = tmp_path / "other.parquet"
    small_explorer.write_buildings(other, buildings | {"split": [""] * len(buildings["split"])})
    out = tmp_path / "page.html"
    out.write_bytes(before)
    with pytest.raises(StaleArtefact, match="--remake"):
        explore.main(flags(cfg, str(other), str(out)))
    assert explore.main(flags(cfg, str(other), str(out), "--remake", "--pictures-mb", "0")) == 0
    assert "split" not in [one["name"] for one in part_of(out, "data")["colourings"]]


def failed_buildings(queries: dict) -> list[str]:
    """Of each failure of either method."""
    ranks = np.maximum(queries["rank_raw"], queries["rank_trained"])
    return [name for name, rank in zip(queries["building_id"], ranks, strict=True) if rank > 1]


def test_a_table_of_some_buildings_has_their_failures_and_counts_the_others(made, tmp_path, caplog):
    cfg, buildings, queries, _ = made
    failed, other = failed_buildings(queries), tmp_path / "other.parquet"
    gone = failed[0]
    small_explorer.write_buildings(
        other, buildings | {"building": [f"{n}!" if n == gone else n for n in buildings["building"]]}
    )
    assert explore.main(flags(cfg, str(other), str(tmp_path / "page.html"), "--pictures-mb", "0")) == 0
    failures = part_of(tmp_path / "page.html", "data")["failures"]
    missing = failed.count(gone)
    assert failures["total"] == len(failures["queries"]) == len(failed) - missing
    note = f"{missing} failures are of buildings that are not in this table."
    assert note in caplog.text
    assert note in (tmp_path / "page.html").read_text()


MODELS = {  # (weights and checkpoint of the published model): what is said of a table by w0 and queries by c0
    "the same": (("w0", "c0"), ""),
    "another table": (
        ("w1", "c0"),
        r"(?s)is of another model than .*redo.*: \S+ publish/generate_emb.*aggregate_",
    ),
    "other queries": (("w0", "c1"), r"(?s)is of another model than .*train/evaluate\.py .*--remake && .*FOLDER"),
    "neither": (("w1", "c1"), "neither .* nor .* is of the model in"),
    "nothing published": (None, "holds no published model to compare with"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_table_and_queries_by_two_models_are_refused_and_doubts_are_told(case, made, tmp_path, caplog):
    cfg, *_ = made
    (published, message), out = MODELS[case], tmp_path / "page.html"
    if published:
        small_explorer.write_published(tmp_path, *published)
    command = flags(cfg, str(cfg.paths.buildings_dir), str(out), "--pictures-mb", "0")
    command += ["--set", f"paths.published_dir={tmp_path}"]
    if "another model" in message:
        with pytest.raises(StaleArtefact, match=message):
            explore.main(command)
        return
    assert explore.main(command) == 0
    for text in (caplog.text, out.read_text()):
        told = re.search(r"It is not known whether the failures are of the table(?:'|&#39;)s model: (.*)\.", text)
        assert re.search(message, told[1]) if message else not told


def test_a_table_of_other_buildings_has_no_failures(made, tmp_path, caplog):
    cfg, buildings, queries, page = made
    other = tmp_path / "other.parquet"
    small_explorer.write_buildings(other, buildings | {"building": [f"b{i}" for i in range(120)]})
    assert explore.main(flags(cfg, str(other), str(tmp_path / "page.html"), "--pictures-mb", "0")) == 0
    data = part_of(tmp_path / "page.html", "data")
    assert data["failures"] is None
    assert f"{len(failed_buildings(queries))} failures are of buildings that are not in this table." in caplog.text
    assert "right" not in [one["name"] for one in data["colourings"]]
    assert part_of(page, "data")["failures"]


def test_a_page_of_another_program_is_not_replaced(made, tmp_path):
    cfg, *_ = made
    out = tmp_path / "mine.html"
    out.write_text("<h1>mine</h1>")
    with pytest.raises(PipelineError, match=r"was not written by publish/explore\.py"):
        explore.main(flags(cfg, str(cfg.paths.buildings_dir), str(out)))
    assert out.read_text() == "<h1>mine</h1>"


def test_without_a_table_it_says_which_script_makes_one(made, tmp_path):
    cfg, *_ = made
    with pytest.raises(PipelineError, match=r"run publish/aggregate_buildings.py first"):
        explore.main(flags(cfg, str(tmp_path)))


def test_a_table_that_pandas_has_written_is_shown(made, tmp_path):
    """Without a record, with lists and strings of other types, and vectors that are not of length 1."""
    cfg, buildings, _, page = made
    table = tmp_path / "own.parquet"
    frame = pd.DataFrame(buildings | {"embedding": list(3 * buildings["embedding"])})
    frame.to_parquet(table)
    words = flags(cfg, str(table), str(tmp_path / "page.html"), "--pictures-mb", "0")
    assert explore.main(words) == explore.main(words) == 0
    own, data = part_of(tmp_path / "page.html", "data"), part_of(page, "data")
    assert (own["names"], own["failures"]) == (data["names"], data["failures"])
    np.testing.assert_allclose(own["cosines"], data["cosines"], atol=1e-6)
    frame.assign(spread=0.0).to_parquet(table)
    with pytest.raises(StaleArtefact, match="--remake"):
        explore.main(words)


def test_a_table_of_images_is_refused_with_what_to_name_instead(made, tmp_path):
    cfg, *_ = made
    pd.DataFrame({"image": ["a"], "embedding": [[1.0]]}).to_parquet(tmp_path / "vectors.parquet")
    with pytest.raises(PipelineError, match=r"no column building, images, .*\n.*publish/aggregate_buildings\.py$"):
        explore.main(flags(cfg, str(tmp_path / "vectors.parquet"), str(tmp_path / "page.html")))


def test_what_is_not_known_is_not_shown(made, tmp_path, capsys):
    """No positions, no projection, no clusters, no datasets, no queries, no tars."""
    _, buildings, _, page = made
    nothing = np.full(len(buildings["building"]), np.nan)
    bare = buildings | {"lat": nothing, "lon": nothing, "x": nothing, "y": nothing}
    bare |= {"cluster": np.full(len(nothing), -1), "building": [f"</script>{i}" for i in range(len(nothing))]}
    small_explorer.write_buildings(tmp_path / "t" / "buildings.parquet", bare, without=("dataset_id",))
    out = tmp_path / "page.html"
    assert explore.main([str(tmp_path / "t"), str(out), "--set", f"paths.root={tmp_path}"]) == 0
    assert "0 pictures" in capsys.readouterr().out
    data, text = part_of(out, "data"), out.read_text()
    assert data["names"] == bare["building"]  # which would have closed the element
    assert data["failures"] is None
    assert {one["name"] for one in data["colourings"]} == {"split", "spread"}  # all have three images
    assert [one["located"] for one in data["cities"]] == [0]
    assert 'id="map"' not in text
    assert 'id="projection"' not in text
    assert "Select a dot" not in text
    assert "Choose a name in the field Find" in text
    assert "Select a dot" in page.read_text()
    assert "There are no pictures" in text


# ------------------------------------------------------------------------------------------------ samples


def test_a_sample_keeps_what_matters_most_and_is_the_same_each_time():
    priority = np.full(1000, 2)
    priority[[3, 500, 999]], priority[100:200] = 0, 1
    rows = explorer_data.sample(priority, 50, seed=1)
    assert len(rows) == 50
    assert {3, 500, 999} <= set(rows.tolist())
    assert set(rows.tolist()) - {3, 500, 999} <= set(range(100, 200))
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, explorer_data.sample(priority, 50, seed=1))
    assert set(rows.tolist()) != set(explorer_data.sample(priority, 50, seed=2).tolist())
    assert explorer_data.sample(priority, 5000, seed=1).tolist() == list(range(1000))


def test_a_table_above_the_limit_is_sampled_with_the_failures_buildings(made, monkeypatch, tmp_path):
    cfg, buildings, queries, _ = made
    monkeypatch.setattr(explore, "MAX_BUILDINGS", 45)
    out, table = tmp_path / "page.html", tmp_path / "table.parquet"
    x = np.where(np.arange(len(buildings["x"])) % 2, buildings["x"], np.nan)
    small_explorer.write_buildings(table, buildings | {"x": x})
    assert explore.main(flags(cfg, str(table), str(out), "--pictures-mb", "0")) == 0
    data = part_of(out, "data")
    failed = set(failed_buildings(queries))
    assert len(data["names"]) == 45
    assert len(failed) < 45
    assert failed <= set(data["names"])
    assert np.isfinite([x for name, x in zip(data["names"], data["x"], strict=True) if name not in failed]).all()
    assert f"45 of {len(buildings['building'])} buildings" in out.read_text()
    vectors = dict(zip(buildings["building"], buildings["embedding"], strict=True))
    of_shown = np.array([vectors[name] for name in data["names"]])  # rows and vectors still belong together
    nearest = data["nearest"].reshape(45, -1)
    np.testing.assert_allclose(
        (of_shown @ of_shown.T)[np.arange(45), nearest[:, 0]], data["cosines"][::8], atol=1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 5, 300])
def test_nearest_of_few_buildings_and_in_several_blocks(n, monkeypatch):
    vectors = small_explorer.unit(np.random.default_rng(n).normal(size=(n, 6)))
    with cli.Progress("explore", "building") as progress:
        found = explorer_data.nearest(vectors, torch.device("cpu"), 0, progress)  # a row at a time
    assert progress.rows_in == n
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    k = min(8, n - 1)
    expected = -np.sort(-cosines, axis=1)[:, :k]
    assert found["nearest"].shape == (n, k)
    np.testing.assert_allclose(found["cosines"], expected, atol=1e-6)


# ------------------------------------------------------------------------------------- places and colours


def test_places_are_in_metres_of_their_city_even_across_the_180th_meridian():
    lat = np.array([10.0, 10.01, -17.0, -17.0, np.nan])
    lon = np.array([20.0, 20.02, 179.999, -179.999, np.nan])
    facts = pd.DataFrame({"city": ["0088", "0088", "0089", "0089", "0089"], "lat": lat, "lon": lon})
    found = explorer_data.places(facts, cell_m=500.0)
    for a, b in ((0, 1), (2, 3)):
        across = np.hypot(found["east"][a] - found["east"][b], found["north"][a] - found["north"][b])
        assert across == pytest.approx(geo.distance_m(lat[a], lon[a], lat[b], lon[b]), rel=1e-3)
    assert np.isnan(found["east"][4])
    assert [(city["name"], city["located"]) for city in found["cities"]] == [("0088", 2), ("0089", 2)]
    for row in range(4):  # each lies in a cell of its city
        cells = found["cells"][found["cell_city"] == found["city"][row]]
        east, north = found["east"][row], found["north"][row]
        inside = (cells[:, 0] <= east) & (east <= cells[:, 2]) & (cells[:, 1] <= north) & (north <= cells[:, 3])
        assert inside.sum() == 1 or (row >= 2 and inside.any())  # those of both sides overlap at the meridian
    np.testing.assert_allclose(found["cells"][:, 3] - found["cells"][:, 1], 500, rtol=1e-3)


def test_positions_without_a_city_are_shown_by_areas_of_at_most_100_km():
    rng, places = np.random.default_rng(0), [(50.08, 14.43, 0.1), (-17.0, 180.0, 0.1), (48.1, 11.6, 0.02)]
    lat, lon = (np.concatenate([place[axis] + place[2] * rng.normal(size=60 - 20 * i) for i, place in
                                enumerate(places)]) for axis in (0, 1))  # fmt: skip
    lon = (lon + 180) % 360 - 180
    names = explorer_data.areas(np.append(lat, np.nan), np.append(lon, np.nan))
    assert [name[:7] for name in names] == ["area 1 "] * 60 + ["area 2 "] * 40 + ["area 3 "] * 20 + [""]
    assert names[100] == f"area 3 ({lat[100:].mean():.2f}, {lon[100:].mean():.2f})"
    chain = explorer_data.areas(np.linspace(45, 55, 500), np.full(500, 10.0))  # 1,100 km without a gap
    for name in set(chain):
        inside = np.linspace(45, 55, 500)[chain == name]
        assert geo.METRES_PER_DEGREE * (inside.max() - inside.min()) < 100_000
    assert explorer_data.areas(np.array([np.nan]), np.array([np.nan])).tolist() == [""]


@pytest.mark.parametrize("named", [True, False])
def test_an_own_tables_cities_are_named_or_found_by_position(named, made, tmp_path):
    _, buildings, *_ = made
    own = {name: values for name, values in buildings.items() if name != "dataset_id"}
    own["city"] = np.where(np.array(buildings["dataset_id"]) == 89, "Brno", "Prague") if named else ""
    frame = pd.DataFrame(own | {"embedding": list(own["embedding"])})
    frame.to_parquet(tmp_path / "own.parquet")
    out = tmp_path / "page.html"
    assert explore.main([str(tmp_path / "own.parquet"), str(out), "--set", f"paths.root={tmp_path}"]) == 0
    cities = [(city["name"].split(" (")[0], city["located"]) for city in part_of(out, "data")["cities"]]
    assert cities == ([("Brno", 40), ("Prague", 80)] if named else [(f"area {k}", 40) for k in (1, 2, 3)])


def test_many_categories_share_a_grey_and_the_split_keeps_its_order():
    cluster = np.concatenate([np.arange(40).repeat(range(44, 4, -1)), np.full(10, -1)])  # 0 is the largest
    n = len(cluster)
    facts = pd.DataFrame({"building": [f"b{i}" for i in range(n)], "city": "", "spread": 0.1, "images": 2})
    facts = facts.assign(cluster=cluster, split=["test"] * (n - 300) + ["train"] * 300)
    split, clusters = explorer_data.colourings(facts, None)  # the others are the same for all
    assert [one["label"] for one in split["classes"]] == ["train", "val", "test"]  # not by size
    assert split["codes"][[0, -1]].tolist() == [2, 0]
    labels = np.array([one["label"] for one in clusters["classes"]])[clusters["codes"]]
    others = np.where(cluster < 0, "none", "17 others")
    np.testing.assert_array_equal(labels, np.where((cluster >= 0) & (cluster < 23), cluster.astype(str), others))


def test_a_building_is_right_if_all_its_queries_are_found_first(made):
    _, _, queries, page = made
    data = part_of(page, "data")
    right = next(one for one in data["colourings"] if one["name"] == "right")
    for name, code in zip(data["names"], right["codes"], strict=True):
        ranks = [queries["rank_trained"][i] for i, own in enumerate(queries["building_id"]) if own == name]
        share = np.mean([rank == 1 for rank in ranks]) if ranks else None
        assert code == (3 if share is None else 0 if share == 1 else 2 if share == 0 else 1)
    assert len(set(right["codes"])) == 4
    assert right["classes"][3]["label"] == "no queries"


# ----------------------------------------------------------------------------------------------- failures


def test_failures_are_those_of_either_method_with_classes_as_computed_by_hand(made):
    _, buildings, queries, page = made
    failures = part_of(page, "data")["failures"]
    ids = queries["streetview_image_id"]
    wrong = {ids[i] for i in range(len(ids)) if queries["rank_raw"][i] > 1 or queries["rank_trained"][i] > 1}
    assert {one["id"] for one in failures["queries"]} == wrong
    assert (failures["total"], failures["methods"]) == (len(wrong), ["raw", "trained"])
    margins = [one["wrong_cosine_trained"] - one["match_cosine_trained"] for one in failures["queries"]]
    assert margins == sorted(margins, reverse=True)  # the most certain mistakes first
    row_of = {image: i for i, image in enumerate(ids)}
    for one in failures["queries"]:
        i = row_of[one["id"]]
        match = row_of[queries["match_trained"][i]]
        angle = abs((queries["heading"][i] - queries["heading"][match] + 180) % 360 - 180)
        low, high = ((0, 30), (30, 60), (60, 90), (90, 181))[one["angle"]]
        assert low <= angle < high
        low, high = ((0, 10), (10, 20), (20, 40), (40, 1e9))[one["distance"]]
        assert low <= queries["distance"][i] < high
        assert buildings["building"][one["building"]] == queries["building_id"][i]
        found = row_of[queries["wrong_raw"][i]]
        assert buildings["building"][one["wrong_building_raw"]] == queries["building_id"][found]
        assert one["city"] == "0089"
    assert failures["angle_classes"] == ["0 to 30°", "30 to 60°", "60 to 90°", "90° or more"]


def test_too_many_failures_are_sampled_and_queries_without_a_match_are_none(made, monkeypatch, tmp_path):
    cfg, _, queries, _ = made
    tables = [cfg.paths.buildings_dir / "buildings.parquet"]
    changed = {name: list(values) for name, values in queries.items()}
    first = next(i for i, rank in enumerate(queries["rank_trained"]) if rank > 1)
    for method in ("raw", "trained"):
        changed[f"rank_{method}"][first] = 0
    other = config.load(None, [f"paths.root={tmp_path}"])
    small_explorer.write_queries(other, changed)
    table = explorer_failures.read(other.paths.evaluation_dir / "queries.parquet")
    everything, total, _ = explorer_failures.listed(table, tables, seed=0)
    assert queries["streetview_image_id"][first] not in set(everything["streetview_image_id"])
    assert total == len(everything) == sum(np.maximum(changed["rank_raw"], changed["rank_trained"]) > 1)
    name = queries["building_id"][first]
    own = [i for i, other in enumerate(queries["building_id"]) if other == name and i != first]
    share = np.mean([queries["rank_trained"][i] == 1 for i in own])  # not lowered by the one without a match
    assert explorer_failures.share_found(table)[name] == pytest.approx(share)
    monkeypatch.setattr(explorer_failures, "MAX_FAILURES", 5)
    some, total, _ = explorer_failures.listed(table, tables, seed=0)
    assert (len(some), total) == (5, len(everything))
    assert some.equals(explorer_failures.listed(table, tables, seed=0)[0])


def test_a_class_includes_its_lower_end_and_what_is_not_known_is_in_none():
    codes, labels = explorer_failures.classes(np.array([0, 9.9, 10, 40, np.nan]), (10, 20, 40), " m")
    assert codes.tolist() == [0, 0, 1, 3, -1]
    assert labels == ["0 to 10 m", "10 to 20 m", "20 to 40 m", "40 m or more"]


# ----------------------------------------------------------------------------------------------- pictures


def test_pictures_take_turns_and_stop_at_the_budget():
    ids = [["a1", "a2", "a3", "a4", "a5"], ["b1"], ["c1", "c2"]]
    assert explorer_pictures.of_buildings(ids, 1e6) == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]
    assert explorer_pictures.of_buildings(ids, 0) == []


def test_failures_have_half_of_the_budget_and_buildings_the_rest(made, monkeypatch, tmp_path):
    cfg, _, _, page = made
    monkeypatch.setattr(explorer_pictures, "_SMALLEST_BYTES", 100)  # these are flat
    sizes = [size_of(jpeg, 120) for jpeg in part_of(page, "pictures")]
    budget = 60 * max(sizes)
    out = tmp_path / "page.html"
    words = [str(cfg.paths.buildings_dir), str(out), "--pictures-mb", str(budget / 1e6)]
    assert explore.main(flags(cfg, *words)) == 0
    data, kept = part_of(out, "data"), [len(jpeg) for jpeg in part_of(out, "pictures")]
    assert budget - 2 * max(sizes) < sum(kept) <= budget
    failures = data["failures"]["queries"]
    of_failures = {one[key] for one in failures for key in ("id", "match_raw", "wrong_raw", "match_trained")}
    of_failures |= {one["wrong_trained"] for one in failures}
    first = [name in of_failures for name in data["image_names"]]
    assert len(of_failures) > 40  # more than half of the budget has room for
    assert 25 <= first.index(False) <= 35
    without = sum(not numbers for numbers in data["images_of"])
    assert f"{without} have no picture here" in out.read_text()


def test_pictures_are_larger_from_the_first_on_while_the_budget_lasts(made, monkeypatch, tmp_path):
    cfg, _, _, page = made
    monkeypatch.setattr(explorer_pictures, "_SMALLEST_BYTES", 100)  # these are flat
    large = part_of(page, "pictures")
    assert {opened(jpeg).size for jpeg in large} == {(240, 240)}
    budget = sum(size_of(jpeg, 120) for jpeg in large) + 20 * max(map(len, large))
    out = tmp_path / "page.html"
    words = [str(cfg.paths.buildings_dir), str(out), "--pictures-mb", str(budget / 1e6)]
    assert explore.main(flags(cfg, *words)) == 0
    widths = [opened(jpeg).width for jpeg in part_of(out, "pictures")]
    assert len(widths) == len(large)  # none is left out for a larger one
    assert 15 <= widths.index(120) <= 30
    assert widths == sorted(widths, reverse=True)


def opened(jpeg: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(jpeg)))


def size_of(jpeg: str, px: int) -> int:
    """In the page, once resized."""
    return len(explorer_pictures._jpeg(opened(jpeg).resize((px, px))))


def test_the_record_is_read_from_the_page_and_a_damaged_one_is_remade(made, tmp_path):
    cfg, *_, page = made
    record = parquet.read_provenance(cfg.paths.buildings_dir / "buildings.parquet")
    cut = tmp_path / "cut.html"
    cut.write_text(page.read_text()[:200])
    with pytest.raises(PipelineError, match="was not written by"):
        explorer_page.is_done(cut, record, "")
    assert not explorer_page.is_done(cut, record, "stale")
    assert part_of(page, "provenance")["inputs"]["buildings.parquet"] == record.id
