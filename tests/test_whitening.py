"""train/whitening.py. Oracle: every pair of a building written out, scipy's generalised eigenproblem,
sklearn.
"""

import itertools

import numpy as np
import pytest
from scipy import linalg
from sklearn.decomposition import PCA

from common.errors import PipelineError
from train import whitening


def buildings(rng, count=40, dim=6, noise=0.3):
    sizes = rng.integers(1, 6, count)
    building_of_row = np.repeat(np.arange(count), sizes)
    scale = np.linspace(0.2, 2, dim)  # noise differs by direction: what whitening is for
    rows = rng.normal(size=(count, dim))[building_of_row] + noise * scale * rng.normal(size=(sizes.sum(), dim))
    return rows.astype(np.float16), building_of_row


def unit(embeddings):
    x = np.asarray(embeddings, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs_written_out(embeddings, building_of_row):
    """Mean, covariance and within-building differences by loops over pairs; buildings weigh equally."""
    x = unit(embeddings)
    groups = [x[building_of_row == b] for b in np.unique(building_of_row)]
    mean = np.mean([group.mean(axis=0) for group in groups], axis=0)
    total = np.mean(
        [np.mean([np.outer(row - mean, row - mean) for row in group], axis=0) for group in groups], axis=0
    )
    within = np.mean(
        [
            np.mean([np.outer(a - b, a - b) for a, b in itertools.combinations(group, 2)], axis=0)
            for group in groups
            if len(group) > 1
        ],
        axis=0,
    )
    return mean, total, within


@pytest.mark.parametrize("block_rows", [7, 16_384])
def test_moments_equal_the_pairs_written_out(block_rows, monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", block_rows)
    embeddings, building_of_row = buildings(np.random.default_rng(0))
    found = whitening.moments(embeddings, building_of_row)
    for name, expected in zip(found._fields, pairs_written_out(embeddings, building_of_row), strict=True):
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-12)


def test_whitened_differences_are_white_and_the_axes_are_those_of_the_generalised_eigenproblem():
    embeddings, building_of_row = buildings(np.random.default_rng(1))
    mean, projection = whitening.whiten(whitening.moments(embeddings, building_of_row), 4, shrinkage=1e-2)
    expected_mean, total, within = pairs_written_out(embeddings, building_of_row)
    shrunk = within + 1e-2 * np.trace(within) / 6 * np.eye(6)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-12)
    np.testing.assert_allclose(projection @ shrunk @ projection.T, np.eye(4), atol=1e-9)
    vectors = linalg.eigh(total, shrunk)[1][:, ::-1][:, :4].T  # total v = lambda shrunk v, v^T shrunk v = 1
    signs = np.sign(np.sum(vectors * projection, axis=1, keepdims=True))
    np.testing.assert_allclose(projection, vectors * signs, atol=1e-8)


def test_whitening_finds_buildings_better_than_the_raw_vectors():
    embeddings, building_of_row = buildings(np.random.default_rng(2), count=300, dim=12, noise=1.0)
    mean, projection = whitening.whiten(whitening.moments(embeddings, building_of_row), 12, 1e-2)

    def nearest_is_right(x):
        similarities = unit(x) @ unit(x).T
        np.fill_diagonal(similarities, -2)
        return np.mean(building_of_row[similarities.argmax(axis=1)] == building_of_row)

    assert nearest_is_right((unit(embeddings) - mean) @ projection.T) > 1.1 * nearest_is_right(embeddings)


def test_fewer_rows_than_dimensions_and_buildings_whose_images_are_all_equal():
    rng = np.random.default_rng(3)
    few = rng.normal(size=(6, 32)).astype(np.float16)
    _, projection = whitening.whiten(whitening.moments(few, np.repeat([0, 1, 2], 2)), 8, 1e-3)
    assert projection.shape == (8, 32)
    assert np.isfinite(projection).all()
    equal = whitening.moments(np.repeat(few, 2, axis=0), np.repeat(np.arange(6), 2))
    _, projection = whitening.whiten(equal, 8, 1e-3)
    np.testing.assert_allclose(projection @ projection.T, np.eye(8), atol=1e-9)  # nothing to whiten: plain PCA


def test_no_building_with_two_images_is_an_error():
    with pytest.raises(PipelineError, match="two or more images"):
        whitening.moments(np.eye(3, dtype=np.float16), np.arange(3))


def test_pca_equals_sklearn(monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", 11)
    embeddings, _ = buildings(np.random.default_rng(4))
    mean, projection = whitening.pca(embeddings, 3)
    expected = PCA(3, svd_solver="full").fit(unit(embeddings))
    np.testing.assert_allclose(mean, expected.mean_, atol=1e-12)
    signs = np.sign(np.sum(expected.components_ * projection, axis=1, keepdims=True))
    np.testing.assert_allclose(projection, expected.components_ * signs, atol=1e-9)
