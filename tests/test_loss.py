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


def random_batch(seed, n=24, dim=8, buildings=10, zone=0.15):
    """(raw, labels, positive, negative): 3n rows (anchors, positives, negatives), and which pairs are what; a
    share of pairs, `zone`, is neither. Vectors are normalize(raw)."""
    torch.manual_seed(seed)
    own = torch.arange(n) % buildings
    labels = torch.cat([own, own, torch.randint(0, buildings, (n,)) + buildings])
    raw = torch.randn(3 * n, dim, dtype=torch.float64, requires_grad=True)
    same = labels[:, None] == labels[None, :]
    near = torch.rand(3 * n, 3 * n) < zone
    return raw, labels, same & ~torch.eye(3 * n, dtype=torch.bool), ~same & ~(near | near.T)


def unit(raw):
    return F.normalize(raw, dim=1)


def assert_same_with_gradients(ours, theirs, raw):
    # gradients by the raw vectors: the library normalises once more, which takes out the radial part
    gradient, expected = (torch.autograd.grad(value, raw, retain_graph=True)[0] for value in (ours, theirs))
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
    raw, *_ = random_batch(seed)
    anchors, positives, negatives = unit(raw).chunk(3)
    ours = loss.triplet((anchors * positives).sum(1), (anchors * negatives).sum(1), margin=0.3)
    rows = torch.arange(24)
    library = losses.TripletMarginLoss(0.3, distance=CosineSimilarity(), reducer=reducers.AvgNonZeroReducer())
    theirs = library(raw, indices_tuple=(rows, rows + 24, rows + 48))
    assert_same_with_gradients(ours, theirs, raw)


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


@pytest.mark.parametrize("seed", range(3))
def test_triplets_mined_in_the_batch_equal_the_loop(seed):
    raw, _, positive, negative = random_batch(seed)
    n, rows, mined = 24, torch.arange(24), []
    for i in range(n):
        s = (unit(raw)[i] @ unit(raw).T).tolist()
        allowed = negative[i].nonzero().squeeze(1).tolist()
        beyond = [j for j in allowed if s[j] < s[i + n]]
        mined.append(max(beyond, key=s.__getitem__) if beyond else min(allowed, key=s.__getitem__))
    library = losses.TripletMarginLoss(0.3, distance=CosineSimilarity(), reducer=reducers.AvgNonZeroReducer())
    theirs = library(raw, indices_tuple=(rows, rows + n, torch.tensor(mined)))
    module = loss.Loss("triplet", margin=0.3, temperature=0.1, mines=True)
    ours, _ = module(unit(raw), positive[:n], negative[:n])
    assert_same_with_gradients(ours, theirs, raw)


def test_info_nce_that_one_can_see():
    vectors = on_circle(0, 90, 0, 90, 180, 270)  # two pairs that agree; negatives opposite to each
    contrast = torch.tensor([[False, True, True, True], [True, False, True, True]])
    value = loss.info_nce(vectors, contrast, torch.tensor(0.0))
    # of each anchor: e^1 / (e^1 + e^0 (the other positive) + e^-1 (its opposite) + e^0)
    assert value.item() == pytest.approx(-np.log(np.e / (np.e + 2 + 1 / np.e)))
    alone = loss.info_nce(vectors, torch.zeros_like(contrast), torch.tensor(0.0))
    assert alone.item() == 0  # all masked: only the positive is left to pick


@pytest.mark.parametrize("seed", range(3))
def test_info_nce_equals_pytorch_metric_learning(seed):
    raw, _, positive, negative = random_batch(seed)
    n, rows = 24, torch.arange(24)
    contrast = negative[:n, n:]  # by pair: other positives, then negatives
    module = loss.Loss("infonce", margin=0.1, temperature=0.2, mines=False).double()
    ours, _ = module(unit(raw), positive[:n], negative[:n])
    pair, column = torch.nonzero(contrast, as_tuple=True)
    theirs = 0
    for query, other in ((rows, rows + n), (rows + n, rows)):
        against = torch.where(column < n, other[column % n], column + n)
        library = losses.NTXentLoss(temperature=0.2)
        theirs = theirs + library(raw, indices_tuple=(query, other, query[pair], against)) / 2
    assert_same_with_gradients(ours, theirs, raw)


def test_the_temperature_is_learned_but_not_below_its_limit():
    raw, _, positive, negative = random_batch(0)
    for temperature, learns in ((0.1, True), (0.001, False)):
        module = loss.Loss("infonce", 0.1, temperature, mines=False)
        module(unit(raw), positive, negative)[0].backward()
        assert (module.log_temperature.grad.abs() > 0) == learns


LIBRARY_MULTI_SIMILARITY = losses.MultiSimilarityLoss(alpha=loss.ALPHA, beta=loss.BETA, base=loss.BASE)


@pytest.mark.parametrize("seed", range(3))
def test_multi_similarity_equals_pytorch_metric_learning_with_its_miner(seed):
    raw, labels, positive, negative = random_batch(seed, zone=0)
    ours = loss.multi_similarity(unit(raw) @ unit(raw).T, positive, negative)
    mined = miners.MultiSimilarityMiner(epsilon=loss.EPSILON)(raw, labels)
    assert_same_with_gradients(ours, LIBRARY_MULTI_SIMILARITY(raw, labels, mined), raw)


@pytest.mark.parametrize("seed", range(3))
def test_multi_similarity_mines_only_among_pairs_that_may_be_contrasted(seed):
    raw, _, positive, negative = random_batch(seed)
    similarities = unit(raw) @ unit(raw).T
    pulled, pushed = [], []
    for i in range(72):
        p, n = positive[i].nonzero().squeeze(1).tolist(), negative[i].nonzero().squeeze(1).tolist()
        s = similarities[i].tolist()
        pulled += [(i, j) for j in p if n and s[j] - loss.EPSILON < max(s[m] for m in n)]
        pushed += [(i, j) for j in n if p and s[j] + loss.EPSILON > min(s[m] for m in p)]
    pairs = (*torch.tensor(pulled).T, *torch.tensor(pushed).T)
    ours, _ = loss.Loss("multi_similarity", 0.1, 0.1, mines=False)(unit(raw), positive, negative)
    assert_same_with_gradients(ours, LIBRARY_MULTI_SIMILARITY(raw, indices_tuple=pairs), raw)


@pytest.mark.parametrize(
    ("name", "mines"), [("triplet", False), ("triplet", True), ("infonce", False), ("multi_similarity", False)]
)
def test_every_loss_is_finite_and_pulls_when_nothing_may_be_contrasted_across_triplets(name, mines):
    raw, _, positive, negative = random_batch(1)
    negative = negative & False
    negative[torch.arange(24), torch.arange(48, 72)] = True  # its own negative is always one
    value, semi_hard = loss.Loss(name, 0.1, 0.1, mines)(unit(raw), positive, negative)
    gradient = torch.autograd.grad(value, raw)[0]
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(value)
    assert semi_hard.shape == (24,)


def test_mining_without_triplets_is_refused():
    with pytest.raises(ValueError, match="infonce does not use the negatives"):
        loss.Loss("infonce", 0.1, 0.1, mines=True)
