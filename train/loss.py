"""Losses on batches of triplets of unit vectors: anchors, positives and negatives, each (A, d) float32.

Similarities are cosines (large is close). Masks say which other rows of a batch are negatives: neither of an
anchor's own building nor in its ignore zone.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from common import config

SMALLEST_TEMPERATURE = 0.01
ALPHA, BETA, BASE, EPSILON = 2.0, 50.0, 0.5, 0.1  # of multi_similarity, as in its paper


def triplet(s_ap: torch.Tensor, s_an: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of max(0, s_an - s_ap + margin) over the triplets where it is not 0; 0 if there are none."""
    violation = F.relu(s_an - s_ap + margin)
    return violation.sum() / (violation > 0).sum().clamp(min=1)


def semi_hard(s_ap: torch.Tensor, s_an: torch.Tensor, margin: float) -> torch.Tensor:
    """Which triplets are semi-hard: the negative is less similar than the positive, by less than the margin."""
    gap = s_ap - s_an
    return (gap > 0) & (gap < margin)


def mine_semi_hard(s_ap: torch.Tensor, similarities: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The similarity (A,) of each anchor's negative among (A, R) candidates: the most similar one that is less
    similar than the positive, or the least similar one if there is none (FaceNet, Schroff et al. 2015)."""
    beyond = negative & (similarities < s_ap[:, None])
    outside = similarities.masked_fill(~beyond, -torch.inf).max(dim=1).values
    inside = similarities.masked_fill(~negative, torch.inf).min(dim=1).values
    return torch.where(beyond.any(dim=1), outside, inside)


def info_nce(vectors: torch.Tensor, may_contrast: torch.Tensor, log_temperature: torch.Tensor) -> torch.Tensor:
    """InfoNCE in both directions: each anchor picks its positive, and each positive its anchor, among the other
    pairs' and all negatives (van den Oord et al. 2018; symmetric as in Sample4Geo, Deuser et al. 2023).

    `vectors` (3A, d): anchors, positives, negatives. `may_contrast` (A, 2A) bool: which other positives, then
    which negatives, are negatives of pair i.
    """
    anchors, positives, negatives = vectors.chunk(3)
    n = len(anchors)
    scale = 1 / log_temperature.exp().clamp(min=SMALLEST_TEMPERATURE)
    own = torch.eye(n, 2 * n, dtype=torch.bool, device=anchors.device)
    target = torch.arange(n, device=anchors.device)
    loss = anchors.new_zeros(())
    s_ap, s_an, s_pn = anchors @ positives.T, anchors @ negatives.T, positives @ negatives.T  # (A, A), cosines
    for pair, others in ((s_ap, s_an), (s_ap.T, s_pn)):
        logits = scale * torch.cat([pair, others], dim=1)  # (A, 2A)
        loss = loss + F.cross_entropy(logits.masked_fill(~(may_contrast | own), -torch.inf), target)
    return loss / 2


def multi_similarity(similarities: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Multi-similarity loss with its mining of pairs (Wang et al. 2019, equations 14 to 16) over (R, R) cosines.

    `positive`, `negative` (R, R) bool: which rows are of one building, and which may be contrasted.
    """
    with torch.no_grad():
        hardest_negative = torch.where(negative, similarities, -torch.inf).amax(dim=1, keepdim=True)
        hardest_positive = torch.where(positive, similarities, torch.inf).amin(dim=1, keepdim=True)
        mined_positive = positive & (similarities < hardest_negative + EPSILON)
        mined_negative = negative & (similarities > hardest_positive - EPSILON)
    # of cosines: no exponential exceeds e^(BETA * (1 - BASE)) = e^25, which float32 holds
    pull = torch.where(mined_positive, torch.exp(ALPHA * BASE - ALPHA * similarities), 0).sum(dim=1)
    push = torch.where(mined_negative, torch.exp(BETA * similarities - BETA * BASE), 0).sum(dim=1)
    return (pull.log1p() / ALPHA + push.log1p() / BETA).mean()


class Contrast(NamedTuple):
    """What a loss may use of a batch of A triplets; R = 3A rows: anchors, positives, negatives."""

    vectors: torch.Tensor  # (R, d) unit vectors
    s_ap: torch.Tensor  # (A,) cosine of anchor and positive
    s_an: torch.Tensor  # (A,) cosine of anchor and negative, mined where training.mining says so
    positive: torch.Tensor  # (R, R) bool, or (A, R) of the anchors: which pairs of rows are of one building
    negative: torch.Tensor  # the same: which may be contrasted


class Objective(NamedTuple):
    """A loss: what it computes, and what it needs."""

    compute: Callable[[Contrast, "Loss"], torch.Tensor]
    relations: Literal["none", "anchors", "all"]  # the rows for which it needs `positive` and `negative`
    learns_temperature: bool = False
    uses_triplets: bool = False  # the negative of each triplet alone: then a better one can be mined


def _info_nce(batch: Contrast, loss: "Loss") -> torch.Tensor:
    n = len(batch.s_ap)
    return info_nce(batch.vectors, batch.negative[:n, n:], loss.log_temperature)


def _multi_similarity(batch: Contrast, loss: "Loss") -> torch.Tensor:
    return multi_similarity(batch.vectors @ batch.vectors.T, batch.positive, batch.negative)


LOSSES = {
    "triplet": Objective(lambda b, loss: triplet(b.s_ap, b.s_an, loss.margin), "none", uses_triplets=True),
    "infonce": Objective(_info_nce, "anchors", learns_temperature=True),
    "multi_similarity": Objective(_multi_similarity, "all"),
}


class Loss(nn.Module):
    """The loss that the settings name, with its own parameter (the temperature)."""

    def __init__(self, name: str, margin: float, temperature: float, mines: bool):
        super().__init__()
        self.objective: Objective = config.entry(LOSSES, "training.loss", name, "train/loss.py")
        self.margin: float = margin
        self.mines = mines
        if mines and not self.objective.uses_triplets:
            raise ValueError(f"{name} does not use the negatives that would be mined")
        self.relations = "anchors" if mines else self.objective.relations  # the rows that it needs masks for
        if self.objective.learns_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(
        self, vectors: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss, which triplets (A,) are semi-hard) of (3A, d) vectors: anchors, positives, negatives.
        `positive`, `negative` (0 or A or 3A, 3A) bool: `datasets.relations` of the rows that `relations` names."""
        anchors, positives, negatives = vectors.chunk(3)
        s_ap, s_an = (anchors * positives).sum(dim=1), (anchors * negatives).sum(dim=1)
        if self.mines:
            s_an = mine_semi_hard(s_ap, anchors @ vectors.T, negative[: len(anchors)])
        loss = self.objective.compute(Contrast(vectors, s_ap, s_an, positive, negative), self)
        return loss, semi_hard(s_ap, s_an, self.margin).detach()
