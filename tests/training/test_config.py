from __future__ import annotations

from itertools import pairwise

import pytest

from blockffn_compile.training.config import AdaptiveFactor, TrainConfig


def expected_factor(losses: list[float], start: float, constant: int, interval: int) -> float:
    """The published rule, read off the whole history of losses."""
    value, steps = start, len(losses)
    for end in range(2 * interval, steps + 1, interval):
        if end <= constant:
            continue
        before = sum(losses[end - 2 * interval : end - interval])
        gamma = sum(losses[end - interval : end]) / before
        value *= max(1.025, gamma) if gamma > 1 else gamma
    return value


def test_factor_follows_the_rule_step_by_step() -> None:
    losses = [1 + 0.3 * ((i * 37) % 11) / 11 - 0.004 * i for i in range(100)]
    factor = AdaptiveFactor(0.5, constant_steps=30, interval=10)
    for step, loss in enumerate(losses, 1):
        value = factor.update(loss)
        assert value == factor.value
        assert value == pytest.approx(expected_factor(losses[:step], 0.5, 30, 10))


def test_factor_is_constant_first_and_between_intervals() -> None:
    factor = AdaptiveFactor(0.5, constant_steps=20, interval=10)
    values = [factor.update(1.0 + step) for step in range(40)]
    assert set(values[:29]) == {0.5}
    assert values[29] > 0.5
    assert len(set(values[29:39])) == 1


@pytest.mark.parametrize(
    ("second", "times"), [(2.0, 2.0), (1.01, 1.025), (1.0, 1.0), (0.9, 0.9), (0.0, 0.0)]
)
def test_growth_has_a_floor_and_decay_has_none(second, times) -> None:
    factor = AdaptiveFactor(1.0, constant_steps=0, interval=1)
    factor.update(1.0)
    assert factor.update(second) == pytest.approx(times)


def test_a_loss_of_zero_does_not_divide() -> None:
    factor = AdaptiveFactor(1.0, constant_steps=0, interval=1)
    assert [factor.update(0.0), factor.update(0.0), factor.update(1.0)] == [1.0, 1.0, 1.0]


def test_published_defaults() -> None:
    factor = AdaptiveFactor()
    assert (factor.value, factor.constant_steps, factor.interval) == (5e-2, 1000, 100)
    assert factor.min_growth == 1.025


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert 0 < rates[-1] < 0.02
    assert TrainConfig(steps=1).rate(0) > 0


def test_scheduler_scales_with_the_run() -> None:
    factor = TrainConfig(steps=1500, lambda_cs=0.1).factor()
    assert (factor.value, factor.constant_steps, factor.interval) == (0.1, 150, 30)
    assert TrainConfig(steps=10).factor().interval == 1


def test_context_must_hold_whole_chunks() -> None:
    with pytest.raises(ValueError, match="context 100 is not a multiple of chunk 64"):
        TrainConfig(context=100)
