"""The operator against the fp64 reference, over shapes, dtypes, active sets and special values."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blockffn_compile.ops  # noqa: F401  registers the operator
from blockffn_compile.layer import Activation, Quantisation, experts_reference
from blockffn_compile.schedules.quantisation import dequantised, quantised

OP = torch.ops.blockffn.chunk_sparse_ffn

#: (H, E, S): panels that fit, that need padding, one expert, odd everything.
SHAPES = {
    "even": (128, 8, 64),
    "odd": (52, 5, 24),
    "one expert": (48, 1, 32),
    "threes": (96, 3, 32),
}


class Problem(NamedTuple):
    shape: str
    dtype: torch.dtype
    act: Activation
    gated: bool
    quantisation: Quantisation | None = None


#: Kernels take seconds to build the first time: every value of every axis, not every product.
PLAIN = [
    Problem("even", torch.float32, "silu", False),
    Problem("even", torch.bfloat16, "silu", False),
    Problem("even", torch.float16, "silu", True),
    Problem("odd", torch.float32, "gelu", True),
    Problem("odd", torch.bfloat16, "relu", False),
    Problem("odd", torch.float16, "gelu", False),
    Problem("one expert", torch.float32, "relu", True),
]
QUANTISED = [
    Problem("even", torch.bfloat16, "silu", False, Quantisation(8, 32)),
    Problem("even", torch.float32, "silu", True, Quantisation(4, 64)),
    Problem("threes", torch.float16, "gelu", True, Quantisation(8, 32)),
    Problem("threes", torch.bfloat16, "relu", False, Quantisation(4, 32)),
]
PROBLEMS = PLAIN + QUANTISED


def problem_id(problem):
    name = f"{problem.shape}-{str(problem.dtype).removeprefix('torch.')}-{problem.act}"
    quantisation = problem.quantisation
    kind = "" if quantisation is None else f"-int{quantisation.bits}-{quantisation.group}"
    return f"{name}{'-gated' if problem.gated else ''}{kind}"


problems = pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)


def weights(problem, seed: int = 0) -> dict[str, Any]:
    h, e, s = SHAPES[problem.shape]
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=g) * size[-1] ** -0.5).to(problem.dtype)

    made: dict[str, Any] = {
        "w_up": normal(e, s, h),
        "w_down": normal(e, h, s),
        "w_gate": normal(e, s, h) if problem.gated else None,
    }
    if problem.quantisation is not None:
        pairs = {
            name: quantised(weight, problem.quantisation)
            for name, weight in made.items()
            if weight is not None
        }
        made |= {name: values for name, (values, _) in pairs.items()}
        made |= {f"{name[2:]}_scales": scales for name, (_, scales) in pairs.items()}
    return made


def inputs(problem, tokens: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    dtype = problem.dtype
    h, e, _ = SHAPES[problem.shape]
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, e, generator=g) < density
    scores = torch.randn(tokens, e, generator=g) * active
    return torch.randn(tokens, h, generator=g).to(dtype), scores.to(dtype)


def scales_of(w) -> list[Tensor]:
    return [scales for name, scales in w.items() if name.endswith("scales")]


def dense(problem, x: Tensor, scores: Tensor, w) -> Tensor:
    """All experts in the dtype of x, in PyTorch."""
    stored = [w[name] for name in ("w_up", "w_down", "w_gate") if w[name] is not None]
    if problem.quantisation is None:
        up, down, *gate = (weight.to(x.dtype) for weight in stored)
    else:
        pairs = zip(stored, scales_of(w), strict=True)
        up, down, *gate = (dequantised(*pair, x.dtype) for pair in pairs)
    return experts_reference(x, scores, up, down, problem.act, gate[0] if gate else None)


def oracle(problem, x: Tensor, scores: Tensor, w) -> Tensor:
    return dense(problem, x.double(), scores.double(), w)


def run(problem, x: Tensor, scores: Tensor, w) -> Tensor:
    return OP(x, scores, act=problem.act, **w)


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
        eager.append(error(dense(problem, x, scores, w), want))
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
    _, e, _ = SHAPES[problem.shape]
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
        assert y[3].isnan().any() or problem.act == "relu"
    if value != value:
        assert y[3].isnan().all()
    rest = torch.arange(7) != 3
    assert torch.equal(y[rest], clean[rest])


def test_inf_in_a_skipped_expert_is_ignored():
    problem = PLAIN[0]
    w = weights(problem)
    x, scores = inputs(problem, 3, 1.0)
    scores[:, 2] = 0
    clean = run(problem, x, scores, w)
    w["w_up"][2] = float("inf")
    assert torch.equal(run(problem, x, scores, w), clean)


@pytest.mark.parametrize("problem", QUANTISED, ids=problem_id)
@pytest.mark.parametrize("tokens", [3, 70])
def test_scales_of_a_skipped_expert_are_not_read(problem, tokens):
    w = weights(problem)
    x, scores = inputs(problem, tokens, 1.0)
    scores[:, 2] = 0
    clean = run(problem, x, scores, w)
    for scales in scales_of(w):
        scales[2] = torch.nan
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
    w = weights(PLAIN[0])
    x, scores = inputs(PLAIN[0], 0, 1.0)
    assert run(PLAIN[0], x, scores, w).shape == x.shape


@pytest.mark.parametrize("view", ["transposed", "sliced", "misaligned", "reversed rows"])
def test_input_views(view):
    problem = PLAIN[0]
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
    problem = PLAIN[0]
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
    problem = PLAIN[0]
    w = weights(problem)
    x, scores = inputs(problem, 3, 1.0)
    before = run(problem, x, scores, w)
    w["w_down"].mul_(2)
    assert torch.equal(run(problem, x, scores, w), before * 2)
    w["w_up"].data = torch.zeros_like(w["w_up"])
    assert torch.equal(run(problem, x, scores, w), torch.zeros_like(before))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("problem", [*PLAIN[:2], *QUANTISED[:2]], ids=problem_id)
def test_opcheck(problem, requires_grad):
    w = weights(problem)
    x, scores = inputs(problem, 5, 0.5)
    for tensor in (x, scores, w["w_up"], w["w_down"]):
        if tensor.is_floating_point():
            tensor.requires_grad_(requires_grad)
    torch.library.opcheck(OP.default, (x, scores), {**w, "act": "silu"})


@pytest.mark.parametrize("problem", QUANTISED, ids=problem_id)
def test_gradients_pass_by_quantised_weights(problem):
    w = weights(problem)
    x, scores = (t.float().requires_grad_() for t in inputs(problem, 5, 0.5))
    single = problem._replace(dtype=torch.float32)
    got = torch.autograd.grad(run(single, x, scores, w).square().sum(), (x, scores))
    exact = x.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    want = torch.autograd.grad(oracle(single, *exact, w).square().sum(), exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_are_those_of_the_dense_form(gated):
    problem = Problem("even", torch.float64, "silu", gated)
    w = weights(problem)
    x, scores = inputs(problem, 5, 0.5)
    leaves = [t.requires_grad_() for t in (x, scores, *w.values()) if t is not None]
    want = torch.autograd.grad(oracle(problem, x, scores, w).square().sum(), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    xs, ss, up, down, *gate = single
    y = OP(xs, ss, up, down, "silu", gate[0] if gate else None)
    got = torch.autograd.grad(y.square().sum(), single)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def assert_refused(problem, change, message: str) -> None:
    """With good arguments that ``change`` spoils."""
    x, scores = inputs(problem, 3, 1.0)
    arguments = {"x": x, "scores": scores, **weights(problem), "act": "silu"}
    change(arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        OP(**arguments)


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
    assert_refused(PLAIN[0], change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("down_scales"), "every weight must have its scales"),
        (lambda a: a.update(w_up=a["w_up"].float()), "all be int8 or all be uint8"),
        (lambda a: a.update(w_down=a["w_down"].view(torch.uint8)), "all be int8 or all be uint8"),
        (lambda a: a.update(up_scales=a["up_scales"].float()), "scales must be bfloat16"),
        (lambda a: a.update(down_scales=a["down_scales"][..., :1]), "groups of one size"),
        (lambda a: a.update(up_axes="es,h"), "is not laid out as 'es,h'"),
        (lambda a: [a.pop(f"{name}_scales") for name in ("up", "down")], "one dtype and device"),
    ],
    ids=["number", "float", "kinds", "scale dtype", "groups", "axes", "no scales"],
)
def test_wrong_quantised_arguments(change, message):
    assert_refused(QUANTISED[0], change, message)
