"""The traffic model against what the kernels load and store in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from blockffn_compile.schedules.triton import ChunkKernel, PrefillKernel, traffic
from blockffn_compile.schedules.triton.config import Gpu
from tests.schedules.triton import interpreter
from tests.schedules.triton.problems import PROBLEMS, inputs, run, table, weights


@pytest.mark.parametrize("name", ["even", "even gated", "odd"])
@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_the_model_counts_what_is_loaded_and_stored(name, tokens, monkeypatch):
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    configs = table(tokens=8)
    monkeypatch.setattr(traffic, "load_table", lambda *args: configs)
    x, scores = inputs(problem, tokens, 0.4)
    scores[0, 0] = 1
    model = traffic.layer_traffic(problem, scores, (9, 0))
    monkeypatch.setattr(interpreter, "loads", [])
    monkeypatch.setattr(interpreter, "stores", [])
    kind = PrefillKernel if tokens > 64 else ChunkKernel
    run(kind(problem, Gpu(configs, 1)), x, scores, w)

    def addresses(tensor: torch.Tensor) -> range:
        return range(tensor.data_ptr(), tensor.data_ptr() + 2 * tensor.numel(), 2)

    # Scores are what the plan looks at, and are not in the model.
    plan = set(addresses(scores))
    counted = len(interpreter.stores) + sum(a not in plan for a in interpreter.loads)
    assert 2 * counted == sum(launch.requested for launch in model.values())
    matrices = {a for t in w.values() if t is not None for a in addresses(t)}
    fewest = sum(launch.fewest for launch in model.values())
    assert 2 * len(matrices.intersection(interpreter.loads)) == fewest
    assert all(t.fewest < t.memory for t in model.values())
