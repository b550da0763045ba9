"""train/linear/whitening.py. Oracle: every pair of a building written out, scipy's generalised eigenproblem,
sklearn; for what is stored, the moments themselves.
"""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import simulated_cuda
import torch
from conftest import ROOT, paths_below
from scipy import linalg
from sklearn.decomposition import PCA

from common import config
from common.errors import PipelineError
from train.linear import whitening

CPU = torch.device("cpu")


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
    """`Moments` by loops over rows and pairs."""
    x = unit(embeddings)
    row_mean = np.mean(x, axis=0)
    row_covariance = np.mean([np.outer(row - row_mean, row - row_mean) for row in x], axis=0)
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
    return whitening.Moments(row_mean, row_covariance, mean, total, within)


def assert_same(found, expected, atol=1e-12):
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=atol, err_msg=name)


@pytest.mark.parametrize("block_rows", [7, 16_384])
def test_moments_equal_the_pairs_written_out(block_rows, monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", block_rows)
    embeddings, building_of_row = buildings(np.random.default_rng(0))
    assert_same(
        whitening.moments(embeddings, building_of_row, CPU), pairs_written_out(embeddings, building_of_row)
    )


def test_moments_on_a_device_are_those_of_the_cpu_within_its_memory():
    """Be the rows on the device or on the host. All at once, as float64, they would take three times as much."""
    embeddings, building_of_row = buildings(np.random.default_rng(5), count=20_000, dim=32)
    expected = whitening.moments(embeddings, building_of_row, CPU)
    rows = torch.from_numpy(embeddings)
    with simulated_cuda.installed() as cuda:
        for home in (rows, rows.to("cuda")):
            cuda.peak = before = cuda.allocated
            assert_same(whitening.moments(home, building_of_row, torch.device("cuda")), expected)
            assert cuda.peak - before < 8 * 32 * 32 * 8 + whitening.BLOCK_ROWS * 32 * 24 + 2**18
        assert not cuda.races


def test_whitened_differences_are_white_and_the_axes_are_those_of_the_generalised_eigenproblem():
    embeddings, building_of_row = buildings(np.random.default_rng(1))
    mean, projection = whitening.whiten(whitening.moments(embeddings, building_of_row, CPU), 4, 1e-2)
    *_, expected_mean, total, within = pairs_written_out(embeddings, building_of_row)
    shrunk = within + 1e-2 * np.trace(within) / 6 * np.eye(6)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-12)
    np.testing.assert_allclose(projection @ shrunk @ projection.T, np.eye(4), atol=1e-9)
    vectors = linalg.eigh(total, shrunk)[1][:, ::-1][:, :4].T  # total v = lambda shrunk v, v^T shrunk v = 1
    signs = np.sign(np.sum(vectors * projection, axis=1, keepdims=True))
    np.testing.assert_allclose(projection, vectors * signs, atol=1e-8)


def test_whitening_finds_buildings_better_than_the_raw_vectors():
    embeddings, building_of_row = buildings(np.random.default_rng(2), count=300, dim=12, noise=1.0)
    mean, projection = whitening.whiten(whitening.moments(embeddings, building_of_row, CPU), 12, 1e-2)

    def nearest_is_right(x):
        similarities = unit(x) @ unit(x).T
        np.fill_diagonal(similarities, -2)
        return np.mean(building_of_row[similarities.argmax(axis=1)] == building_of_row)

    assert nearest_is_right((unit(embeddings) - mean) @ projection.T) > 1.1 * nearest_is_right(embeddings)


def test_fewer_rows_than_dimensions_and_buildings_whose_images_are_all_equal():
    rng = np.random.default_rng(3)
    few = rng.normal(size=(6, 32)).astype(np.float16)
    _, projection = whitening.whiten(whitening.moments(few, np.repeat([0, 1, 2], 2), CPU), 8, 1e-3)
    assert projection.shape == (8, 32)
    assert np.isfinite(projection).all()
    equal = whitening.moments(np.repeat(few, 2, axis=0), np.repeat(np.arange(6), 2), CPU)
    _, projection = whitening.whiten(equal, 8, 1e-3)
    np.testing.assert_allclose(projection @ projection.T, np.eye(8), atol=1e-9)  # nothing to whiten: plain PCA


def test_no_building_with_two_images_is_an_error():
    with pytest.raises(PipelineError, match="two or more images"):
        whitening.moments(np.eye(3, dtype=np.float16), np.arange(3), CPU)


def test_pca_equals_sklearn(monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK_ROWS", 11)
    embeddings, building_of_row = buildings(np.random.default_rng(4))
    mean, projection = whitening.pca(whitening.moments(embeddings, building_of_row, CPU), 3)
    expected = PCA(3, svd_solver="full").fit(unit(embeddings))
    np.testing.assert_allclose(mean, expected.mean_, atol=1e-12)
    signs = np.sign(np.sum(expected.components_ * projection, axis=1, keepdims=True))
    np.testing.assert_allclose(projection, expected.components_ * signs, atol=1e-9)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """`stored(settings, id, seed)`: the moments of a merge with this id, and whether they were computed."""
    calls = []
    compute = whitening.moments
    monkeypatch.setattr(whitening, "moments", lambda *arguments: calls.append(1) or compute(*arguments))

    def of(train_id="merge-1", seed=0, **settings):
        cfg = config.load(None, [f"paths.root={tmp_path}", *(f"{k}={v}" for k, v in settings.items())])
        embeddings, building_of_row = buildings(np.random.default_rng(seed))
        calls.clear()
        found = whitening.stored_moments(cfg, train_id, torch.from_numpy(embeddings), building_of_row, CPU)
        assert_same(found, compute(embeddings, building_of_row, CPU), atol=0)
        return bool(calls)

    return of


def test_moments_are_computed_once_for_a_merge_and_a_sample(stored, tmp_path):
    sample = {"training.sample_buildings": 20}
    assert [stored(), stored()] == [True, False]
    assert [stored(seed=1, **sample), stored(seed=1, **sample)] == [True, False]
    assert not stored(**{"global.seed": 7})  # draws no sample
    assert stored(seed=2, **sample, **{"global.seed": 7})  # draws another one
    assert stored("merge-2", seed=3)
    assert stored()  # the former merge again
    written = {path.name for path in paths_below(tmp_path).merged_dir.with_name("merged_moments").iterdir()}
    assert written == {"all.safetensors", "20.safetensors"}


@pytest.mark.parametrize("content", [b"", b"not ours", None])
def test_a_damaged_file_is_replaced(content, stored, tmp_path):
    stored()
    path = paths_below(tmp_path).merged_dir.with_name("merged_moments") / "all.safetensors"
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    assert [stored(), stored()] == [True, False]


def test_where_nothing_can_be_written_they_are_computed_again(stored, full_disk, tmp_path, caplog):
    with full_disk(500):
        assert stored()
    assert "all.safetensors cannot be written (File too large)" in caplog.text
    assert not list(paths_below(tmp_path).merged_dir.with_name("merged_moments").iterdir())
    assert stored()


KILLED = """
import os, signal, sys, numpy, torch
from common import config, files
from train.linear import whitening
cfg = config.load(None, [f"paths.root={sys.argv[1]}"])
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
x = torch.from_numpy(numpy.random.default_rng(9).normal(size=(4, 3)).astype("float16"))
whitening.stored_moments(cfg, "merge-1", x, numpy.array([0, 0, 1, 1]), torch.device("cpu"))
"""


def test_a_killed_process_leaves_nothing_that_is_read(stored, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    folder = paths_below(tmp_path).merged_dir.with_name("merged_moments")
    assert len(os.listdir(folder)) == 1
    assert [stored(), stored()] == [True, False]
    assert os.listdir(folder) == ["all.safetensors"]
