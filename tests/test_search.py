"""difficulty/search/exact_search.py on the CPU. Oracle: brute force in float64, and layouts small enough to see
the answer.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.places.zones import make_zones
from difficulty.search import balltree, exact_search
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors, error_of

CPU = torch.device("cpu")
METRES = 1 / 111_195  # degrees of latitude


def on_circle(*degrees):  # similarity = cosine of the angle between two images
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def zones_at(north_m, building_of_row=None, radius_m=25.0):
    north_m = np.asarray(north_m, np.float64)
    buildings = np.arange(len(north_m)) if building_of_row is None else np.asarray(building_of_row)
    return make_zones(buildings, north_m * METRES, np.zeros(len(north_m)), radius_m)


def neighbors(embeddings, zones, k, rows=None, memory_mb=16.0):
    rows = np.arange(len(embeddings)) if rows is None else rows
    vectors = SearchVectors(torch.from_numpy(np.asarray(embeddings)), CPU)
    return exact_neighbors(vectors, zones, k=k, rows=rows, memory_mb=memory_mb)


def brute_force(embeddings, zones, k):
    """Every pair in float64; ties (to 1e-12) by row number. The vector 0 is like nothing, not even itself."""
    x = np.asarray(embeddings, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    similarities = np.round(x @ x.T, 12)
    for row in range(len(x)):
        indices = zones.rows_of(np.array([row]), own=True)[1]
        similarities[row, indices] = -np.inf
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(similarities, order, axis=1)
    return np.where(np.isfinite(values), order, -1), np.where(np.isfinite(values), values, -1)


def test_neighbours_that_one_can_see():
    rows, similarities = neighbors(on_circle(0, 10, 30, 70), zones_at([0, 1000, 2000, 3000]), k=2)
    assert rows.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    np.testing.assert_allclose(similarities[0], np.cos(np.radians([10, 30])), atol=1e-6)


def test_ignore_zone_is_masked_before_the_best_k_are_taken():
    # row 1 looks most alike, but is the same facade, 10 m on
    rows, _ = neighbors(on_circle(0, 1, 20, 40), zones_at([0, 10, 5_000, 6_000]), k=2)
    assert rows[0].tolist() == [2, 3]  # masking after the cut would give [2, -1]


def test_images_of_the_same_building_are_never_neighbours():
    rows, _ = neighbors(on_circle(0, 1, 2, 40), zones_at([0, 0, 0, 6_000], [0, 0, 0, 1]), k=3)
    assert rows.tolist() == [[3, -1, -1], [3, -1, -1], [3, -1, -1], [2, 1, 0]]


def clustered(rng, n, dim):
    return rng.normal(size=(20, dim))[rng.integers(0, 20, n)] + 0.3 * rng.normal(size=(n, dim))


KINDS = {
    "random": lambda rng, n, dim: rng.normal(size=(n, dim)),
    "clustered": clustered,
    "leaning": lambda rng, n, dim: 3 + clustered(rng, n, dim),  # all one way, as a backbone's vectors do
    "duplicated": lambda rng, n, dim: clustered(rng, n, dim)[rng.integers(0, n // 8, n)],
    "scaled copies": lambda rng, n, dim: (
        rng.normal(size=(n // 8, dim))[rng.integers(0, n // 8, n)] * 2.0 ** rng.integers(0, 3, (n, 1))
    ),
    "parallel": lambda rng, n, dim: (
        rng.integers(-8, 9, (n // 8, dim))[rng.integers(0, n // 8, n)] * rng.integers(1, 6, (n, 1))
    ),
    "equal angles": lambda rng, n, dim: rng.integers(-1, 2, (n, dim)),  # though no two vectors are equal
    "some of them 0": lambda rng, n, dim: rng.normal(size=(n, dim)) * (rng.random((n, 1)) < 0.7),
    "all lengths": lambda rng, n, dim: rng.normal(size=(n, dim)) * 10.0 ** rng.uniform(-6, 4, (n, 1)),
    "constant": lambda rng, n, dim: np.ones((n, dim)),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force_in_every_tile_size(kind, masked):
    rng = np.random.default_rng(0)
    n, k = 260, 20
    embeddings = KINDS[kind](rng, n, 24).astype(np.float16 if masked else np.float32)
    buildings = np.unique(np.sort(rng.integers(0, 80, n)), return_inverse=True)[1] if masked else np.arange(n)
    zones = zones_at(rng.uniform(0, 3_000, n)[buildings], buildings, radius_m=25.0 if masked else 0.0)
    expected_rows, expected_similarities = brute_force(embeddings, zones, k)
    # tiles of a few x 16, of about 30 x 352, and all in one; of the smallest there are many: for some anchors only
    for memory_mb, anchors in ((0.02, np.arange(100, 150)), (0.3, np.arange(n)), (64, np.arange(n))):
        rows, similarities = neighbors(embeddings, zones, k, anchors, memory_mb)
        np.testing.assert_array_equal(rows, expected_rows[anchors])
        np.testing.assert_allclose(similarities, expected_similarities[anchors], atol=2e-6)  # sums of 24 terms


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_of_chosen_pairs_are_those_of_float64(kind):
    rng = np.random.default_rng(10)
    embeddings = torch.from_numpy(KINDS[kind](rng, 300, 24).astype(np.float16))
    anchors, rows = (torch.from_numpy(rng.integers(0, 300, 700)) for _ in range(2))
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True).clamp(min=1e-300)
    expected = (unit[anchors] * unit[rows]).sum(dim=1)
    values = SearchVectors(embeddings, CPU).cosines(anchors, rows, memory_mb=0.005)  # seven at a time
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_as_near_to_the_cosines_as_their_bound_says(kind):
    embeddings = torch.from_numpy(KINDS[kind](np.random.default_rng(5), 600, 96).astype(np.float16))
    vectors = SearchVectors(embeddings, CPU)
    scores, rows = exact_search._collect(vectors, zones_at(np.arange(600) * 100), np.arange(600), 600, 64)
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    exact = (unit @ unit.T).gather(1, rows.long()).masked_fill(scores.isinf(), -torch.inf)
    assert (scores.isinf().sum(dim=1) == 1).all()  # itself
    torch.testing.assert_close(scores.double(), exact, atol=error_of(96), rtol=0)


def test_typical_vectors_are_searched_once_and_copies_until_there_is_room_for_them(monkeypatch):
    searched, collect = [], exact_search._collect

    def count(vectors, zones, anchors, width, *others):
        searched.append((width, len(anchors)))
        return collect(vectors, zones, anchors, width, *others)

    monkeypatch.setattr(exact_search, "_collect", count)
    rng = np.random.default_rng(6)
    leaning = (clustered(rng, 3_000, 256) + 1.0).astype(np.float16)
    neighbors(leaning, zones_at(np.arange(3_000) * 100), k=20, rows=np.arange(0, 3_000, 8), memory_mb=256)
    assert len(searched) == 1
    searched.clear()
    copies = np.repeat(rng.normal(size=(2, 16)), [30, 2_000], axis=0).astype(np.float16)
    rows, _ = neighbors(copies, zones_at(np.arange(2_030) * 100), k=20, rows=np.arange(0, 2_030, 29), memory_mb=64)
    widths, sizes = zip(*searched, strict=True)
    assert sizes[0] == 70
    assert sizes[-1] == 68  # all but two of the 30: those have room for all their copies
    assert widths[-1] == 2_030
    np.testing.assert_array_equal(rows, brute_force(copies, zones_at(np.arange(2_030) * 100), 20)[0][::29])


def test_equal_images_stand_by_row_number_though_more_of_them_exist_than_are_kept():
    embeddings = np.concatenate([on_circle(0), np.tile(on_circle(10), (200, 1)), on_circle(5)])
    rows, _ = neighbors(embeddings, zones_at(np.arange(202) * 1000), k=4)
    assert rows[0].tolist() == [201, 1, 2, 3]  # top-k alone takes any of the 200


@pytest.mark.parametrize("kind", ["random", "duplicated"])
def test_a_shard_has_the_same_neighbours_as_the_whole(kind):
    embeddings = KINDS[kind](np.random.default_rng(1), 300, 16).astype(np.float16)
    zones = zones_at(np.random.default_rng(2).uniform(0, 5_000, 300))
    whole, _ = neighbors(embeddings, zones, k=15)
    parts = [neighbors(embeddings, zones, k=15, rows=rows)[0] for rows in np.array_split(np.arange(300), 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(whole, brute_force(embeddings, zones, 15)[0])


def test_more_neighbours_asked_for_than_there_are_and_a_single_image():
    rows, similarities = neighbors(on_circle(0, 10, 20), zones_at([0, 1000, 2000]), k=5)
    assert rows[0].tolist() == [1, 2, -1, -1, -1]
    assert similarities[0, 2:].tolist() == [-1, -1, -1]
    assert neighbors(on_circle(0), zones_at([0]), k=2)[0].tolist() == [[-1, -1]]


@pytest.mark.parametrize("memory_mb", [16, 100, 1024])
@pytest.mark.parametrize("dim", [64, 768, 4096])
def test_tiles_keep_within_the_memory(dim, memory_mb):
    vectors, width = SearchVectors(torch.zeros(1, dim), CPU), 300
    anchors, gallery = exact_search.tile_sizes(vectors, width, memory_mb)
    scores = anchors * gallery * 4 * 5 / 4  # with the maxima
    candidates = anchors * width * (2 * 4 * (4 + 4) + 24)
    assert scores + candidates + 8 * dim * (anchors + gallery) <= memory_mb * 2**20 * 3 / 4
    assert anchors >= 40  # or the products crawl


PEAK = """
import re, sys
from pathlib import Path
import numpy as np, torch
from common.places.zones import make_zones
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors

def held_mb(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak_mb(n, memory_mb):
    embeddings = torch.randn(n, 256, generator=torch.Generator().manual_seed(0)).half()
    rows = np.arange(n)
    zones = make_zones(rows, rows * 1e-3, rows * 0.0, 25.0)
    before = held_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    vectors = SearchVectors(embeddings, torch.device("cpu"))
    exact_neighbors(vectors, zones, k=100, rows=rows, memory_mb=memory_mb)
    return held_mb("VmHWM") - before

peak_mb(900, 16)  # torch allocates some of its own once
print(peak_mb(*map(int, sys.argv[1:])))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here")
@pytest.mark.parametrize("memory_mb", [128, 256])  # of less, what torch itself holds is a share
def test_the_peak_memory_is_what_was_set(memory_mb):
    n = 16_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(n), str(memory_mb)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= memory_mb + n * 100 * 8 / 2**20  # the result


def test_balltree_in_all_dimensions_is_exact_and_keeps_its_k_in_a_dense_place():
    rng = np.random.default_rng(2)
    embeddings = clustered(rng, 400, 8).astype(np.float32)
    zones = zones_at(np.repeat(rng.uniform(0, 2_000, 40), 10))
    rows = np.arange(3, 400, 7)
    found, similarities = balltree.Tree(embeddings, 8).neighbors(zones, 12, rows)
    expected, expected_similarities = brute_force(embeddings, zones, 12)
    assert balltree.recall(found, expected[rows]) > 0.97  # the PCA keeps the distances between unit vectors
    assert (found >= 0).all()
    np.testing.assert_allclose(np.sort(similarities)[:, ::-1], similarities)
    np.testing.assert_allclose(similarities, expected_similarities[rows], atol=1e-3)


def test_balltree_with_fewer_than_k_neighbours_leaves_the_rest_empty():
    rows, similarities = balltree.Tree(on_circle(0, 10, 20), 2).neighbors(
        zones_at([0, 10, 2_000]), 3, np.arange(3)
    )
    assert rows.tolist() == [[2, -1, -1], [2, -1, -1], [1, 0, -1]]
    assert similarities[:, 1:].tolist() == [[-1, -1], [-1, -1], [pytest.approx(np.cos(np.radians(20))), -1]]


def test_balltree_on_few_dimensions_forgets_neighbours_and_recall_says_so():
    embeddings = np.random.default_rng(3).normal(size=(400, 32)).astype(np.float32)
    zones = zones_at(np.arange(400) * 100)
    found, _ = balltree.Tree(embeddings, 2).neighbors(zones, 10, np.arange(400))
    assert 0.02 < balltree.recall(found, brute_force(embeddings, zones, 10)[0]) < 0.5


def test_balltree_on_many_images_warns_that_exact_is_faster(monkeypatch, caplog):
    monkeypatch.setattr(balltree, "MOST_ROWS", 100)
    balltree.Tree(np.eye(100, dtype=np.float16), 2)
    assert not caplog.text
    balltree.Tree(np.eye(101, dtype=np.float16), 2)
    assert 'data.search = "balltree" on 101 images: "exact" is faster and complete' in caplog.text


def test_recall_counts_only_what_there_is_to_find():
    assert balltree.recall(np.array([[4, 5, -1], [1, 2, 3]]), np.array([[5, 9, -1], [3, 1, 2]])) == 4 / 5


def test_progress_counts_each_anchor_once_also_those_that_are_searched_again():
    copies = np.repeat(np.random.default_rng(0).normal(size=(4, 16)), 500, axis=0).astype(np.float16)
    told, vectors = [], SearchVectors(torch.from_numpy(copies), CPU)
    zones = zones_at(100.0 * np.arange(2_000))
    exact_neighbors(vectors, zones, k=3, rows=np.arange(200), memory_mb=64, on_anchors=told.append)
    assert sum(told) == 200
