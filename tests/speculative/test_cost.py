"""What verifications cost."""

from __future__ import annotations

import time

import pytest
import torch

from blockffn_compile.engines.engine import BUCKETS
from blockffn_compile.speculative import cost
from tests.speculative.tables import TableEngine

CPU = torch.device("cpu")


class Timed(TableEngine):
    """Takes 0.2 ms a node, and is once disturbed for long."""

    disturbed = 0  # at so many nodes

    def verify(self, trees):
        (nodes,) = map(len, trees.values())
        time.sleep(2e-4 * nodes if nodes != self.disturbed else 0.02)
        return super().verify(trees)


def test_costs_are_those_of_the_engine() -> None:
    measured = cost.measure(Timed())
    assert tuple(measured) == BUCKETS
    for nodes, ms in measured.items():
        assert 0.2 * nodes <= ms < 0.2 * nodes + 5


def test_fewer_nodes_are_never_dearer() -> None:
    engine = Timed()
    engine.disturbed = 4
    measured = cost.measure(engine)
    assert measured[4] == measured[8] < 20


def test_a_short_context_has_few_sizes() -> None:
    assert tuple(cost.measure(TableEngine(max_length=10))) == (1, 2, 4)


def test_slow_calls_are_made_less_often() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        time.sleep(0.3)

    ms = cost.fastest_ms(call)
    assert len(calls) == cost.LEAST_CALLS
    assert 300 <= ms < 400


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
