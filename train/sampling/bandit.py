"""Which arm the negatives of a group come from: discounted upper confidence bounds.

Discounted UCB (Garivier & Moulines 2008, "On upper-confidence bound policies for non-stationary bandit
problems", section 3): the mean of an arm's rewards and the number of its draws are both discounted, here by the
step. We differ in two ways: a step draws several groups, each counted at once though its reward comes with the
step's end; and a draw may be credited to another arm than the one chosen (see `datasets.negatives_of`), so that
rewards and draws are counted apart.
"""

import math

import numpy as np


class DiscountedUcb:
    """Arms 0..K-1, of which some may be unavailable. Rewards lie in [0, 1]."""

    def __init__(self, available: np.ndarray, exploration: float, discount: float):
        self.available = np.asarray(available, bool)
        self.exploration, self.discount = exploration, discount
        self.draws = np.zeros(len(self.available))  # discounted number of groups that chose the arm
        self.credit = np.zeros(len(self.available))  # discounted number of groups credited to it
        self.reward = np.zeros(len(self.available))  # discounted sum of their rewards

    def choose(self, groups: int) -> np.ndarray:
        """The arm (groups,) of each group of a step, in turn, the past discounted first: the arm of the largest
        mean + c * sqrt(ln N / n), of its n draws and the N of all arms, which each choice raises; one that was
        never drawn goes first. Ties: the lower arm.
        """
        for sums in (self.draws, self.credit, self.reward):
            sums *= self.discount
        available = np.flatnonzero(self.available)
        mean = (self.reward / np.maximum(self.credit, 1e-12))[available]
        draws, total = self.draws[available], self.draws.sum()
        chosen = np.empty(groups, np.int64)
        for group in range(groups):
            explored = math.log(max(total + group, 1.0)) / np.maximum(draws, 1e-12)
            bounds = np.where(draws > 0, mean + self.exploration * np.sqrt(explored), np.inf)
            chosen[group] = place = bounds.argmax()
            draws[place] += 1
        self.draws[available] = draws
        return available[chosen]

    def update(self, credit: np.ndarray, reward: np.ndarray) -> None:
        """Add what a step brought: by arm, the groups credited to it (a fraction of a group counts as such) and
        the sum of their rewards, each between 0 and `credit`."""
        self.credit += credit
        self.reward += reward

    def state_dict(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("draws", "credit", "reward")}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name, values in state.items():
            setattr(self, name, np.array(values))
