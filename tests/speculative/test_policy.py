from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from blockffn_compile.speculative.policy import TRIAL_NODES, Choice, TreePolicy
from blockffn_compile.speculative.tree import DraftTree

GENTLE = {1: 1.0, 2: 1.05, 4: 1.15, 8: 1.4, 16: 1.8, 32: 2.6, 64: 4.2}
STEEP = {1: 1.0, 2: 1.3, 4: 1.7, 8: 2.4, 16: 3.5, 32: 5.5, 64: 9.0}
COSTS = pytest.mark.parametrize("cost", [GENTLE, STEEP], ids=["gentle", "steep"])


class Drafter(NamedTuple):
    """Drafts chains; it expects each draft to be right with ``claims``, they are with ``truth``."""

    claims: float
    truth: Callable[[int], float]  # of the step's number
    draft_ms: float = 0.02
    idle: float = 0.0  # share of the steps in which it has nothing to propose

    def propose(self, rng: random.Random, nodes: int) -> DraftTree:
        if rng.random() < self.idle:
            return DraftTree.root(0)
        drafts = range(1, nodes)
        return DraftTree.chain(0, drafts, [i * math.log(self.claims) for i in drafts])


class Run(NamedTuple):
    tokens: int
    ms: float
    choices: list[Choice]
    sizes: list[int]

    @property
    def rate(self) -> float:
        return self.tokens / self.ms


def simulate(cost: dict[int, float], drafters: list[Drafter], steps: int, seed: int = 0) -> Run:
    rng, policy = random.Random(seed), TreePolicy(cost, [drafter.draft_ms for drafter in drafters])
    tokens, ms, choices, sizes = 0, 0.0, [], []
    for step in range(steps):
        choice, tree, path, draft_ms = policy.choose(), DraftTree.root(0), [0], 0.0
        if choice.drafter is not None:
            drafter = drafters[choice.drafter]
            draft_ms = drafter.draft_ms
            tree = policy.trim(choice, drafter.propose(rng, choice.nodes))
            assert len(tree) <= choice.nodes
            while len(path) < len(tree) and rng.random() < drafter.truth(step):
                path.append(path[-1] + 1)
        policy.update(choice, tree, path, draft_ms)
        tokens += len(path)
        ms += min(c for size, c in cost.items() if size >= len(tree)) + draft_ms
        choices.append(choice)
        sizes.append(len(tree))
    return Run(tokens, ms, choices, sizes)


def best_fixed_rate(cost: dict[int, float], truth: float, draft_ms: float) -> float:
    """Tokens per millisecond of a chain of one size always; plain decoding included."""
    return max(
        [1 / cost[1]] + [(1 - truth**n) / (1 - truth) / (ms + draft_ms) for n, ms in cost.items()]
    )


@COSTS
@pytest.mark.parametrize("draft_ms", [0.0, 0.02, 0.3, 2.0])
@pytest.mark.parametrize("claims", [0.3, 0.99])
def test_random_tokens_cost_less_than_three_percent(cost, draft_ms, claims) -> None:
    drafter = Drafter(claims, lambda _: 0.0, draft_ms)
    for steps in (100, 1000):
        assert simulate(cost, [drafter], steps).rate > 0.97


@COSTS
@pytest.mark.parametrize("truth", [0.02, 0.1, 0.2, 0.3, 0.4])
def test_low_acceptance_is_never_three_percent_slower_than_plain(cost, truth) -> None:
    for claims in (0.3, 0.9):
        for draft_ms in (0.02, 0.3):
            for seed in range(3):
                drafter = Drafter(claims, lambda _: truth, draft_ms)
                assert simulate(cost, [drafter], 1000, seed).rate > 0.97


@COSTS
@pytest.mark.parametrize("truth", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("claims", [0.5, 0.8, 0.95])
def test_high_acceptance_gets_within_five_percent_of_the_best_size(cost, truth, claims) -> None:
    drafter = Drafter(claims, lambda _: truth)
    runs = [simulate(cost, [drafter], 1000, seed) for seed in range(4)]
    rate = sum(run.tokens for run in runs) / sum(run.ms for run in runs)
    assert rate > 0.95 * best_fixed_rate(cost, truth, drafter.draft_ms)


@COSTS
def test_adapts_when_drafts_become_good(cost) -> None:
    drafter = Drafter(0.8, lambda step: 0.9 if step >= 500 else 0.0)
    before = simulate(cost, [drafter], 500)
    both = simulate(cost, [drafter], 1500)
    after = (both.tokens - before.tokens) / (both.ms - before.ms)
    assert after > 0.9 * best_fixed_rate(cost, 0.9, drafter.draft_ms)


@COSTS
def test_adapts_when_drafts_become_bad(cost) -> None:
    drafter = Drafter(0.8, lambda step: 0.9 if step < 500 else 0.0)
    before = simulate(cost, [drafter], 500)
    both = simulate(cost, [drafter], 1500)
    after = (both.tokens - before.tokens) / (both.ms - before.ms)
    assert after > 0.95
    assert all(choice.drafter is None or choice.trial for choice in both.choices[600:])


@COSTS
@pytest.mark.parametrize("period", [5, 30, 100])
def test_alternating_text_is_not_slower_than_plain(cost, period) -> None:
    drafter = Drafter(0.8, lambda step: 0.8 if step // period % 2 else 0.0)
    assert simulate(cost, [drafter], 2000).rate > 1


def test_finds_the_better_of_two_drafters() -> None:
    worse, better = Drafter(0.8, lambda _: 0.6), Drafter(0.8, lambda _: 0.85, 0.1)
    for drafters in ([worse, better], [better, worse]):
        run = simulate(GENTLE, drafters, 2000)
        used = [choice.drafter for choice in run.choices[200:]]
        assert used.count(drafters.index(better)) > 0.9 * len(used)
        assert run.rate > 0.9 * best_fixed_rate(GENTLE, 0.85, 0.1)


def test_a_drafter_that_seldom_has_something_is_kept_if_it_pays() -> None:
    """One that proposes in a tenth of the steps, at no cost to speak of, like an n-gram."""
    run = simulate(GENTLE, [Drafter(0.9, lambda _: 0.95, 0.01, idle=0.9)], 2000)
    assert run.rate > 1.5
    assert max(run.sizes) == 64


def test_bounded_trials() -> None:
    run = simulate(STEEP, [Drafter(0.9, lambda _: 0.0, 0.3)], 5000)
    trials = [choice for choice in run.choices if choice.trial]
    assert {choice.drafter for choice in run.choices} == {None, 0}
    assert all(choice.nodes == TRIAL_NODES for choice in trials)
    # 1 % of 5000 ms buys this many times 1.7 + 0.3 - 1 ms, and one at the start.
    assert 45 <= len(trials) <= 53


def test_without_drafters_every_step_is_plain() -> None:
    assert set(simulate(GENTLE, [], 10).choices) == {Choice(None, 1, False)}


def test_one_size_leaves_nothing_to_draft() -> None:
    assert simulate({1: 1.0}, [Drafter(0.9, lambda _: 1.0)], 200).rate > 0.97


def test_costs_follow_what_steps_take_and_not_single_slow_ones() -> None:
    policy, choice = TreePolicy({1: 1.0, 2: 1.4, 4: 1.8, 8: 1.9}, [0.0]), Choice(0, 8, False)
    policy._measured = [1, 1, 1, 1]
    for i in range(200):
        policy.update(choice, bushy(), [0], 0.0, 50.0 if i % 10 == 0 else 1.9)
    assert policy._cost(6) == pytest.approx(1.9, rel=0.03)
    for _ in range(200):
        policy.update(choice, bushy(), [0], 0.0, 5.0)
    policy.update(choice, bushy(), [0], 0.0, None)  # says nothing
    assert policy._cost(6) == pytest.approx(5.0, rel=0.03)
    assert [policy._cost(nodes) for nodes in (1, 2, 4)] == [1.0, 1.4, 1.8]


def test_sizes_not_used_yet_keep_their_ratio_to_the_others() -> None:
    policy = TreePolicy({1: 1.0, 2: 1.4, 4: 1.8, 8: 1.9}, [0.0])
    for _ in range(200):
        policy.update(Choice(None, 1, False), DraftTree.root(0), [0], 0.0, 0.5)
    assert policy._cost(1) == pytest.approx(0.5, rel=0.03)
    for nodes, ratio in ((2, 1.4), (4, 1.8), (8, 1.9)):
        assert policy._cost(nodes) == pytest.approx(ratio * policy._cost(1))
    for _ in range(200):
        policy.update(Choice(0, 8, False), bushy(), [0], 0.0, 3.0)
    assert policy._cost(8) == pytest.approx(3.0, rel=0.03)
    assert policy._cost(1) == pytest.approx(0.5, rel=0.03)
    assert policy._cost(4) == pytest.approx(3.0 * 1.8 / 1.9, rel=0.03)


@pytest.mark.parametrize("start", [0.7, 1.35])
def test_a_start_in_a_bad_moment_is_soon_forgotten(start) -> None:
    policy, rng = TreePolicy({1: start, 8: 4.0}, [0.0]), random.Random(0)
    for _ in range(20):
        policy.update(Choice(None, 1, False), DraftTree.root(0), [0], 0.0, rng.gauss(1, 0.05))
    assert policy._cost(1) == pytest.approx(1.0, rel=0.05)


def test_plain_steps_tell_their_cost_too() -> None:
    policy, tree = TreePolicy({1: 1.0, 2: 1.4, 4: 1.8, 8: 1.81}, [0.0]), DraftTree.root(0)
    policy._measured = [1, 1, 1, 1]
    for _ in range(200):
        policy.update(Choice(None, 1, False), tree, [0], 0.0, 0.5)
    # The time of a step of four is worth 3.6 tokens now.
    assert len(policy.trim(Choice(0, 8, False), bushy())) == 1


def test_drafters_learn_what_the_time_is_worth() -> None:
    policy = TreePolicy({1: 4.0, 8: 4.1}, [0.0])
    choice = policy.choose()
    assert (choice.drafter, choice.trial, choice.rate) == (0, True, 0.25)
    for _ in range(30):
        policy.update(choice, DraftTree.chain(0, [1], [-0.1]), [0, 1], 0.0)
    assert policy.choose().rate == pytest.approx(2 / 4.1, rel=0.05)


def bushy() -> DraftTree:
    """Root with children of 0.5, 0.3, 0.2; the first has one of 0.6, and that one of 0.1."""
    probs = np.array([1, 0.5, 0.3, 0.2, 0.3, 0.03])
    return DraftTree(
        np.array([0, 1, 2, 3, 4, 5]), np.array([-1, 0, 0, 0, 1, 4]), np.log(probs).astype("float32")
    )


@pytest.mark.parametrize(
    ("cost", "tokens"),
    [
        ({1: 1.0, 2: 1.6, 4: 2.2}, [0]),
        ({1: 1.0, 2: 1.4, 4: 2.2}, [0, 1]),
        ({1: 1.0, 2: 1.4, 4: 1.8}, [0, 1, 2, 4]),
        ({1: 1.0, 2: 1.4, 4: 1.8, 8: 1.81}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=["none", "one", "three", "all"],
)
def test_trim_maximises_tokens_less_the_worth_of_the_time(cost, tokens) -> None:
    """Two nodes yield 0.5 more tokens than one, four 1.1, all six 1.33; a plain step 1 per ms."""
    tree = TreePolicy(cost, [0.0]).trim(Choice(0, 8, False), bushy())
    assert tree.tokens.tolist() == tokens


def test_trim_leaves_trials_and_plain_steps_alone() -> None:
    policy, tree = TreePolicy({1: 1.0, 8: 50.0}, [0.0]), bushy()
    assert len(policy.trim(Choice(0, 8, False), tree)) == 1
    assert policy.trim(Choice(0, 8, True), tree) is tree
    root = DraftTree.root(0)
    assert policy.trim(Choice(None, 1, False), root) is root


def test_trim_learns_what_a_depth_is_worth() -> None:
    """First drafts are always right, second ones never, whatever the drafter thinks."""
    policy, choice = TreePolicy({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.5}, [0.0]), Choice(0, 8, False)
    for _ in range(100):
        policy.update(choice, bushy(), [0, 1], 0.0)
    trimmed = policy.trim(choice, bushy())
    assert trimmed.depths.max() == 1
    assert len(trimmed) > 1


def test_equal_and_vanishing_probabilities_keep_the_tree_whole() -> None:
    """Certain and nearly impossible drafts, corrected upwards: parents still come first."""
    policy, choice = TreePolicy(GENTLE, [0.0]), Choice(0, 64, False)
    for _ in range(50):
        chain = DraftTree.chain(0, range(1, 64), [-0.5 * i for i in range(1, 64)])
        policy.update(choice, chain, list(range(64)), 0.0)
    for step in (0.0, -1e-7, -0.5, -900.0):
        tree = DraftTree.chain(0, range(1, 64), [step * i for i in range(1, 64)])
        trimmed = policy.trim(choice, tree)
        assert trimmed.tokens.tolist() == list(range(len(trimmed)))


@pytest.mark.parametrize(
    ("cost", "drafters", "reason"),
    [
        ({}, 1, "sizes"),
        ({2: 1.0}, 1, "sizes"),
        ({0: 1.0, 1: 1.0}, 1, "sizes"),
        ({1: 1.0, 65: 1.0}, [0.0], "sizes"),
        ({1: 0.0}, [0.0], "costs"),
        ({1: 1.0, 2: math.nan}, [0.0], "costs"),
        ({1: math.inf}, [0.0], "costs"),
        ({1: 1.0}, [-1.0], "times of drafters"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(cost, drafters, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        TreePolicy(cost, drafters)
