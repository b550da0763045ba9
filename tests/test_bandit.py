"""train/sampling/bandit.py. Oracles: discounted UCB written as sums over the whole past, and as in its paper."""

import numpy as np
import pytest

from train.sampling.bandit import DiscountedUcb
from train.sampling.samplers import arms_of_step


def slow_choice(past, available, exploration, discount, pending):
    """The arm of the next draw. `past`: (step, arm, reward) of each; `pending`: arms drawn in the step in hand."""
    now, arms = past[-1][0] + 1 if past else 0, len(available)
    draws, rewards = np.zeros(arms), np.zeros(arms)
    for step, arm, reward in past:
        draws[arm] += discount ** (now - step)
        rewards[arm] += discount ** (now - step) * reward
    means = np.array([rewards[a] / draws[a] if draws[a] else 0.0 for a in range(arms)])
    for arm in pending:
        draws[arm] += 1
    with np.errstate(divide="ignore"):
        bonus = np.where(
            draws > 0, exploration * np.sqrt(np.log(max(draws.sum(), 1)) / np.maximum(draws, 1e-12)), np.inf
        )
    return int(np.argmax(np.where(available, means + bonus, -np.inf)))


def play(bandit, means, steps, groups, rng):
    """Choices (steps, groups) against Bernoulli arms whose means may change: `means` (steps, K)."""
    chosen = np.zeros((steps, groups), int)
    for step in range(steps):
        chosen[step] = bandit.choose(groups)
        rewards = (rng.random(groups) < means[step, chosen[step]]).astype(float)
        arms = bandit.available.size
        bandit.update(
            np.bincount(chosen[step], minlength=arms), np.bincount(chosen[step], rewards, minlength=arms)
        )
    return chosen


def test_every_arm_is_tried_once_before_any_twice():
    assert DiscountedUcb(np.ones(4), 0.3, 0.99).choose(6).tolist()[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_choices_equal_the_sums_over_the_whole_past(discount):
    rng = np.random.default_rng(0)
    means, past = np.array([0.2, 0.9, 0.5, 0.4]), []
    bandit = DiscountedUcb(np.ones(4), 0.4, discount)
    for step in range(60):
        bandit.available[1] = step < 30  # its bands are all empty after a search in the projected space
        expected = []
        for _ in range(3):
            expected.append(slow_choice(past, bandit.available, 0.4, discount, expected))
        chosen = bandit.choose(3)
        assert chosen.tolist() == expected
        rewards = (rng.random(3) < means[chosen]).astype(float)
        past += [(step, arm, reward) for arm, reward in zip(chosen, rewards, strict=True)]
        bandit.update(np.bincount(chosen, minlength=4), np.bincount(chosen, rewards, minlength=4))
    assert {arm for step, arm, _ in past if step < 30} == {0, 1, 2, 3}
    assert {arm for step, arm, _ in past if step >= 30} == {0, 2, 3}


def paper_regret(rewards, best, gamma, xi, bound):
    """Garivier & Moulines 2008, section 3: the arms of rounds 1..T, and the regret after each.

    `rewards` (T, K): what each arm would bring; `best` (T, K): the arms' means. X_s(i) and I_s are theirs.
    """
    rounds, arms = rewards.shape
    played, regret = [], []
    for t in range(1, rounds + 1):
        if t <= arms:
            choice = t - 1
        else:
            indices = []
            n_i = [sum(gamma ** (t - s) for s in range(1, t) if played[s - 1] == i) for i in range(arms)]
            n = sum(n_i)
            for i in range(arms):
                gained = (gamma ** (t - s) * rewards[s - 1, i] for s in range(1, t) if played[s - 1] == i)
                mean = sum(gained) / n_i[i]  # X bar of t, gamma
                padding = 2 * bound * np.sqrt(xi * np.log(max(n, 1)) / n_i[i])  # c of t, gamma
                indices.append(mean + padding)
            choice = int(np.argmax(indices))
        played.append(choice)
        regret.append(best[t - 1].max() - best[t - 1, choice])
    return np.array(played), np.cumsum(regret)


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_its_regret_is_that_of_the_paper_where_rewards_are_planted(gamma):
    rounds, xi, bound = 400, 0.01, 1.0
    means = np.full((rounds, 3), [0.2, 0.4, 0.8])
    means[rounds // 2 :] = [0.9, 0.4, 0.3]  # the best arm changes
    rewards = (np.random.default_rng(5).random((rounds, 3)) < means).astype(float)
    played, regret = paper_regret(rewards, means, gamma, xi, bound)
    bandit, ours = DiscountedUcb(np.ones(3), 2 * bound * np.sqrt(xi), gamma), []
    for t in range(rounds):
        arm = bandit.choose(1)
        ours.append(arm[0])
        bandit.update(np.bincount(arm, minlength=3), np.bincount(arm, rewards[t, arm], minlength=3))
    assert ours == played.tolist()
    lost = np.cumsum(means.max(axis=1) - means[np.arange(rounds), ours])
    np.testing.assert_allclose(lost, regret)
    at_random = np.cumsum(means.max(axis=1) - means.mean(axis=1))
    assert lost[rounds // 2 - 1] < 0.5 * at_random[rounds // 2 - 1]  # before the change it has found the best arm
    if gamma < 1:  # and with the discount it finds the new one
        assert lost[-1] < 0.5 * at_random[-1]


def test_a_batch_spreads_over_arms_that_are_alike_and_gathers_on_one_that_is_better():
    bandit = DiscountedUcb(np.ones(4), 0.3, 0.99)
    for _ in range(20):
        chosen = bandit.choose(8)
        # counting a draw only when its reward is known would give all groups of a step one arm
        assert np.bincount(chosen, minlength=4).tolist() == [2, 2, 2, 2]
        bandit.update(np.full(4, 2), np.full(4, 1))
    means = np.tile([0.3, 0.3, 0.9, 0.3], (100, 1))
    chosen = play(DiscountedUcb(np.ones(4), 0.3, 0.99), means, 100, 8, np.random.default_rng(1))
    assert np.mean(chosen[-50:] == 2) > 0.8


def test_it_follows_when_the_best_arm_changes():
    means = np.full((600, 3), 0.2)
    means[:300, 0] = means[300:, 2] = 0.9
    chosen = play(DiscountedUcb(np.ones(3), 0.3, 0.95), means, 600, 4, np.random.default_rng(2))
    late = np.bincount(chosen[350:].ravel(), minlength=3) / chosen[350:].size
    assert late[2] > 0.6
    stubborn = play(DiscountedUcb(np.ones(3), 0.3, 1.0), means, 600, 4, np.random.default_rng(2))
    assert np.mean(stubborn[300:360] == 2) < np.mean(chosen[300:360] == 2)  # without the discount it takes longer


def test_an_unavailable_arm_is_never_chosen_and_one_that_is_credited_nothing_is_given_up():
    bandit = DiscountedUcb(np.array([True, False, True, True]), 0.3, 0.99)
    counts = np.zeros(4)
    for _ in range(300):
        chosen = bandit.choose(8)
        counts += np.bincount(chosen, minlength=4)
        credited = np.where(chosen == 2, 3, chosen)  # what is drawn for arm 2 always comes from arm 3
        bandit.update(
            np.bincount(credited, minlength=4), np.bincount(credited, 0.5 * (credited == 0), minlength=4)
        )
    assert counts[1] == 0
    assert counts[0] > 5 * counts[2] > 0  # if only credits were counted, arm 2 would stay unexplored for ever


def test_the_state_survives_a_checkpoint():
    means, rng = np.full((30, 3), 0.3), np.random.default_rng(3)
    bandit, copy = (DiscountedUcb(np.ones(3), 0.3, 0.9) for _ in range(2))
    play(bandit, means, 30, 4, rng)
    copy.load_state_dict(bandit.state_dict())
    for _ in range(5):
        assert copy.choose(4).tolist() == bandit.choose(4).tolist()


def test_samplers_without_a_bandit_take_turns():
    bandit = DiscountedUcb(np.array([True, False, True, True]), 0.3, 0.99)
    assert arms_of_step("uniform", bandit, 0, 4).tolist() == [0, 2, 3, 0]
    assert arms_of_step("uniform", bandit, 1, 4).tolist() == [2, 3, 0, 2]
    assert arms_of_step("hard_random", bandit, 0, 3).tolist() == [0, 3, 0]
    assert arms_of_step("hard_random", bandit, 1, 3).tolist() == [3, 0, 3]
    assert arms_of_step("random", bandit, 1, 3).tolist() == [3, 3, 3]
