"""The prefill kernels in Triton's interpreter, against fp64."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn_compile.schedules import triton
from blockffn_compile.schedules.triton import PrefillKernel
from tests.schedules.triton import interpreter
from tests.schedules.triton.problems import (
    PROBLEMS,
    eager,
    error,
    gpu,
    inputs,
    oracle,
    run,
    weights,
)


def kernel(name: str, **config: int) -> PrefillKernel:
    return PrefillKernel(PROBLEMS[name], gpu(**config))


@pytest.mark.parametrize(
    ("name", "tokens"), list(zip(PROBLEMS, [65, 100, 129, 70, 200], strict=True))
)
@pytest.mark.parametrize("density", [0.3, 1.0], ids=["some", "all"])
def test_error_is_within_eager(name, tokens, density):
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    x, scores = inputs(problem, tokens, density)
    want = oracle(problem, x, scores, w)
    ours = error(run(kernel(name, tokens=64), x, scores, w), want)
    assert ours <= 1.5 * error(eager(problem, x, scores, w), want)


def test_no_expert_is_active():
    x, scores = inputs(PROBLEMS["even"], 66, 0.0)
    y = run(kernel("even"), x, scores, weights(PROBLEMS["even"]))
    assert torch.equal(y, torch.zeros_like(x))


def test_segments(monkeypatch):
    """A long text is worked on part by part, with the same rows."""
    w = weights(PROBLEMS["even"])
    x, scores = inputs(PROBLEMS["even"], 70, 0.5)
    whole = run(kernel("even"), x, scores, w)
    monkeypatch.setattr(triton, "SEGMENT", 32)
    assert torch.equal(run(kernel("even"), x, scores, w), whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "scores", "x of a token without experts"])
def test_non_finite_values_stay_in_their_row(value, where):
    w = weights(PROBLEMS["odd gated"])
    x, scores = inputs(PROBLEMS["odd gated"], 66, 0.5)
    scores[3] = 0 if where.startswith("x of") else 0.5
    clean = run(kernel("odd gated"), x, scores, w)
    (scores if where == "scores" else x)[3, 0] = value
    y = run(kernel("odd gated"), x, scores, w)
    assert not y[3].isfinite().all()
    if value != value:
        assert y[3].isnan().all()
    rest = torch.arange(66) != 3
    assert torch.equal(y[rest], clean[rest])


def test_inf_in_a_skipped_expert_is_ignored():
    w = weights(PROBLEMS["even gated"])
    x, scores = inputs(PROBLEMS["even gated"], 66, 1.0)
    scores[:, 2] = 0
    clean = run(kernel("even gated"), x, scores, w)
    for weight in w.values():
        weight[2] = math.inf
    scores[4, 2] = 1.0
    y = run(kernel("even gated"), x, scores, w)
    rest = torch.arange(66) != 4
    assert torch.equal(y[rest], clean[rest])
    assert not y[4].isfinite().any()


def test_reads_the_active_experts_alone(monkeypatch):
    w = weights(PROBLEMS["odd"])
    x, scores = inputs(PROBLEMS["odd"], 70, 0.0)
    scores[68, [1, 4]] = 1.0
    monkeypatch.setattr(interpreter, "loads", [])
    run(kernel("odd"), x, scores, w)
    for weight in (w["w_up"], w["w_down"]):
        addresses = weight.data_ptr() + 2 * torch.arange(weight.numel()).view(weight.shape)
        wanted = set(addresses[[1, 4]].flatten().tolist())
        assert wanted == set(interpreter.loads) & set(addresses.flatten().tolist())
