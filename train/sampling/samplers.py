"""Which arm the negatives of each group of anchors come from, by training.sampler.

Arms 0..B-1 are the bands of difficulty, arm B is `random`: any row outside the anchor's ignore zone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common import config
from train.sampling.bandit import DiscountedUcb


class ArmChoice(NamedTuple):
    """A way to choose arms."""

    choose: Callable[[DiscountedUcb, np.ndarray], np.ndarray]  # by number of group (G,), through all steps
    learns: bool = False  # whether the bandit gets the rewards


def _uniform(bandit: DiscountedUcb, groups: np.ndarray) -> np.ndarray:
    available = np.flatnonzero(bandit.available)
    return available[groups % len(available)]


SAMPLERS = {
    "ucb": ArmChoice(lambda bandit, groups: bandit.choose(len(groups)), learns=True),
    "uniform": ArmChoice(_uniform),  # the available arms in turn
    "hard_random": ArmChoice(lambda bandit, groups: groups % 2 * (len(bandit.available) - 1)),  # in turn
    "random": ArmChoice(lambda bandit, groups: np.full(len(groups), len(bandit.available) - 1)),
}


def of_name(name: str) -> ArmChoice:
    """The sampler that training.sampler names. Raises ConfigError."""
    return config.entry(SAMPLERS, "training.sampler", name, "train/sampling/samplers.py")


def arms_of_step(name: str, bandit: DiscountedUcb, step: int, groups: int) -> np.ndarray:
    """The arm (groups,) of each group of a step."""
    return of_name(name).choose(bandit, step * groups + np.arange(groups))
