"""train/evaluation/metrics.py. Oracle: a loop over queries that sorts the gallery and walks down the ranking."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.evaluation import metrics
from train.evaluation.metrics import PerQuery, retrieval, summarize

CPU = torch.device("cpu")
NO_JUNK = "no junk"


def on_circle(*degrees):  # similarity = cosine of the angle between two images
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def ask(queries, gallery, query_building, gallery_building, self_rows=None, junk=NO_JUNK, memory_mb=16):
    n = len(queries)
    lists = [[] for _ in range(n)] if junk == NO_JUNK else junk
    return retrieval(
        queries,
        gallery,
        query_building=np.array(query_building),
        gallery_building=np.array(gallery_building),
        self_rows=np.full(n, -1) if self_rows is None else np.array(self_rows),
        junk=(np.cumsum([0, *map(len, lists)]), np.array([row for rows in lists for row in rows], np.int64)),
        memory_mb=memory_mb,
        device=CPU,
    )


def reference(scores, query_building, gallery_building, self_rows, junk) -> PerQuery:
    """Query by query: sort, drop junk and the query itself, walk down. Wrong rows first among equals."""
    rows = []
    for q, building in enumerate(query_building):
        dropped = {self_rows[q], *junk[q]}
        ranked = [
            gallery_building[g] == building
            for g in sorted(
                range(len(gallery_building)), key=lambda g: (-scores[q][g], gallery_building[g] == building)
            )
            if g not in dropped
        ]
        relevant = sum(ranked)
        if not relevant:
            rows.append((False, 0, 0, 0.0))
            continue
        precision = sum(sum(ranked[: i + 1]) / (i + 1) for i in range(relevant) if ranked[i]) / relevant
        rows.append((True, relevant, ranked.index(True) + 1, precision))
    return PerQuery(*map(np.array, zip(*rows, strict=True)))


def assert_same(found: PerQuery, expected: PerQuery):
    np.testing.assert_array_equal(found.has_match, expected.has_match)
    np.testing.assert_array_equal(found.num_matches, expected.num_matches)
    np.testing.assert_array_equal(found.best_rank, expected.best_rank)
    np.testing.assert_allclose(found.average_precision_at_r, expected.average_precision_at_r, atol=1e-12)


def test_ranks_and_precisions_that_one_can_see():
    gallery = on_circle(10, 20, 30, 40)
    found = ask(on_circle(0, 0), gallery, [1, 2], gallery_building=[2, 1, 1, 2])
    # query 0: wrong, right, right, wrong; R = 2, so only ranks 1 and 2 count: (0 + 1/2) / 2
    # query 1: right, wrong, wrong, right: (1/1 + 0) / 2
    assert found.best_rank.tolist() == [2, 1]
    assert found.num_matches.tolist() == [2, 2]
    assert found.average_precision_at_r.tolist() == [0.25, 0.5]
    certain = dict.fromkeys(("recall@5", "recall@10", "recall@100", "recall@1000"), 1.0)
    assert summarize(found) == {"recall@1": 0.5, **certain, "map@r": 0.375, "median_rank": 1.5}


def test_the_query_itself_is_no_match_and_no_rival():
    gallery = on_circle(0, 10, 5)
    found = ask(gallery[:2], gallery, [1, 1], [1, 1, 2], self_rows=[0, 1])
    assert found.num_matches.tolist() == [1, 1]
    assert found.best_rank.tolist() == [2, 2]  # counting the query itself would give 1


def test_junk_leaves_the_ranking_be_it_a_match_or_not():
    gallery = on_circle(1, 2, 3, 4)
    found = ask(on_circle(0), gallery, [1], [2, 1, 2, 1], junk=[[0, 1]])
    assert found.num_matches.tolist() == [1]
    assert found.best_rank.tolist() == [2]  # row 2 is still wrong and before row 3


def test_ties_count_against_the_match():
    same = on_circle(30, 30, 30)
    found = ask(on_circle(0), same, [1], [1, 2, 2])
    assert found.best_rank.tolist() == [3]  # counting only what scores strictly higher would give 1


def test_a_query_without_matches_is_left_out_of_the_means():
    found = ask(on_circle(0, 0), on_circle(0, 5), [1, 9], [1, 2])
    assert found.has_match.tolist() == [True, False]
    assert set(summarize(found).values()) == {1.0}
    nothing = summarize(found.select(~found.has_match))
    assert nothing.keys() == summarize(found).keys()
    assert np.isnan(list(nothing.values())).all()


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loop_on_clustered_data_with_duplicates_and_junk(seed, monkeypatch):
    monkeypatch.setitem(metrics._LARGEST_TILE, "cpu", (3, 1024))  # many tiles, the last one smaller
    rng = np.random.default_rng(seed)
    gallery_building = rng.integers(0, 12, 100)
    centers = rng.normal(size=(12, 8))
    gallery = centers[gallery_building] + rng.normal(size=(100, 8))
    gallery = gallery[rng.integers(0, 100, 100)]  # some rows twice: ties, within and across buildings
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    self_rows = np.append(rng.choice(100, 37, replace=False), [-1, -1, -1])
    queries = gallery[self_rows]
    query_building = np.append(gallery_building[self_rows[:37]], [3, 4, 99])
    junk = [rng.choice(100, rng.integers(0, 20), replace=False).tolist() for _ in range(40)]
    # equal vectors have equal scores in the reference, too: no BLAS promises that
    scores = np.round(queries.astype(np.float64) @ gallery.T.astype(np.float64), 12)
    expected = reference(scores, query_building, gallery_building, self_rows, junk)
    found = ask(queries, gallery, query_building, gallery_building, self_rows, junk)
    assert_same(found, expected)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_the_loop_on_whatever_comes(data):
    """Few values, so that many scores are equal; buildings of one image; junk from none to nearly everything."""
    draw = data.draw
    n, buildings = draw(st.integers(1, 24)), draw(st.sampled_from([1, 3, 8, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    places = draw(st.sampled_from([1, 2, 5, 1000]))  # different vectors: 1 = all equal
    gallery = np.eye(8, dtype=np.float32)[rng.integers(0, 8, places)] + rng.normal(size=(places, 8)) * (places > 5)
    gallery = gallery[rng.integers(0, places, n)]
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    gallery_building = rng.integers(0, buildings, n)
    self_rows = np.where(rng.random(n) < 0.8, np.arange(n), -1)
    junk_share = draw(st.sampled_from([0, 0.2, 0.9]))
    junk = [np.flatnonzero(rng.random(n) < junk_share).tolist() for _ in range(n)]
    found = ask(gallery, gallery, gallery_building, gallery_building, self_rows, junk)
    # equal vectors have equal scores, others differ by far more than rounding
    scores = np.round(gallery.astype(np.float64) @ gallery.T.astype(np.float64), 6)
    expected = reference(scores, gallery_building, gallery_building, self_rows, junk)
    assert_same(found, expected)
    ranks, precisions = expected.best_rank[expected.has_match], expected.average_precision_at_r[expected.has_match]
    if len(ranks):
        summary = summarize(found)
        assert summary["median_rank"] == sorted(ranks)[len(ranks) // 2] or len(ranks) % 2 == 0
        assert summary["map@r"] == pytest.approx(sum(precisions) / len(ranks))
        for k in metrics.RECALL_AT:
            assert summary[f"recall@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))


def test_equal_vectors_have_equal_scores_wherever_they_stand(monkeypatch):
    monkeypatch.setitem(metrics._LARGEST_TILE, "cpu", (13, 1024))  # many tiles, the last of each kind smaller
    rng = np.random.default_rng(0)
    looks = rng.normal(size=(40, 96)).astype(np.float32)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    which = rng.integers(0, 40, 3_500)  # every vector about 87 times, all over the gallery
    building = rng.integers(0, 700, 3_500)
    found = ask(looks[which[:100]], looks[which], building[:100], building, np.arange(100))
    scores = looks.astype(np.float64) @ looks.T.astype(np.float64)
    expected = reference(scores[which[:100]][:, which], building[:100], building, np.arange(100), [[]] * 100)
    assert_same(found, expected)


@pytest.mark.parametrize("memory_mb", [16, 64, 4096])
@pytest.mark.parametrize("dim", [256, 4096])
def test_a_tile_keeps_within_its_memory(memory_mb, dim):
    gallery = torch.empty(1).expand(3_000_000, dim)
    for device, tiles in ((CPU, 1), (torch.device("cuda"), 2)):  # of the gallery: the last padded; and moved there
        queries, width = metrics.tile_sizes(gallery, device, memory_mb)
        size = queries * width * 6 + queries * dim * 8  # a score and its comparison; queries twice
        smallest = 1024 * 6 + dim * 8 + tiles * 1024 * dim * 4
        assert size + tiles * width * dim * 4 <= max(memory_mb * 2**20, smallest)


def test_a_part_of_the_matches_leaves_the_others_out_of_the_ranking():
    gallery = on_circle(10, 20, 30, 40)
    found = metrics.find_matches(
        on_circle(0), gallery, query_building=np.array([1]), gallery_building=np.array([1, 2, 1, 2]),
        self_rows=np.array([-1]), junk=(np.array([0, 0]), np.empty(0, np.int64)), memory_mb=16, device=CPU,
    )  # fmt: skip
    assert (found.row.tolist(), found.ahead.tolist()) == ([0, 2], [0, 1])
    np.testing.assert_allclose(found.score, np.cos(np.radians([10, 30])), atol=1e-6)
    hard = metrics.per_query(found.select(found.row == 2))
    assert (hard.num_matches.tolist(), hard.best_rank.tolist()) == ([1], [2])  # 3 with the other match ahead of it


def test_the_most_similar_wrong_row_is_neither_junk_nor_of_the_building_nor_the_query_itself(monkeypatch):
    monkeypatch.setitem(metrics._LARGEST_TILE, "cpu", (13, 1024))  # three tiles of the gallery
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(2_500, 6)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    building, rows = rng.integers(0, 90, 2_500), np.arange(60)
    building[:5] = 1_000 + np.arange(5)  # without a match
    junk = rng.random((60, 2_500)) < 0.3
    junk[7] = True
    found = metrics.find_matches(
        gallery[rows], gallery, query_building=building[rows], gallery_building=building, self_rows=rows,
        junk=(np.append(0, junk.sum(1).cumsum()), np.nonzero(junk)[1]), memory_mb=16, device=CPU,
    )  # fmt: skip
    scores = gallery[rows].astype(np.float64) @ gallery.T.astype(np.float64)
    scores[junk | (building[rows, None] == building)] = -np.inf
    expected = np.where(np.arange(60) == 7, -1, scores.argmax(axis=1))
    np.testing.assert_array_equal(found.wrong_row, expected)
    np.testing.assert_allclose(found.wrong_score, scores.max(axis=1), atol=1e-6)  # -inf where there is none
    easier = found.select(found.ahead == 0)
    np.testing.assert_array_equal(easier.wrong_row, expected)
    both = metrics.concatenate([found, easier])
    np.testing.assert_array_equal(both.wrong_row, np.tile(expected, 2))
    assert both.num_queries == len(both.wrong_score) == 120


def test_a_building_of_many_images_and_a_constant_embedding():
    gallery = np.tile(on_circle(45), (300, 1))
    found = ask(gallery, gallery, np.arange(300) // 100, np.arange(300) // 100, self_rows=np.arange(300))
    assert (found.num_matches == 99).all()
    assert (found.best_rank == 201).all()  # a model that says the same of everything finds nothing
    assert (found.average_precision_at_r == 0).all()


def test_no_queries_and_values_that_are_not_finite():
    assert len(ask(np.empty((0, 2), np.float32), on_circle(0), [], [1]).best_rank) == 0
    with pytest.raises(ValueError, match="gallery"):  # a NaN compares as False and would rank first
        ask(on_circle(0), np.full((1, 2), np.nan, np.float32), [1], [1])
