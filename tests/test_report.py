"""train/report/evaluation_page.py, figures.py and sheets.py: the page's structure, and which pictures stand on the
sheets.
"""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import small_merge
import torch
from conftest import paths_below
from PIL import Image

from common import config
from common.imagery import pictures, tar_images
from train import evaluate
from train.evaluation import gallery, metric_names, metrics, metrics_json
from train.report import evaluation_figures, query_sheets


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('report')}"])
    small_merge.write_merge(cfg)
    small_merge.write_checkpoint(cfg, seed=1)
    return cfg


@pytest.fixture(scope="module")
def page_path(cfg):
    evaluate.main(["--set", f"paths.root={cfg.paths.root}", "--set", "evaluation.bootstrap_samples=20"])
    return cfg.paths.evaluation_dir / "report.html"


def test_the_page_holds_everything_and_asks_for_nothing(page_path):
    text = page_path.read_text()
    page = Page(text)
    for method in ("raw", "pca", "whitening", "trained", "trained − whitening"):
        assert method in page.text
    assert len(page.all("svg")) == 7  # recall, histogram, five breakdowns; there is no history here
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    images = page.all("img")
    assert len(images) >= 3 * query_sheets.QUERIES_PER_SHEET * 2
    assert len(page.all("input")) == len(images)  # each can be enlarged, by name
    assert all(tag["type"] == "checkbox" and tag["aria-label"].startswith("enlarge") for tag in page.all("input"))
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in images)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:", "#")) or attributes[name] == "explorer.html"
    assert "url(http" not in text
    assert "Buildings on a map, and the failures: explorer.html, once" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not page.all("script")
    policies = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]  # nor could it ask


def test_the_page_tells_what_was_evaluated_and_that_nothing_leaks(cfg, page_path):
    text = " ".join(Page(page_path.read_text()).text.split())
    found = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())
    for told in (
        "180 images of 60 buildings",
        "default, epoch 2",
        "tiny, revision main, pooling cls",
        found["provenance"]["config_hash"],
        found["subject"]["config_hash"],
        "buildings6060600 panoramas1801801800",
        "the trained head, epoch 2",
    ):
        assert told in text, told


def test_everything_in_the_tables_stands_in_metrics_json(cfg, page_path):
    found = json.loads((cfg.paths.evaluation_dir / "metrics.json").read_text())
    shares = {f"{100 * value:.1f}" for value in numbers_of(found)}
    shares |= {f"{round(100 * value, 1) + 0.0:+.1f}" for value in numbers_of(found)}
    shares |= {f"{round(value, 1) + 0.0:{sign}g}" for value in numbers_of(found) for sign in ("", "+")}  # of ranks
    for number in re.findall(
        r"<td>([+-]?[0-9.]+[0-9])(?:<small>([0-9.+-]+) to ([0-9.+-]+)</small>)?</td>", page_path.read_text()
    ):
        for part in filter(None, number):
            assert part in shares or float(part) in numbers_of(found), part  # or a count


def numbers_of(tree) -> set[float]:
    return {value for value in metrics_json.flat(tree).values() if isinstance(value, (int, float))}


def test_pictures_are_read_by_offset_and_made_small(cfg):
    rows = gallery.load([cfg.paths.merged_dir / "test.parquet"], 25.0).table
    [picture] = pictures.read(tar_images.of_paths(cfg.paths), rows.slice(7, 1))
    small = Image.open(io.BytesIO(base64.b64decode(query_sheets.data_uri(picture).partition(",")[2])))
    [large] = pictures.read(tar_images.of_paths(cfg.paths), rows.slice(7, 1), query_sheets.PX)
    assert large.size == (query_sheets.PX, query_sheets.PX)
    row = rows.to_pylist()[7]
    with open(cfg.paths.raw_dir / row["tar_file"], "rb") as tar:
        tar.seek(row["image_offset"])
        original = Image.open(io.BytesIO(tar.read(row["image_size"])))
    assert small.size == (pictures.PX, pictures.PX)
    np.testing.assert_allclose(np.asarray(small).mean((0, 1)), np.asarray(original).mean((0, 1)), atol=4)


def test_the_largest_pictures_leave_the_page_below_sixteen_megabytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    Image.fromarray(noise).save(tmp_path / "noise.jpg", "JPEG", quality=95)
    largest = len(query_sheets.data_uri(pictures.small((tmp_path / "noise.jpg").read_bytes(), query_sheets.PX)))
    lines = 3 * query_sheets.QUERIES_PER_SHEET + query_sheets.FAILURES  # "best" has two for each query
    typical = lines * (1 + query_sheets.COUNTED_RESULTS)  # few have junk or a match further down
    assert typical * largest < 15_000_000  # of noise; the rest, a dozen figures and tables, takes less than one


def test_a_missing_tar_or_bytes_that_are_no_image_leave_a_gap_that_the_page_tells(cfg, tmp_path):
    (tmp_path / "bad.tar").write_bytes(bytes(100))
    rows = {
        "tar_file": ["gone.tar", "bad.tar", "bad.tar"],
        "image_offset": [0, 0, 90],
        "image_size": [10, 100, 20],
    }
    assert pictures.read(tar_images.TarImages(tmp_path, tmp_path / "index"), pa.table(rows)) == [None] * 3
    shutil.copytree(cfg.paths.root, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "data" / "raw")
    flags = ["--set", f"paths.root={tmp_path / 'copy'}", "--set", "evaluation.bootstrap_samples=20", "--overwrite"]
    assert evaluate.main(flags) == 0
    page = Page((paths_below(tmp_path / "copy").evaluation_dir / "report.html").read_text())
    assert not page.all("img")
    assert "pictures cannot be shown" in page.text
    assert str(tmp_path / "copy" / "data" / "raw") in page.text


def per_query(ranks) -> metrics.PerQuery:
    ranks = np.array(ranks)
    return metrics.PerQuery(ranks > 0, np.ones(len(ranks), int), ranks, np.zeros(len(ranks)))


def test_sheets_show_a_building_once_best_by_what_was_gained_worst_by_rank():
    trained, raw = per_query([1, 1, 1, 0, 90, 80, 7]), per_query([1, 50, 40, 0, 2, 2, 9])
    building, dataset = np.array([0, 1, 1, 2, 3, 3, 4]), np.full(7, 88)
    chosen = query_sheets.choose(trained, raw, building, dataset, seed=0)
    assert chosen["best"].tolist() == [1, 0, 6, 5]  # 2 is of the building of 1; 3 has no match
    assert chosen["worst"].tolist() == [4, 6, 0]  # three of a dataset
    assert sorted(chosen["random"]) in ([0, a, b, 6] for a in (1, 2) for b in (4, 5))


def test_failures_are_shown_of_every_city_the_worst_of_each_first():
    ranks = np.arange(1, 41)
    for cities, expected in (
        ([90] * 30 + [88] * 10, [39, 38, 37, 29, 28, 27]),
        (
            np.arange(40) % 12,
            [36, 24, 37, 25, 38, 26, 39, 27, *(n for c in range(4, 12) for n in (24 + c, 12 + c))],
        ),
        (np.arange(40) // 2, [*range(1, 41, 2)]),
        (np.arange(40), [*range(16, 40)]),  # the 24 that are worst
    ):
        shown = per_query(ranks)
        chosen = query_sheets.choose(shown, shown, np.arange(40), np.array(cities), seed=0)
        assert chosen["worst"].tolist() == expected


def test_the_raw_backbones_results_stand_below_those_that_gained_most(cfg):
    rows = gallery.load([cfg.paths.merged_dir / "test.parquet"], 25.0)
    angles = torch.arange(len(rows.embeddings)) * 0.001
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = {"raw": per_query([7] * 180), "trained": per_query([1] * 180)}
    store = tar_images.of_paths(cfg.paths)
    sheets = query_sheets.make(store, rows, vectors, "trained", found, 0)
    asked, by_raw = sheets["best"][:2]
    assert len(sheets["best"]) == 2 * query_sheets.QUERIES_PER_SHEET
    assert (by_raw[0].kind, by_raw[0].lines) == ("method", ("first match at 7",))
    ids = rows.column("streetview_image_id").tolist()
    query = ids.index(asked[0].image_id)
    unit = rows.embeddings.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = [ids[row] for row, *_ in query_sheets.first_results(unit @ unit[query], rows, query)]
    assert [tile.image_id for tile in by_raw[1:]] == expected
    assert [tile.image_id for tile in asked[1:]] != expected
    assert {rows_of[0].kind for rows_of in sheets["worst"] + sheets["random"]} == {"query"}
    assert len(query_sheets.make(store, rows, vectors, "raw", found, 0)["best"]) == query_sheets.QUERIES_PER_SHEET


def test_results_leave_the_query_out_and_do_not_count_junk(cfg):
    rows = gallery.load([cfg.paths.merged_dir / "test.parquet"], 25.0)
    n = len(rows.embeddings)
    angles = torch.arange(n) * torch.pi / (2 * n)  # row i is most like rows i + 1, i + 2, ...
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = query_sheets.first_results((vectors @ vectors[0]).numpy(), rows, 0)
    # three views a building; buildings 0 and 1 are twins, 2 and 3 further off
    expected = [
        (1, "match"),
        (2, "match"),
        (3, "junk"),
        (4, "junk"),
        (5, "junk"),
        *((i, "wrong") for i in (6, 7, 8)),
    ]
    assert [(row, kind) for row, _, kind in found] == expected


def test_the_best_match_comes_last_where_the_first_results_are_all_wrong(cfg):
    rows = gallery.load([cfg.paths.merged_dir / "test.parquet"], 25.0)
    angles = torch.arange(len(rows.embeddings)) * 0.001
    angles[1], angles[2] = 2.0, 1.5  # the two matches of row 0 are what is least like it
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = query_sheets.first_results((vectors @ vectors[0]).numpy(), rows, 0)
    assert [(row, kind) for row, _, kind in found][-2:] == [(10, "wrong"), (2, "match")]


def test_distances_are_told_within_one_dataset_alone():
    here = {"dataset_id": 88, "target_lat": 40.0, "target_lon": -74.0}
    assert query_sheets._distance(here, here | {"target_lat": 40.001}) == "111 m"
    assert query_sheets._distance(here, here | {"dataset_id": 89, "target_lat": 48.0}) == "another dataset"


def test_figures_take_the_pages_colour_and_are_reproducible():
    history = pd.DataFrame({"epoch": [0, 1, 2], "loss": [np.nan, 0.2, 0.1], "val_map_at_r": [0.3, 0.31, 0.32]})
    shares = history.assign(share_band_0=[np.nan, 0.4, 0.5], share_random=[np.nan, 0.6, 0.5])
    for draw, table in ((evaluation_figures.training_curves, history), (evaluation_figures.band_shares, shares)):
        markup = draw(table)
        assert "currentColor" in markup
        assert "#0a0b0c" not in markup
        assert markup == draw(table)
    assert evaluation_figures.band_shares(shares.assign(share_random=np.nan)) is None


def test_figures_of_a_long_training_stay_small():
    epochs = 2_000
    rows = pd.DataFrame({"epoch": np.arange(epochs), "loss": 0.1, "val_map_at_r": 0.3})
    rows = rows.assign(**{f"share_{arm}": 1 / 8 for arm in [*(f"band_{b}" for b in range(7)), "random"]})
    assert len(evaluation_figures.band_shares(rows)) + len(evaluation_figures.training_curves(rows)) < 200_000


def test_a_dollar_in_the_name_of_a_file_is_no_formula():
    markup = evaluation_figures.recall_curve({"k": [1, 10], "methods": {"a$_b$<c>": [0.1, 0.2]}}, 1_000)
    assert "a$_b$&lt;c&gt;" in markup


def test_no_recall_is_shown_beyond_a_tenth_of_the_gallery(cfg, page_path):
    assert metric_names.shown_recalls(1_690) == ["recall@1", "recall@5", "recall@10", "recall@100"]
    assert metric_names.shown_recalls(10_000)[-1] == "recall@1000"
    assert metric_names.shown_recalls(100) == ["recall@1", "recall@5", "recall@10"]
    assert metric_names.shown_recalls(7) == ["recall@1"]
    text = Page(page_path.read_text()).text  # 180 images of 60 buildings
    assert "Recall@10" in text
    assert "Recall@100" not in text
    table_of_buildings = text.split("Half of the images")[1].split("Differences")[0]
    assert "Recall@5, %" in table_of_buildings
    assert "Recall@10" not in table_of_buildings
    curve = {"k": [1, 10, 1000], "methods": {"raw": [0.1, 0.2, 0.9]}}
    assert ">500<" not in evaluation_figures.recall_curve(curve, 1_690)
    assert ">100<" in evaluation_figures.recall_curve(curve, 1_690)
    assert ">1000<" in evaluation_figures.recall_curve(curve, 25_000_000)


def test_numbers_as_people_write_them():
    assert metrics_json.percent({"value": 0.4831, "low": None, "high": None}) == "48.3"
    assert metrics_json.percent({"value": -0.0001, "low": -0.012, "high": 0.0034}, "+") == "+0.0 [-1.2, +0.3]"
    assert metrics_json.flat({"a": {"b": 1, "c": [{"d": 2}]}, "e": 3}) == {"a.b": 1, "a.c.0.d": 2, "e": 3}


def test_a_file_of_many_datasets_shows_the_largest_and_stays_small():
    figure = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("recall@1", "recall@5", "map@r")}
    classes = [
        {"class": f"{n:04d}", "queries": n, "matches": n, "cells": 30, "methods": {"raw": figure} if n else {}}
        for n in range(500)
    ]
    markup = evaluation_figures.breakdown({"meaning": "", "classes": classes}, "dataset")
    assert "0499" in markup
    assert "0487" not in markup  # the thirteenth
    for entry in classes[:-1]:
        entry["queries"], entry["methods"] = 7, {"raw": figure}
    assert "0499: 499" in evaluation_figures.breakdown(
        {"meaning": "", "classes": classes}, "dataset"
    )  # the others are equal
    assert len(markup) < 100_000
