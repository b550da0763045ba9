"""train/linear/baselines.py: which shrinkage whitening takes. Oracles: the rule written out in plain Python;
NumPy's standard error where all buildings are of one size, and the spread of many draws of buildings where they
are not.
"""

import math
import statistics

import made_up_merge
import numpy as np
import pytest
from conftest import paths_below

from common import config
from difficulty import compute_visual_neighbors
from train import datasets
from train.evaluation.validation import standard_error
from train.linear import baselines


def test_the_standard_error_of_buildings_of_one_size_is_that_of_their_means():
    values = np.random.default_rng(0).uniform(size=(12, 3))
    expected = values.mean(axis=1).std(ddof=1) / math.sqrt(12)
    shuffled = np.random.default_rng(1).permutation(36)
    found = standard_error(values.ravel()[shuffled], np.repeat(np.arange(12), 3)[shuffled])
    assert found == pytest.approx(expected)
    assert standard_error(values.ravel(), np.zeros(36)) == math.inf


def test_the_standard_error_is_how_much_the_mean_varies_with_the_buildings():
    rng = np.random.default_rng(2)

    def draw():  # large buildings are easier, and images of a building alike
        sizes = rng.integers(2, 10, 80)
        building = np.repeat(np.arange(80), sizes)
        return (rng.normal(sizes, 3)[building] + rng.normal(size=len(building))), building

    samples = [draw() for _ in range(2000)]
    found = [standard_error(*sample) for sample in samples]
    spread = np.std([values.mean() for values, _ in samples])
    assert np.mean(found) == pytest.approx(spread, rel=0.06)  # of 2,000 draws: known to 1.6 %
    naive = [values.std() / math.sqrt(len(values)) for values, _ in samples]
    assert np.mean(found) > 1.5 * np.mean(naive)  # queries are not independent


def rule_written_out(precisions, buildings) -> int:
    """The choice, by the definition, for buildings of one size."""
    places = [[i for i, building in enumerate(buildings) if building == own] for own in set(buildings)]
    candidates = [[statistics.mean(row[i] for i in own) for own in places] for row in precisions]
    best = max(candidates, key=statistics.mean)
    chosen = None
    for number, candidate in enumerate(candidates):
        lost = [a - b for a, b in zip(best, candidate, strict=True)]
        if statistics.mean(lost) <= statistics.stdev(lost) / math.sqrt(len(lost)):
            chosen = number
    return chosen


def test_the_choice_is_the_most_shrinkage_within_one_standard_error():
    rng, buildings, chosen = np.random.default_rng(3), np.repeat(np.arange(9), 4), []
    for _ in range(200):
        of_building = rng.uniform(0.2, 0.8, 9)
        precisions = (
            of_building[buildings] + rng.normal(0, 0.05, (5, 36)) - 0.01 * (np.arange(5)[:, None] - 2) ** 2
        )
        chosen.append(baselines.most_shrinkage(precisions, buildings))
        assert chosen[-1] == rule_written_out(precisions.tolist(), buildings.tolist())
    assert set(chosen) == {1, 2, 3, 4}


def test_ties_go_to_more_shrinkage_and_clear_losses_do_not():
    buildings = np.repeat(np.arange(6), 2)
    high, low = np.full(12, 0.5), np.full(12, 0.4)
    assert baselines.most_shrinkage(np.stack([high, high, high, low]), buildings) == 2
    worse_by_chance = high - np.repeat([0.3, -0.25, 0.02, -0.03, 0.01, -0.01], 2)
    assert worse_by_chance.mean() < 0.5
    assert baselines.most_shrinkage(np.stack([high, worse_by_chance, low]), buildings) == 1


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """`merge(streets)`: settings of a merge with so many streets of ten buildings to validate on."""

    def write(streets):
        root = tmp_path_factory.mktemp("merge")
        made_up_merge.write_merge(paths_below(root).merged_dir, streets=(12, streets, 1))
        settings = [f"paths.root={root}", "data.neighbors=20", "training_model.output_dim=8"]
        compute_visual_neighbors.main([flag for setting in settings for flag in ("--set", setting)])
        return settings

    return {streets: write(streets) for streets in (2, 3)}


@pytest.mark.parametrize(
    ("streets", "tried", "told"),
    [
        (3, [1e-9, 1e-6, 1e4], []),
        (3, [1e4, 1e-2], ["0.01, is the smallest of training_model.whitening_shrinkage: add smaller ones"]),
        (3, [1e-9, 1e-6], ["1e-06, is the largest of training_model.whitening_shrinkage: add larger ones"]),
        (3, [1e-3], []),
        (2, [1e-3], ["validation has only 20 buildings: with fewer than 30, chance decides"]),
    ],
)
def test_a_choice_at_the_edge_or_by_few_buildings_is_told_once(streets, tried, told, merge, caplog):
    cfg = config.load(None, [*merge[streets], f"training_model.whitening_shrinkage={tried}"])
    chosen = datasets.load_data(cfg).baselines["whitening"]
    assert chosen["shrinkage"] < 1e3
    assert list(chosen["map@r_by_shrinkage"]) == sorted(tried)
    assert chosen["map@r_by_shrinkage"][chosen["shrinkage"]] == chosen["validation"]["map@r"]
    assert [message in found for message, found in zip(told, caplog.messages, strict=True)] == [True] * len(told)
