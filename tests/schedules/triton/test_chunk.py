"""The chunk kernels in Triton's interpreter, against fp64."""

from __future__ import annotations

import itertools
import math
from itertools import cycle

import pytest
import torch

from blockffn_compile.schedules.packing import unfold
from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import ChunkKernel
from tests.schedules.triton import interpreter
from tests.schedules.triton.problems import (
    MANY_EXPERTS,
    PROBLEMS,
    eager,
    error,
    gpu,
    inputs,
    oracle,
    run,
    weights,
)

problems = pytest.mark.parametrize("name", PROBLEMS)


def kernel(name: str, **config: int) -> ChunkKernel:
    return ChunkKernel(PROBLEMS[name], gpu(**config))


#: Every problem with few and with many tokens.
COUNTS = [(1, 64), (16, 33), (2, 63), (9, 32), (8, 17)]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [(name, n) for name, counts in zip(PROBLEMS, COUNTS, strict=True) for n in counts],
)
@pytest.mark.parametrize("density", [0.3, 1.0], ids=["some", "all"])
def test_error_is_within_eager(name, tokens, density):
    """Over enough rows that neither side is lucky: the root mean square over draws."""
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    ours, plain = [], []
    for seed in range(max(1, 4 // tokens)):
        x, scores = inputs(problem, tokens, density, seed)
        scores[0, 0] = 1.0
        want = oracle(problem, x, scores, w)
        ours.append(error(run(kernel(name), x, scores, w), want))
        plain.append(error(eager(problem, x, scores, w), want))
    assert torch.tensor(ours).norm() <= 1.5 * torch.tensor(plain).norm()


def test_many_experts():
    problem, w = MANY_EXPERTS, weights(MANY_EXPERTS)
    kernel = ChunkKernel(problem, gpu())
    for tokens, density in ((1, 0.05), (3, 0.02)):
        x, scores = inputs(problem, tokens, density)
        want = oracle(problem, x, scores, w)
        plain = error(eager(problem, x, scores, w), want)
        assert error(run(kernel, x, scores, w), want) <= 1.5 * plain


def test_every_active_set():
    """Two tokens and all 16 choices of two experts for each; off at +0 and at -0."""
    problem = Problem(32, 2, 16, "silu", False, torch.float16, "cuda")
    w = weights(problem)
    kernel = ChunkKernel(problem, gpu(tokens=8))
    x, scores = inputs(problem, 2, 1.0)
    for bits in itertools.product((False, True), repeat=4):
        on = torch.tensor(bits).view(2, 2)
        some = torch.where(on, scores, torch.where(scores < 0, -0.0, 0.0).half())
        y, want = run(kernel, x, some, w), oracle(problem, x, some, w)
        torch.testing.assert_close(y.double(), want, rtol=2e-3, atol=2e-3)


@problems
def test_no_expert_is_active(name):
    for tokens in (1, 40):
        x, scores = inputs(PROBLEMS[name], tokens, 0.0)
        y = run(kernel(name), x, scores, weights(PROBLEMS[name]))
        assert torch.equal(y, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["even", "odd gated"])
def test_rows_depend_on_neither_company_nor_configuration(name):
    """Bit-identical alone and among 63 others, in any order, however the work is cut up."""
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    x, scores = inputs(problem, 64, 0.4)
    together = run(kernel(name), x, scores, w)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(kernel(name), x[order], scores[order], w), together[order])
    for first, size in ((17, 1), (5, 3), (30, 33)):
        part = slice(first, first + size)
        assert torch.equal(run(kernel(name), x[part], scores[part], w), together[part])
    for config in ({"tokens": 8}, {"rows": 16, "depth": 64}, {"programs": 1}):
        part = slice(3, 20)
        y = run(kernel(name, **config), x[part], scores[part], w)
        assert torch.equal(y, together[part])


@pytest.mark.parametrize("name", ["even", "odd gated", "one expert"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "scores", "x of a token without experts"])
def test_non_finite_values_stay_in_their_row(name, value, where):
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    x, scores = inputs(problem, 5, 0.5)
    scores[3] = 0
    if not where.startswith("x of"):
        scores[3, :2] = 0.5
    clean = run(kernel(name), x, scores, w)
    (scores if where == "scores" else x)[3, 0] = value
    y = run(kernel(name), x, scores, w)
    assert not y[3].isfinite().all()
    if value != value:
        assert y[3].isnan().all()
    rest = torch.arange(5) != 3
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("weight", ["w_up", "w_down", "w_gate"])
@pytest.mark.parametrize("company", [False, True], ids=["skipped by all", "used by another"])
def test_inf_in_a_skipped_expert_is_ignored(weight, company):
    problem, w = PROBLEMS["even gated"], weights(PROBLEMS["even gated"])
    x, scores = inputs(problem, 9, 1.0)
    scores[:, 2] = 0
    clean = run(kernel("even gated"), x, scores, w)
    w[weight][2] = math.inf
    if company:
        scores[4, 2] = 1.0
    y = run(kernel("even gated"), x, scores, w)
    rest = torch.arange(9) != 4 if company else torch.arange(9) >= 0
    assert torch.equal(y[rest], clean[rest])
    assert y[4].isfinite().all() == (not company)


@problems
def test_reads_the_active_experts_alone(name, monkeypatch):
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    x, scores = inputs(problem, 20, 0.0)
    active = torch.arange(0, problem.num_experts, 3)
    scores[torch.arange(len(active)) % 20, active] = 1.0
    monkeypatch.setattr(interpreter, "loads", [])
    run(kernel(name), x, scores, w)
    for weight in w.values():
        if weight is not None:
            addresses = weight.data_ptr() + 2 * torch.arange(weight.numel()).view(weight.shape)
            wanted = set(addresses[active].flatten().tolist())
            assert wanted == set(interpreter.loads) & set(addresses.flatten().tolist())


@problems
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("most", [0, 2, 600])
def test_fetches_what_the_down_projection_reads(name, tokens, most, monkeypatch):
    problem, w = PROBLEMS[name], weights(PROBLEMS[name])
    x, scores = inputs(problem, tokens, 0.4)
    scores[0, -1] = 1.0
    each = 2 * problem.hidden_size * problem.expert_size
    monkeypatch.setattr(interpreter, "fetches", [])
    run(ChunkKernel(problem, gpu(cache=2 * most * each)), x, scores, w)
    # Every 32 bytes of a row, once.
    rows = w["w_down"].data_ptr() + 2 * torch.arange(w["w_down"].numel()).view(w["w_down"].shape)
    sectors = rows[:, :, ::16].flatten(1)
    active = (scores != 0).any(0)
    fetched = torch.isin(sectors, torch.tensor(interpreter.fetches, dtype=torch.int64))
    assert torch.equal(fetched.any(1), fetched.all(1))
    assert not (fetched.any(1) & ~active).any()
    assert fetched.any(1).sum() == min(most, int(active.sum()))
    assert len(interpreter.fetches) == fetched.sum()


def test_fetches_no_rows_that_are_scattered(monkeypatch):
    problem, w = PROBLEMS["even"], weights(PROBLEMS["even"])
    x, scores = inputs(problem, 2, 1.0)
    monkeypatch.setattr(interpreter, "fetches", [])
    w["w_down"] = w["w_down"].transpose(1, 2).contiguous()
    run(kernel("even"), x, scores, w, down_axes="e,s,h")
    assert interpreter.fetches == []


UP_AXES = {"e,s,h": "esh", "es,h": "esh", "h,es": "hes", "s,e,h": "seh"}
DOWN_AXES = {"e,h,s": "ehs", "h,es": "hes", "es,h": "esh"}


@pytest.mark.parametrize(
    ("up_axes", "down_axes"), list(zip(UP_AXES, cycle(DOWN_AXES), strict=False)), ids="-".join
)
def test_stored_layouts(up_axes, down_axes):
    problem, w = PROBLEMS["even gated"], weights(PROBLEMS["even gated"])
    x, scores = inputs(problem, 5, 0.5)
    want = run(kernel("even gated"), x, scores, w)

    def stored(name: str, order: str, axes: dict[str, str], dims: str) -> torch.Tensor:
        weight = w[name]
        moved = weight.permute([order.index(letter) for letter in axes[dims]])
        sizes = dict(zip(order, weight.shape, strict=True))
        shape = [math.prod(sizes[letter] for letter in dim) for dim in dims.split(",")]
        return moved.reshape(shape).contiguous()

    moved = {
        "w_up": stored("w_up", "esh", UP_AXES, up_axes),
        "w_gate": stored("w_gate", "esh", UP_AXES, up_axes),
        "w_down": stored("w_down", "ehs", DOWN_AXES, down_axes),
    }
    assert torch.equal(run(kernel("even gated"), x, scores, moved, up_axes, down_axes), want)
    # The gate may be another view than the up weight.
    sizes = {"e": 4, "s": 32, "h": 128}
    moved["w_gate"] = unfold(moved["w_gate"], up_axes, sizes, "seh").contiguous()
    moved["w_gate"] = (
        moved["w_gate"]
        .permute(["seh".index(c) for c in UP_AXES[up_axes]])
        .reshape(moved["w_up"].shape)
    )
    assert torch.equal(run(kernel("even gated"), x, scores, moved, up_axes, down_axes), want)


def test_input_views():
    problem, w = PROBLEMS["even gated"], weights(PROBLEMS["even gated"])
    x, scores = inputs(problem, 6, 0.5)
    want = run(kernel("even gated"), x, scores, w)
    x, scores = x.T.contiguous().T, scores.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(run(kernel("even gated"), x, scores, w), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, scores, w: (x, scores[:2], w),
        lambda x, scores, w: (x, scores.float(), w),
        lambda x, scores, w: (x, scores, w | {"w_up": w["w_up"].to("meta")}),
        lambda x, scores, w: (x, scores, w | {"w_down": w["w_down"][:-1]}),
        lambda x, scores, w: (x, scores, w | {"w_gate": w["w_gate"][:, :-1]}),
    ],
    ids=["tokens", "dtype", "device", "down shape", "gate shape"],
)
def test_what_does_not_fit_is_not_read(change, monkeypatch):
    problem, w = PROBLEMS["even gated"], weights(PROBLEMS["even gated"])
    x, scores, w = change(*inputs(problem, 3, 1.0), w)
    monkeypatch.setattr(interpreter, "loads", [])
    with pytest.raises(ValueError, match=r"fit together|is not laid out"):
        run(kernel("even gated"), x, scores, w)
    assert not interpreter.loads
