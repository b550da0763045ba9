"""train/loss.py. Oracles: pytorch-metric-learning, and embeddings placed at known angles."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.distances import CosineSimilarity
from torch.nn import functional as F

from train import loss


def on_circle(*degrees):  # similarity = cosine of the angle between two images
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def random_batch(seed, n=24, dim=8, buildings=10):
    """Anchors, positives, negatives as one (3n, dim) tensor, and the pairs that are positive and negative."""
    torch.manual_seed(seed)
    own = torch.arange(n) % buildings
    labels = torch.cat([own, own, torch.randint(0, buildings, (n,)) + buildings])
    vectors = F.normalize(torch.randn(3 * n, dim, dtype=torch.float64), dim=1).requires_grad_()
    same = labels[:, None] == labels[None, :]
    zone = torch.rand(3 * n, 3 * n) < 0.15  # some pairs may not be contrasted
    positive = same & ~torch.eye(3 * n, dtype=torch.bool)
    return vectors, positive, ~same & ~(zone | zone.T)


def assert_same_with_gradients(ours, theirs, vectors):
    gradient, expected = (torch.autograd.grad(value, vectors, retain_graph=True)[0] for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_triplet_that_one_can_see():
    s_ap, s_an = torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.5, 0.85, 0.95])
    # violations 0, 0.05 and 0.15; the mean is over the two that are not 0
    assert loss.triplet(s_ap, s_an, margin=0.1).item() == pytest.approx(0.1)
    assert loss.triplet(s_ap[:1], s_an[:1], margin=0.1).item() == 0
    assert loss.semi_hard(s_ap, s_an, margin=0.1).tolist() == [False, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_triplet_equals_pytorch_metric_learning(seed):
    vectors, _, _ = random_batch(seed)
    anchors, positives, negatives = vectors.chunk(3)
    ours = loss.triplet((anchors * positives).sum(1), (anchors * negatives).sum(1), margin=0.3)
    rows = torch.arange(24)
    theirs = losses.TripletMarginLoss(
        margin=0.3, distance=CosineSimilarity(), reducer=reducers.AvgNonZeroReducer()
    )
    assert_same_with_gradients(ours, theirs(vectors, indices_tuple=(rows, rows + 24, rows + 48)), vectors)


def test_mining_takes_the_hardest_negative_beyond_the_positive():
    anchor, others = on_circle(0), on_circle(10, 25, 40, 90, 30)
    similarities = anchor @ others.T
    allowed = torch.tensor([[True, True, True, True, False]])  # the one at 30 degrees is in the zone
    s_ap = on_circle(20)[:, 0]
    mined = loss.mine_semi_hard(s_ap, similarities, allowed)
    assert mined.item() == pytest.approx(
        np.cos(np.radians(25))
    )  # 10 is nearer than the positive, 30 is not allowed
    all_nearer = torch.tensor([[True, True, False, False, False]])
    mined = loss.mine_semi_hard(on_circle(80)[:, 0], similarities, all_nearer)
    assert mined.item() == pytest.approx(np.cos(np.radians(25)))  # the least similar, where all are nearer


def test_info_nce_that_one_can_see():
    vectors = on_circle(0, 90, 0, 90, 180, 270)  # two pairs that agree; negatives opposite to each
    contrast = torch.tensor([[False, True, True, True], [True, False, True, True]])
    value = loss.info_nce(*vectors.chunk(3), contrast, torch.tensor(0.0))
    # of each anchor: e^1 / (e^1 + e^0 (the other positive) + e^-1 (its opposite) + e^0)
    assert value.item() == pytest.approx(-np.log(np.e / (np.e + 2 + 1 / np.e)))
    alone = loss.info_nce(*vectors.chunk(3), torch.zeros_like(contrast), torch.tensor(0.0))
    assert alone.item() == 0  # all masked: only the positive is left to pick


@pytest.mark.parametrize("seed", range(3))
def test_info_nce_equals_pytorch_metric_learning(seed):
    vectors, _, negative = random_batch(seed)
    log_temperature = torch.tensor(0.2).log()
    ours = loss.info_nce(*vectors.chunk(3), negative[:24, 24:], log_temperature)
    n, rows = 24, torch.arange(24)
    values = []
    for query, other in ((rows, rows + n), (rows + n, rows)):
        contrast = negative[:n, n:]
        i, j = torch.nonzero(contrast, as_tuple=True)
        column = torch.where(j < n, other[j % n], j + n)
        pairs = (query, other, query[i], column)
        values.append(losses.NTXentLoss(temperature=0.2)(vectors, indices_tuple=pairs))
    assert_same_with_gradients(ours, sum(values) / 2, vectors)


def test_the_temperature_is_learned_but_not_below_its_limit():
    vectors, positive, negative = random_batch(0)
    for temperature, learns in ((0.1, True), (0.001, False)):
        module = loss.Loss("infonce", 0.1, temperature, mines=False)
        module(vectors, positive, negative)[0].backward()
        assert (module.log_temperature.grad.abs() > 0) == learns


@pytest.mark.parametrize("seed", range(3))
def test_multi_similarity_equals_pytorch_metric_learning_with_its_miner(seed):
    vectors, positive, negative = random_batch(seed)
    ours = loss.multi_similarity(vectors @ vectors.T, positive, negative)
    theirs = losses.MultiSimilarityLoss(alpha=loss.ALPHA, beta=loss.BETA, base=loss.BASE)
    pairs = (*torch.nonzero(positive, as_tuple=True), *torch.nonzero(negative, as_tuple=True))
    assert_same_with_gradients(ours, theirs(vectors, indices_tuple=mined_by_library(vectors, pairs)), vectors)


def mined_by_library(vectors, pairs):
    """The library's miner builds its own pairs from labels; here it is given ours."""
    miner = miners.MultiSimilarityMiner(epsilon=loss.EPSILON)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytorch_metric_learning.utils.loss_and_miner_utils.get_all_pairs_indices", lambda *_: pairs)
        return miner.mine(vectors, None, vectors, None)


@pytest.mark.parametrize("name", ["triplet", "infonce", "multi_similarity"])
@pytest.mark.parametrize("mines", [False, True])
def test_every_loss_is_finite_and_pulls_when_nothing_may_be_contrasted_across_triplets(name, mines):
    vectors, positive, negative = random_batch(1)
    negative = negative & False
    negative[torch.arange(24), torch.arange(48, 72)] = True  # its own negative is always one
    value, semi_hard = loss.Loss(name, 0.1, 0.1, mines)(vectors, positive, negative)
    gradient = torch.autograd.grad(value, vectors)[0]
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(value)
    assert semi_hard.shape == (24,)
