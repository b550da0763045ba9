"""train/evaluation/bootstrap.py. Oracle: numpy on rows repeated as a draw says, and data simulated with a known
truth.
"""

import numpy as np
import pytest

from train.evaluation import bootstrap


def test_a_draw_repeats_whole_cells():
    values = np.array([[1.0], [3.0], [8.0]])
    cells = np.array([0, 0, 1])
    weights = np.array([[1, 1], [2, 0], [0, 2], [1, 3]])
    # all rows: 12/3; cell 0 twice: (1+3)/2; cell 1 twice: 8; a mean of cells' means would give 5 first
    assert bootstrap.means(values, cells, weights).ravel().tolist() == [4, 2, 8, 28 / 5]
    assert bootstrap.medians(values[:, 0], cells, weights).tolist() == [3, 2, 8, 8]


def test_means_and_medians_equal_numpy_on_repeated_rows(monkeypatch):
    monkeypatch.setattr(bootstrap, "_BLOCK_VALUES", 1000)  # several blocks of draws
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 25, 300)
    values = rng.integers(1, 12, (300, 2)).astype(float)
    weights = bootstrap.draw_weights(25, 40, seed=1)
    repeated = [np.repeat(values, row[cells].astype(int), axis=0) for row in weights]
    np.testing.assert_allclose(
        bootstrap.means(values, cells, weights), [rows.mean(axis=0) for rows in repeated], rtol=1e-12
    )
    found = bootstrap.medians(values[:, 0], cells, weights)
    assert found.tolist() == [np.median(rows[:, 0]) for rows in repeated]


def test_weights_are_draws_with_replacement_and_the_same_for_a_seed():
    weights = bootstrap.draw_weights(30, 50, seed=3)
    assert weights.shape == (51, 30)
    assert (weights.sum(axis=1) == 30).all()
    assert (weights[0] == 1).all()
    np.testing.assert_array_equal(weights, bootstrap.draw_weights(30, 50, seed=3))


def test_below_twenty_cells_there_is_no_interval():
    weights = bootstrap.draw_weights(19, 100, seed=0)
    estimates = bootstrap.means(np.arange(19.0)[:, None], np.arange(19), weights)[:, 0]
    assert bootstrap.interval(estimates, 19) == {"value": 9.0, "low": None, "high": None}


def test_cells_of_uneven_size_count_less():
    assert bootstrap.effective_cells(np.repeat(np.arange(30), 7)) == pytest.approx(30)
    one_crowded = np.append(np.arange(30), np.full(970, 30))  # 31 cells, but what one of them says decides
    assert bootstrap.effective_cells(one_crowded) < 1.1
    assert bootstrap.effective_cells(np.empty(0, int)) == 0


TRIALS = 4000  # then the standard error of a coverage is 0.35 points: enough to tell 93 or 97 % from 95


@pytest.mark.parametrize("num_cells", [20, 60, 200])
def test_intervals_cover_the_truth_95_times_in_100(num_cells):
    rng = np.random.default_rng(4)
    cells = np.repeat(np.arange(num_cells), 10)
    weights = bootstrap.draw_weights(num_cells, 1000, seed=0)
    shared = rng.normal(0.0, 1.0, (num_cells, TRIALS))  # a cell's images succeed together; the truth is 0
    values = shared[cells] + rng.normal(0.0, 1.0, (len(cells), TRIALS))
    estimates = bootstrap.means(values, cells, weights)
    found = [bootstrap.interval(column, num_cells) for column in estimates.T]
    covered = np.mean([interval["low"] <= 0 <= interval["high"] for interval in found])
    assert 0.93 <= covered <= 0.97  # drawing single images would cover about 60 %


def test_intervals_of_a_share_cover_the_truth_with_cells_of_very_unequal_size():
    rng = np.random.default_rng(8)
    weights = bootstrap.draw_weights(64, 1000, seed=0)
    covered, intervals = 0, 0
    for _ in range(TRIALS):
        sizes = np.ceil(rng.lognormal(3, 1, 64)).astype(int)  # the largest holds 10 % of the images or more
        found = rng.binomial(sizes, rng.beta(4, 2, 64))  # a cell's images are alike hard; 2/3 are found on average
        cells = np.repeat(np.arange(64), sizes)
        values = np.concatenate([np.arange(size) < hits for size, hits in zip(sizes, found, strict=True)])
        estimates = bootstrap.means(values[:, None].astype(float), cells, weights)[:, 0]
        interval = bootstrap.interval(estimates, bootstrap.effective_cells(cells))
        if interval["low"] is not None:  # else there were too few cells, counted by their size
            intervals += 1
            covered += interval["low"] <= 2 / 3 <= interval["high"]
    assert intervals > TRIALS / 2
    assert 0.93 <= covered / intervals <= 0.97


def test_the_paired_interval_of_a_difference_is_narrower_than_the_unpaired_one():
    rng = np.random.default_rng(5)
    cells = np.repeat(np.arange(40), 20)
    base = rng.normal(0, 1, 40)[cells] + rng.normal(0, 1, 800)
    values = np.stack([base, base + 0.1 + rng.normal(0, 0.1, 800)], axis=1)
    estimates = bootstrap.means(values, cells, bootstrap.draw_weights(40, 500, seed=0))
    other = bootstrap.means(values, cells, bootstrap.draw_weights(40, 500, seed=1))
    paired = bootstrap.interval(estimates[:, 1] - estimates[:, 0], 40)
    unpaired = bootstrap.interval(estimates[:, 1] - other[:, 0], 40)
    assert paired["low"] > 0
    assert paired["high"] - paired["low"] < 0.2 * (unpaired["high"] - unpaired["low"])
