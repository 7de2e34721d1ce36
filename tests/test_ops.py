"""The operator against the fp64 reference, over shapes, dtypes, active sets and special values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blockffn_compile.ops  # noqa: F401  registers the operator
from blockffn_compile.layer import experts_reference

OP = torch.ops.blockffn.chunk_sparse_ffn

#: (H, E, S): panels that fit, that need padding, one expert, odd everything.
SHAPES = {"even": (128, 8, 64), "odd": (52, 5, 24), "one expert": (48, 1, 32)}
#: Kernels take seconds to build the first time: every value of every axis, not every product.
PROBLEMS = [
    ("even", torch.float32, "silu", False),
    ("even", torch.bfloat16, "silu", False),
    ("even", torch.float16, "silu", True),
    ("odd", torch.float32, "gelu", True),
    ("odd", torch.bfloat16, "relu", False),
    ("odd", torch.float16, "gelu", False),
    ("one expert", torch.float32, "relu", True),
]


def problem_id(problem):
    shape, dtype, act, gated = problem
    return f"{shape}-{str(dtype).removeprefix('torch.')}-{act}{'-gated' if gated else ''}"


problems = pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)


def weights(problem, seed: int = 0) -> dict[str, Any]:
    shape, dtype, _, gated = problem
    h, e, s = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=g) * size[-1] ** -0.5).to(dtype)

    return {
        "w_up": normal(e, s, h),
        "w_down": normal(e, h, s),
        "w_gate": normal(e, s, h) if gated else None,
    }


def inputs(problem, tokens: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    shape, dtype, _, _ = problem
    h, e, _ = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, e, generator=g) < density
    scores = torch.randn(tokens, e, generator=g) * active
    return torch.randn(tokens, h, generator=g).to(dtype), scores.to(dtype)


def oracle(problem, x: Tensor, scores: Tensor, w) -> Tensor:
    gate = w["w_gate"]
    return experts_reference(
        x.double(),
        scores.double(),
        w["w_up"].double(),
        w["w_down"].double(),
        problem[2],
        None if gate is None else gate.double(),
    )


def run(problem, x: Tensor, scores: Tensor, w) -> Tensor:
    return OP(x, scores, w["w_up"], w["w_down"], problem[2], w["w_gate"])


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@problems
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 13, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("density", [0.2, 1.0], ids=["some", "all"])
def test_error_is_within_eager(problem, tokens, density):
    """Over enough rows that neither side is lucky: the root mean square over draws."""
    w = weights(problem)
    ours, eager = [], []
    for seed in range(max(1, 32 // tokens)):
        x, scores = inputs(problem, tokens, density, seed)
        scores[0, 0] = 1.0  # at least one pair, or there is nothing to be wrong about
        want = oracle(problem, x, scores, w)
        y = run(problem, x, scores, w)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        ours.append(error(y, want))
        dense = experts_reference(x, scores, w["w_up"], w["w_down"], problem[2], w["w_gate"])
        eager.append(error(dense, want))
    assert torch.tensor(ours).norm() <= 1.5 * torch.tensor(eager).norm()


@problems
@pytest.mark.parametrize("tokens", [1, 7, 64, 65])
def test_no_expert_is_active(problem, tokens):
    x, scores = inputs(problem, tokens, 0.0)
    assert torch.equal(run(problem, x, scores, weights(problem)), torch.zeros_like(x))


@problems
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_active_sets(problem, data):
    _, e, _ = SHAPES[problem[0]]
    tokens = data.draw(st.integers(1, 70), label="tokens")
    row = st.integers(0, 2**e - 1)
    masks = data.draw(st.lists(row, min_size=tokens, max_size=tokens), label="masks")
    w = weights(problem)
    x, scores = inputs(problem, tokens, 1.0, seed=data.draw(st.integers(0, 99), label="seed"))
    on = torch.tensor([[mask >> i & 1 for i in range(e)] for mask in masks], dtype=torch.bool)
    # An expert is off at +0 and at -0.
    scores = torch.where(on, scores, torch.where(scores < 0, -0.0, 0.0).to(scores.dtype))
    want = oracle(problem, x, scores, w)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[x.dtype]
    torch.testing.assert_close(
        run(problem, x, scores, w).double(),
        want,
        rtol=tolerance,
        atol=tolerance * max(1e-3, want.abs().max().item()),
    )


@problems
def test_rows_do_not_depend_on_company(problem):
    """A token's row is bit-identical alone and among 63 others, in any order."""
    w = weights(problem)
    x, scores = inputs(problem, 64, 0.4)
    together = run(problem, x, scores, w)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(problem, x[order], scores[order], w), together[order])
    for size in (1, 2, 3, 5, 6, 7, 31):
        for first in range(0, 64 - size, 9):
            part = slice(first, first + size)
            assert torch.equal(run(problem, x[part], scores[part], w), together[part])


@problems
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "scores", "x of a token without experts"])
def test_non_finite_values_stay_in_their_row(problem, value, where):
    w = weights(problem)
    x, scores = inputs(problem, 7, 0.5)
    scores[3] = 0 if where.startswith("x of") else scores[3].abs() + 0.5
    clean = run(problem, x, scores, w)
    (scores if where == "scores" else x)[3, 0] = value
    y = run(problem, x, scores, w)
    assert not y[3].isfinite().all()
    if value != value or where != "scores":
        assert y[3].isnan().any() or problem[2] == "relu"
    if value != value:
        assert y[3].isnan().all()
    rest = torch.arange(7) != 3
    assert torch.equal(y[rest], clean[rest])


def test_inf_in_a_skipped_expert_is_ignored():
    problem = PROBLEMS[0]
    w = weights(problem)
    x, scores = inputs(problem, 3, 1.0)
    scores[:, 2] = 0
    clean = run(problem, x, scores, w)
    w["w_up"][2] = float("inf")
    assert torch.equal(run(problem, x, scores, w), clean)


@problems
def test_extreme_magnitudes(problem):
    """Subnormal and very large inputs follow the fp64 reference, rounded."""
    w = weights(problem)
    x, scores = inputs(problem, 4, 1.0)
    big = 30 if x.dtype is torch.float16 else 1e18
    x = (x.double() * torch.tensor([[1e-40], [1e-7], [1.0], [big]])).to(x.dtype)
    want = oracle(problem, x, scores, w)
    y = run(problem, x, scores, w).double()
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    for got, wanted in zip(y, want, strict=True):
        scale = wanted.abs().max().item()
        assert (got - wanted).abs().max().item() <= 16 * eps * scale + tiny


def test_no_tokens():
    w = weights(PROBLEMS[0])
    x, scores = inputs(PROBLEMS[0], 0, 1.0)
    assert run(PROBLEMS[0], x, scores, w).shape == x.shape


@pytest.mark.parametrize("view", ["transposed", "sliced", "misaligned", "reversed rows"])
def test_input_views(view):
    problem = PROBLEMS[0]
    w = weights(problem)
    x, scores = inputs(problem, 8, 0.5)
    want = run(problem, x, scores, w)
    if view == "transposed":
        x, scores = x.T.contiguous().T, scores.T.contiguous().T
    elif view == "sliced":
        x, scores = x.repeat_interleave(2, 0)[::2], scores.repeat_interleave(2, 1)[:, ::2]
    elif view == "misaligned":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    else:
        x, scores, want = x.flip(0), scores.flip(0), want.flip(0)
    assert torch.equal(run(problem, x, scores, w), want)


UP_AXES = {"e,s,h": "esh", "es,h": "esh", "h,es": "hes", "h,e,s": "hes", "s,e,h": "seh"}
DOWN_AXES = {"e,h,s": "ehs", "h,es": "hes", "es,h": "esh", "e,s,h": "esh"}


@pytest.mark.parametrize(
    ("up_axes", "down_axes"), list(itertools.product(UP_AXES, DOWN_AXES)), ids="-".join
)
def test_stored_layouts(up_axes, down_axes):
    problem = PROBLEMS[0]
    w = weights(problem)
    x, scores = inputs(problem, 5, 0.5)
    want = run(problem, x, scores, w)

    def stored(weight: Tensor, order: str, axes: dict[str, str], name: str) -> Tensor:
        moved = weight.permute([order.index(letter) for letter in axes[name]])
        sizes = dict(zip(order, weight.shape, strict=True))
        shape = [torch.Size([sizes[letter] for letter in dim]).numel() for dim in name.split(",")]
        return moved.reshape(shape).contiguous()

    y = OP(
        x,
        scores,
        stored(w["w_up"], "esh", UP_AXES, up_axes),
        stored(w["w_down"], "ehs", DOWN_AXES, down_axes),
        "silu",
        None,
        up_axes,
        down_axes,
    )
    assert torch.equal(y, want)


def test_weight_updates_are_seen():
    problem = PROBLEMS[0]
    w = weights(problem)
    x, scores = inputs(problem, 3, 1.0)
    before = run(problem, x, scores, w)
    w["w_down"].mul_(2)
    assert torch.equal(run(problem, x, scores, w), before * 2)
    w["w_up"].data = torch.zeros_like(w["w_up"])
    assert torch.equal(run(problem, x, scores, w), torch.zeros_like(before))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=problem_id)
def test_opcheck(problem, requires_grad):
    w = weights(problem)
    x, scores = inputs(problem, 5, 0.5)
    args = [t.requires_grad_(requires_grad) for t in (x, scores, w["w_up"], w["w_down"])]
    torch.library.opcheck(OP.default, (*args, "silu"))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_are_those_of_the_dense_form(gated):
    problem = ("even", torch.float32, "silu", gated)
    w = weights(("even", torch.float64, "silu", gated))
    x, scores = inputs(("even", torch.float64, "silu", gated), 5, 0.5)
    leaves = [t.requires_grad_() for t in (x, scores, *w.values()) if t is not None]
    want = torch.autograd.grad(oracle(problem, x, scores, w).square().sum(), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    xs, ss, up, down, *gate = single
    y = OP(xs, ss, up, down, "silu", gate[0] if gate else None)
    got = torch.autograd.grad(y.square().sum(), single)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(scores=a["scores"][:2]), "x has 3 tokens, scores has 2"),
        (lambda a: a.update(scores=a["scores"].double()), "one dtype and device"),
        (lambda a: a.update(w_up=a["w_up"].bfloat16()), "one dtype and device"),
        (lambda a: a.update(x=a["x"][0]), r"must be \[T, H\]"),
        (lambda a: a.update(act="tanh"), "unknown activation 'tanh'"),
        (lambda a: a.update(up_axes="e,h,s"), "is not laid out as 'e,h,s'"),
        (lambda a: a.update(w_down=a["w_down"][:-1]), "is not laid out as 'e,h,s'"),
    ],
    ids=["tokens", "score dtype", "weight dtype", "rank", "activation", "axes", "down shape"],
)
def test_wrong_arguments(change, message):
    w = weights(PROBLEMS[0])
    x, scores = inputs(PROBLEMS[0], 3, 1.0)
    arguments = {"x": x, "scores": scores, **w, "act": "silu"}
    change(arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        OP(**arguments)
