"""difficulty/search/exact_search.py. Oracle: brute force in float64, and layouts small enough to see the
answer.
"""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.places.zones import make_zones
from difficulty.search import balltree, cosines, exact_search
from difficulty.search.exact_search import exact_neighbors
from difficulty.search.search_vectors import SearchVectors

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
    embeddings = torch.from_numpy(np.asarray(embeddings))
    return exact_neighbors(embeddings, zones, k=k, rows=rows, memory_mb=memory_mb, device=CPU)


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
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force_in_every_tile_size(kind, bfloat16, masked, monkeypatch):
    monkeypatch.setattr(exact_search, "fast_bfloat16", lambda device: bfloat16)
    rng = np.random.default_rng(0)
    n, k = 260, 20
    embeddings = KINDS[kind](rng, n, 24).astype(np.float16 if masked else np.float32)
    buildings = np.unique(np.sort(rng.integers(0, 80, n)), return_inverse=True)[1] if masked else np.arange(n)
    zones = zones_at(rng.uniform(0, 3_000, n)[buildings], buildings, radius_m=25.0 if masked else 0.0)
    expected_rows, expected_similarities = brute_force(embeddings, zones, k)
    # tiles of 1 x 27, 34 x 409 and 1024 x 8192; of the smallest there are many: for some anchors only
    for memory_mb, anchors in ((0.02, np.arange(100, 150)), (0.3, np.arange(n)), (16, np.arange(n))):
        rows, similarities = neighbors(embeddings, zones, k, anchors, memory_mb)
        np.testing.assert_array_equal(rows, expected_rows[anchors])
        np.testing.assert_allclose(similarities, expected_similarities[anchors], atol=2e-6)  # sums of 24 terms


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", ["duplicated", "parallel", "constant"])
def test_scores_that_reach_a_floor_are_listed_only_if_there_is_room_for_them(kind, bfloat16, monkeypatch):
    monkeypatch.setattr(exact_search, "fast_bfloat16", lambda device: bfloat16)
    monkeypatch.setitem(exact_search._TILE, "cpu", (200, 64))  # columns with more lines than candidates are kept
    listing, most, room = exact_search._flat_nonzero, [], max(exact_search.KEPT * 2, 32)

    def flat_nonzero(reach):
        most.append(int(reach.sum(dim=1).max()))
        return listing(reach)

    monkeypatch.setattr(exact_search, "_flat_nonzero", flat_nonzero)
    embeddings = KINDS[kind](np.random.default_rng(4), 500, 24).astype(np.float16)
    zones = zones_at(np.arange(500) * 100)
    np.testing.assert_array_equal(neighbors(embeddings, zones, 2)[0], brute_force(embeddings, zones, 2)[0])
    assert max(most) <= room
    if kind == "constant":  # every score reaches every floor: all anchors are crowded and none is listed
        assert most == [0] * len(most)


@pytest.mark.parametrize("products", [cosines.sampled_products, cosines.gathered_products])  # of a CPU and a GPU
@pytest.mark.parametrize("kind", KINDS)
def test_cosines_of_chosen_pairs_are_those_of_float64(kind, products):
    rng = np.random.default_rng(10)
    embeddings = torch.from_numpy(KINDS[kind](rng, 300, 24).astype(np.float16))
    own, rows = torch.arange(5, 45), torch.from_numpy(rng.integers(0, 300, (40, 30)))
    asked = torch.from_numpy(rng.random((40, 30)) < 0.4)
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True).clamp(min=1e-300)
    expected = torch.where(asked, (unit[own, None] * unit[rows]).sum(dim=2), 0)
    values = products(SearchVectors(embeddings, torch.float32, CPU), own, rows, asked, at_once=7)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_as_near_to_the_cosine_as_the_gallery_says(kind):
    embeddings = torch.from_numpy(KINDS[kind](np.random.default_rng(5), 600, 96).astype(np.float16))
    gallery = SearchVectors(embeddings, torch.bfloat16, CPU)
    scores = gallery.scores(gallery.queries(torch.arange(600)), 0, 600).double()
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    exact = unit @ unit.T
    exact -= (exact - scores).mean()
    allowed = gallery.error + gallery.rounding * scores.abs()
    assert ((scores - exact).abs() <= allowed).all()
    for k in (1, 20):  # nothing that belongs to the best k scores below the floor of the best k scores
        floor = gallery.below(scores.float().topk(k).values[:, -1])
        best = exact.topk(k).indices
        assert (scores.gather(1, best) >= floor[:, None].bfloat16()).all()


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_first_floors_that_are_guessed_change_nothing_be_they_right_or_wrong(kind, bfloat16, monkeypatch):
    monkeypatch.setattr(exact_search, "fast_bfloat16", lambda device: bfloat16)
    embeddings = KINDS[kind](np.random.default_rng(7), 600, 48).astype(np.float16)
    buildings = np.arange(600) // 3
    zones = zones_at(np.random.default_rng(8).uniform(0, 9_000, 200)[buildings], buildings)
    expected, _ = brute_force(embeddings, zones, 20)
    guessed, guess = [], exact_search._guess_floors

    def guess_well_or_badly(found, *others):
        guess(found, *others)
        guessed.append(float(found.guess.float().mean()))
        found.guess[::2] += 0.2  # too high: these are found to have fewer than k, and searched again
        found.floor[::2] += 0.2

    monkeypatch.setattr(exact_search, "_guess_floors", guess_well_or_badly)
    monkeypatch.setitem(exact_search._TILE, "cpu", (64, 64))
    np.testing.assert_array_equal(neighbors(embeddings, zones, 20)[0], expected)
    assert len(guessed) == 1
    assert guessed[0] > -1


def test_a_sample_of_fewer_rows_than_a_floor_is_guessed_from_guesses_none(monkeypatch):
    monkeypatch.setattr(exact_search, "fast_bfloat16", lambda device: True)
    monkeypatch.setitem(exact_search._TILE, "cpu", (16, 8))
    embeddings = KINDS["random"](np.random.default_rng(9), 300, 16).astype(np.float16)
    zones = zones_at(np.arange(300) * 100)
    rows, _ = neighbors(embeddings, zones, k=250)  # of 8 rows, the 42nd best is asked for
    np.testing.assert_array_equal(rows, brute_force(embeddings, zones, 250)[0])


def test_candidates_of_one_round_are_gone_before_the_next(monkeypatch):
    held, collect = [], exact_search._collect

    def collect_when_all_are_gone(*arguments):
        assert not any(earlier() for earlier in held)  # else twice the candidates' half of the memory is held
        found = collect(*arguments)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(exact_search, "_collect", collect_when_all_are_gone)
    embeddings = KINDS["clustered"](np.random.default_rng(0), 300, 16).astype(np.float16)
    neighbors(embeddings, zones_at(np.arange(300) * 100), k=20, memory_mb=0.05)
    assert len(held) > 3


def test_products_in_bfloat16_are_summed_in_float32_on_cuda():
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # torch's default
    SearchVectors(torch.ones(2, 2), torch.bfloat16, CPU)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_vectors_that_lean_one_way_need_no_second_search():
    rng = np.random.default_rng(6)
    gallery = SearchVectors(torch.from_numpy(rng.normal(size=(4_000, 256)) + 2.0).half(), torch.bfloat16, CPU)
    anchors = np.arange(0, 4_000, 8)
    zones, size, told = zones_at(np.arange(4_000) * 100), exact_search.Sizes(512, 512, 512, 512), []
    collected = exact_search._collect(gallery, zones, anchors, 20, size, True, told.append)
    assert collected.crowded.float().mean() < 0.05  # with the mean in them nearly all have too many candidates


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
    anchors, gallery, settled, together = exact_search.tile_sizes(dim, 150, memory_mb, CPU)
    held = 8 * anchors * (gallery + dim) + 8 * gallery * dim
    held += settled * (40 * 4 * 150 + 16 * dim) + 8 * together * 4 * 150
    assert held <= memory_mb * 2**20 * 7 / 8  # an eighth is for what candidates are compared with
    assert together >= anchors >= 50  # or the products crawl


PEAK = """
import re, sys
from pathlib import Path
import numpy as np, torch
from common.places.zones import make_zones
from difficulty.search.exact_search import exact_neighbors

def held_mb(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak_mb(n, memory_mb):
    embeddings = torch.randn(n, 256, generator=torch.Generator().manual_seed(0)).half()
    rows = np.arange(n)
    zones = make_zones(rows, rows * 1e-3, rows * 0.0, 25.0)
    before = held_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    exact_neighbors(embeddings, zones, k=100, rows=rows, memory_mb=memory_mb, device=torch.device("cpu"))
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
    assert float(done.stdout) <= memory_mb + n * (256 * 2 + 100 * 8) / 2**20  # vectors in bfloat16, and the result


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


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_progress_counts_each_anchor_once_also_those_that_are_searched_again(monkeypatch, dtypes):
    monkeypatch.setattr(exact_search, "fast_bfloat16", lambda device: dtypes == "bfloat16")
    copies = np.repeat(np.random.default_rng(0).normal(size=(4, 16)), 50, axis=0)  # all of them are crowded
    told, vectors = [], torch.from_numpy(copies.astype(np.float16))
    options = {"k": 3, "rows": np.arange(200), "memory_mb": 64, "device": CPU}
    exact_neighbors(vectors, zones_at(100.0 * np.arange(200)), on_anchors=told.append, **options)
    assert sum(told) == 200
