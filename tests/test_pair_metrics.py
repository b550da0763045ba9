"""train/pairs/pair_metrics.py. Oracles: scikit-learn's curves; for intervals, how much figures vary."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from train.pairs import pair_metrics
from train.pairs.pair_metrics import JudgedPairs


def by_scikit_learn(cosines, same, weights):
    fpr, recall, _ = roc_curve(same, cosines, sample_weight=weights, drop_intermediate=False)
    return [
        roc_auc_score(same, cosines, sample_weight=weights),
        average_precision_score(same, cosines, sample_weight=weights),
        fpr[recall >= 0.95][0],
    ]


@pytest.mark.parametrize("digits", [1, 12])  # with and without ties
def test_metrics_are_those_of_scikit_learn_with_and_without_weights(digits):
    rng = np.random.default_rng(digits)
    for pairs in (2, 5, 20, 40, 300):
        same = np.arange(pairs) < pairs / 2
        cosines = np.round(rng.normal(size=pairs) + same, digits)
        weights = rng.integers(0, 4, (3, pairs)).astype(float)
        weights[:, [0, -1]] = 1
        weights[0] = 1
        found = pair_metrics.judge(cosines, same, weights)
        for of_draw, figures in zip(weights, found, strict=True):
            assert np.allclose(figures, by_scikit_learn(cosines, same, of_draw), rtol=0, atol=1e-12)


def test_a_case_that_one_can_see():
    same = np.array([True, True, False, True, False])
    found = pair_metrics.judge(np.array([0.9, 0.8, 0.7, 0.6, 0.5]), same, np.ones((1, 5)))
    assert np.allclose(found, [[5 / 6, (1 + 1 + 3 / 4) / 3, 1 / 2]])


def test_a_draw_without_pairs_of_a_kind_has_no_figures():
    same, weights = np.array([True, False]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = pair_metrics.judge(np.array([0.9, 0.1]), same, weights)
    assert np.isnan(found).all(axis=1).tolist() == [True, True, False]
    assert found[2].tolist() == [1.0, 1.0, 0.0]


def test_the_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    same = rng.random(2000) < 0.3
    cosines = np.round(rng.normal(size=2000) + same, 2)
    curve = pair_metrics.roc_curve(cosines, same)
    fpr, recall, _ = roc_curve(same, cosines, drop_intermediate=False)
    assert len(curve["fpr"]) <= pair_metrics.CURVE_POINTS
    known = set(zip(np.round(fpr, 5), np.round(recall, 5), strict=True))
    assert set(zip(curve["fpr"], curve["recall"], strict=True)) <= known
    assert (curve["fpr"][0], curve["recall"][0], curve["fpr"][-1], curve["recall"][-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve["recall"], curve["fpr"]) == pytest.approx(roc_auc_score(same, cosines), abs=1e-3)


def pairs_of(rng, *, datasets=1, images=200, count=800, of_image=0.0, of_dataset=0.0):
    """Pairs within datasets, with cosines to which images and datasets add an effect of their own."""
    dataset = rng.integers(0, datasets, count)
    first = rng.integers(0, images, count)
    second = (first + rng.integers(1, images, count)) % images
    first, second = first + images * dataset, second + images * dataset
    same = np.arange(count) < count // 2
    effect = rng.normal(0, of_image, datasets * images)
    cosines = 2 * same + effect[first] + effect[second] + rng.normal(size=count)
    cosines += rng.normal(0, of_dataset, (datasets, 2))[dataset, same.astype(int)]
    heading = np.linspace(-180, 180, count)
    return cosines, JudgedPairs(first, second, same, heading, np.repeat(np.arange(datasets), images))


@pytest.mark.parametrize(
    "world",
    [{"of_image": 0.0}, {"images": 60, "of_image": 1.0}, {"datasets": 25, "images": 40, "of_dataset": 0.3}],
)
def test_intervals_are_about_as_wide_as_the_figures_vary(world):
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(150):
        cosines, pairs = pairs_of(rng, **world)
        drawn.append(pair_metrics.judge(cosines, pairs.same, np.ones((1, len(cosines))))[0])
    expected = 2 * 1.96 * np.std(drawn, axis=0)
    widths = []
    for seed in range(4):
        figures = pair_metrics.summary({"trained": cosines}, pairs, 100, seed)["methods"]["trained"]
        widths.append([figure["high"] - figure["low"] for figure in figures.values()])
        cosines, pairs = pairs_of(rng, **world)
    ratio = np.mean(widths, axis=0) / expected
    # with pairs drawn alone the second and third would be at about 0.6; a product of the images' weights has 1.7
    assert (ratio > 0.8).all(), ratio
    assert (ratio < 1.45).all(), ratio


def test_differences_are_paired():
    cosines, pairs = pairs_of(np.random.default_rng(1), of_image=0.5)
    shifted = cosines + np.random.default_rng(2).normal(0, 0.02, len(cosines))
    found = pair_metrics.summary({"raw": cosines, "trained": shifted}, pairs, 100, 0)
    assert list(found["differences"]) == ["trained-raw"]
    own, difference = found["methods"]["raw"]["roc_auc"], found["differences"]["trained-raw"]["roc_auc"]
    assert difference["high"] - difference["low"] < 0.2 * (own["high"] - own["low"])
    assert difference["value"] == found["methods"]["trained"]["roc_auc"]["value"] - own["value"]
    again = pair_metrics.summary({"raw": cosines, "trained": shifted}, pairs, 100, 0)
    assert again == found
    assert pair_metrics.summary({"raw": cosines, "trained": shifted}, pairs, 100, 1) != found


def test_classes_are_pairs_of_one_target_at_an_angle_against_all_others():
    cosines, pairs = pairs_of(np.random.default_rng(3))
    pairs.heading[:10] = np.nan  # not known: in no class
    found = pair_metrics.summary({"raw": cosines}, pairs, 20, 0)["by_heading"]
    angle = np.abs(pairs.heading)
    assert [entry["class"] for entry in found] == ["0-30", "30-60", "60-90", "over 90"]
    for entry, (low, high) in zip(found, [(0, 30), (30, 60), (60, 90), (90, 181)], strict=True):
        chosen = ~pairs.same | ((angle >= low) & (angle < high))
        figures = [figure["value"] for figure in entry["methods"]["raw"].values()]
        assert np.allclose(figures, by_scikit_learn(cosines[chosen], pairs.same[chosen], None))
        assert entry["same"] == pairs.same[chosen].sum()


def test_too_few_pairs_have_no_interval_and_perfect_figures_one_within_bounds():
    same = np.arange(60) < 30
    pairs = JudgedPairs(np.arange(60), np.arange(60, 120), same, np.zeros(60), np.zeros(120, int))
    figures = pair_metrics.summary({"raw": same * 1.0}, pairs, 50, 0)["methods"]["raw"]
    assert figures["roc_auc"]["value"] == figures["roc_auc"]["high"] == 1.0
    assert figures["fpr_at_95_recall"]["value"] == figures["fpr_at_95_recall"]["low"] == 0.0
    few = JudgedPairs(
        *(of[11:] for of in (pairs.first, pairs.second, same, pairs.heading)), pairs.dataset_of_image
    )
    figures = pair_metrics.summary({"raw": same[11:] * 1.0}, few, 50, 0)["methods"]["raw"]
    assert figures["roc_auc"] == {"value": 1.0, "low": None, "high": None}
