"""What verifications cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blockffn_compile.engines.engine import BUCKETS
from blockffn_compile.speculative import cost
from tests.speculative.tables import TableEngine

CPU = torch.device("cpu")


class Clock:
    """In the place of the module ``time``: only sleep takes any."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost, "time", clock)
    return clock


class Timed(TableEngine):
    """Takes 0.2 ms a node; disturbed, 20 ms."""

    def __init__(self, clock: Clock, disturbed: Callable[[int, int], bool]) -> None:
        super().__init__()
        self._clock, self._disturbed = clock, disturbed

    def verify(self, trees):
        (nodes,) = map(len, trees.values())
        disturbed = self._disturbed(len(self.sizes), nodes)
        self._clock.sleep(0.02 if disturbed else 2e-4 * nodes)
        return super().verify(trees)


@pytest.mark.parametrize("every", [2, 3, 1000])
def test_costs_are_those_of_the_engine(clock, every) -> None:
    """However often it is disturbed, up to every other time."""
    measured = cost.measure(Timed(clock, lambda call, _: call % every == 0))
    assert tuple(measured) == BUCKETS
    for nodes, ms in measured.items():
        assert ms == pytest.approx(0.2 * nodes)


def test_fewer_nodes_are_never_dearer(clock) -> None:
    measured = cost.measure(Timed(clock, lambda _, nodes: nodes == 4))
    assert measured[4] == measured[8] == pytest.approx(1.6)


def test_a_short_context_has_few_sizes() -> None:
    assert tuple(cost.measure(TableEngine(max_length=10))) == (1, 2, 4)


def test_slow_calls_are_made_less_often(clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        clock.sleep(0.3)

    ms = cost.fastest_ms(call)
    assert len(calls) == cost.LEAST_CALLS
    assert ms == pytest.approx(300)


def test_recalled_for_the_same_machine_and_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path))
    engine = TableEngine()
    first = cost.recall(engine, CPU, "one")
    assert tuple(first) == BUCKETS
    engine.sizes.clear()
    assert cost.recall(engine, CPU, "one") == first
    assert not engine.sizes
    cost.recall(engine, CPU, "two")
    assert engine.sizes
    engine.sizes.clear()
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    cost.recall(engine, CPU, "one")
    assert engine.sizes


@pytest.mark.parametrize("texts", [1, 2, 3, 64, 100])
def test_shares_of_several_texts(texts) -> None:
    whole = {1: 1.0, 2: 1.5, 8: 2.0, 64: 9.0}
    parts = cost.share(whole, texts)
    for nodes, ms in parts.items():
        fitting = [c for size, c in whole.items() if size >= nodes * texts] or [9.0]
        assert ms == fitting[0] / texts
