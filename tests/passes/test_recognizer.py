"""The recogniser on graphs written by hand, as any adapter may hand them over."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockffn_compile.passes.recognizer as recognizer
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, recognise
from blockffn_compile.passes.view import Axis, Value, backward, flat, forward, fresh, regroup
from blockffn_compile.passes.zeros import Router, router, zeros


class Graph:
    """Values in order; method names are operations, keyword arguments their attributes."""

    def __init__(self, scope: tuple[str, ...] = ()) -> None:
        self.values: list[Value] = []
        self.scope = scope

    def add(self, op: str, shape: Iterable[Any], *inputs: Value, **attrs: Any) -> Value:
        dtype = attrs.pop("dtype", "float32")
        value = Value(
            op, inputs, tuple(shape), dtype, attrs, source=object(), name=op, scope=self.scope
        )
        self.values.append(value)
        return value

    def scalar(self, number: float) -> Value:
        return self.add("scalar", (), value=number)

    def output(self, *values: Value) -> None:
        self.add("output", (), *values)


def router_scores(g: Graph, x: Value, experts: int, norm: str = "none") -> Value:
    tokens, hidden = x.shape
    weight = g.add("input", (hidden, experts))
    scores = g.add("relu", (tokens, experts), g.add("matmul", (tokens, experts), x, weight))
    if norm == "rms":
        gamma = g.add("constant", (experts,))
        scores = g.add("rms_norm", scores.shape, scores, gamma, eps=1e-5)
    return scores


def linear_layer(
    g: Graph, x: Value, experts: int, size: int, scores: Value | None = None
) -> tuple[Value, Value]:
    """The ``block_linear`` form as ONNX spells it; the intermediate and the output."""
    tokens, hidden = x.shape
    scores = router_scores(g, x, experts) if scores is None else scores
    width = experts * size
    stored_up, stored_down = g.add("input", (width, hidden)), g.add("input", (hidden, width))
    up = g.add("permute", (hidden, width), stored_up, perm=(1, 0))
    down = g.add("permute", (width, hidden), stored_down, perm=(1, 0))
    u = g.add("matmul", (tokens, width), x, up)
    mid = g.add("mul", u.shape, u, g.add("sigmoid", u.shape, u))
    mid = g.add("reshape", (tokens, experts, size), mid)
    mid = g.add("mul", mid.shape, mid, g.add("reshape", (tokens, experts, 1), scores))
    mid = g.add("reshape", (tokens, width), mid)
    return mid, g.add("matmul", (tokens, hidden), mid, down)


# --- Named axes -----------------------------------------------------------------------------------


def sizes(dims: Any) -> list[tuple[Any, ...]]:
    return [tuple(axis.size for axis in dim) for dim in dims]


@pytest.mark.parametrize(
    ("shape", "new", "expected"),
    [
        ((4, 8), (32,), [(4, 8)]),
        ((32,), (4, 8), [(4,), (8,)]),
        ((32,), (1, 4, 1, 8), [(), (4,), (), (8,)]),
        ((4, 1, 8), (4, 8), [(4,), (8,)]),
        ((4, 6), (8, 3), [(4, 2), (3,)]),
        ((4, 6), (2, 12), [(2,), (2, 6)]),
        (("t", 32), ("t", 4, 8), [("t",), (4,), (8,)]),
        (("b", "t", 16), ("b*t", 16), [("b", "t"), (16,)]),
        (("b*t", 16), ("b", "t", 16), [("b",), ("t",), (16,)]),
        ((4, "t", 8), ("4*t", 8), [(4, "t"), (8,)]),
        (("4*t", 8), (4, "t", 8), [(4,), ("t",), (8,)]),
        ((4, "b", "t", 8), (4, "b*t", 8), [(4,), ("b", "t"), (8,)]),
    ],
)
def test_regroup(shape, new, expected):
    assert sizes(regroup(fresh(shape), new)) == expected


@pytest.mark.parametrize(("shape", "new"), [((3, 8), (8, 3)), ((4, "b", "t"), (4, "t", "b"))])
def test_regroup_gives_up_where_axes_mix(shape, new):
    assert regroup(fresh(shape), new) is None


def test_refinement_reaches_every_holder():
    axis = Axis(32)
    split = regroup(((axis,),), (4, 8))
    assert split is not None
    assert flat(((axis,),)) == flat(split)
    assert sizes(split) == [(4,), (8,)]


def divisors_of(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


@st.composite
def moves(draw):
    """A shape and a chain of reshapes and permutations of it."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4))
    shape: tuple[int, ...] = tuple(factors)
    chain: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            perm = tuple(draw(st.permutations(range(len(shape)))))
            chain.append(("permute", perm))
            shape = tuple(shape[i] for i in perm)
        else:
            count = math.prod(shape)
            new: list[int] = []
            while count > 1 and len(new) < 4:
                new.append(draw(st.sampled_from(divisors_of(count))))
                count //= new[-1]
            shape = (*new, count)
            chain.append(("reshape", shape))
    return tuple(factors), chain


@given(moves())
def test_axes_follow_elements(case):
    """Where NumPy moves an element is where its axes say that it goes."""
    shape, chain = case
    g, array = Graph(), np.arange(math.prod(shape)).reshape(shape)
    value, dims = g.add("input", shape), fresh(shape)
    start = dims
    for op, how in chain:
        if op == "permute":
            array = array.transpose(how)
            value = g.add("permute", array.shape, value, perm=how)
        else:
            array = array.reshape(how)
            value = g.add("reshape", how, value)
        following = forward(value, dims)
        if following is None:
            return
        dims = following
        leaf_sizes = (sizes([flat((dim,))])[0] for dim in dims)
        assert tuple(map(math.prod, leaf_sizes)) == array.shape
        before = backward(value, dims)
        assert before is not None
        assert len(flat(before)) == len(flat(dims))
    order = {axis: i for i, axis in enumerate(flat(start))}
    leaves = flat(dims)
    original = np.arange(array.size).reshape(sizes([tuple(order)])[0])
    moved = original.transpose([order[axis] for axis in leaves]).reshape(array.shape)
    assert np.array_equal(moved, array)


# --- Zeros ----------------------------------------------------------------------------------------


def unary(g: Graph, op: str, x: Value, **attrs: Any) -> Value:
    return g.add(op, x.shape, x, **attrs)


def test_zeros_survive_what_maps_zero_to_zero():
    g = Graph()
    x = g.add("input", (5, 4))
    value = unary(g, "relu", x)
    for op in ("neg", "abs", "sqrt", "tanh", "cast", "reshape"):
        value = unary(g, op, value)
    value = g.add("div", x.shape, value, g.add("input", (5, 1)))
    value = g.add("mul", x.shape, g.add("input", (4,)), value)
    value = g.add("rms_norm", x.shape, value, g.add("input", (4,)), eps=1e-6)
    value = unary(g, "pow", value, exponent=3)
    value = unary(g, "clamp", value, min=-1.0, max=1.0)
    value = g.add("permute", (4, 5), value, perm=(1, 0))
    assert zeros(value).proved
    assert zeros(value).text == "relu"


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("exp", {}),
        ("sigmoid", {}),
        ("pow", {"exponent": 0}),
        ("pow", {"exponent": -1}),
        ("rsqrt", {}),
        ("reciprocal", {}),
        ("clamp", {"min": 0.5, "max": None}),
        ("clamp", {"min": None, "max": -0.5}),
        ("softmax", {}),
        ("layer_norm", {}),
        ("other", {}),
        ("cumsum", {}),
    ],
)
def test_zeros_die(op, attrs):
    g = Graph()
    scores = unary(g, op, unary(g, "relu", g.add("input", (5, 4))), **attrs)
    assert not zeros(scores).proved


def test_zeros_of_sums():
    g = Graph()
    x = g.add("input", (5, 4))
    a, b = unary(g, "relu", x), unary(g, "relu", unary(g, "neg", x))
    assert zeros(g.add("add", x.shape, a, b)).proved  # zero where both are
    refused = zeros(g.add("add", x.shape, a, x))
    assert not refused.proved
    assert "a bias is added" in refused.text


def test_minus_infinity_becomes_zero():
    g = Graph()
    x, mask = g.add("input", (5, 4)), g.add("other", (5, 4), dtype="bool")
    masked = g.add("where", x.shape, mask, x, g.scalar(-math.inf))
    assert zeros(unary(g, "softmax", masked)).text == "masked softmax"
    shifted = g.add("sub", x.shape, masked, g.add("amax", (5, 1), masked, axes=(1,)))
    assert zeros(unary(g, "exp", shifted)).proved
    low = g.add("where", x.shape, mask, x, g.scalar(-1e4))
    assert not zeros(unary(g, "softmax", low)).proved


def test_long_chains_end():
    g = Graph()
    value = g.add("input", (5, 4))
    for _ in range(5000):
        value = unary(g, "neg", value)
    assert "too long" in zeros(value).text


def test_shared_operands_are_looked_at_once():
    """Repeated squaring: as a tree, each of these has more nodes than atoms exist."""
    g = Graph()
    x = g.add("input", (5, 16))
    powers = g.add("matmul", (5, 4), x, g.add("input", (16, 4)))
    for _ in range(300):
        powers = g.add("mul", powers.shape, powers, g.add("cast", powers.shape, powers))
    assert not zeros(powers).proved
    assert router(powers) is None
    _, y = linear_layer(g, x, 4, 8, powers)
    y = g.add("sigmoid", y.shape, y)
    for _ in range(300):
        y = g.add("mul", y.shape, y, g.add("cast", y.shape, y))
    g.output(y)
    (declined,) = recognise(g.values)
    assert isinstance(declined, Declined)


@pytest.mark.parametrize("axis", [0, 1])
def test_router_norms_are_over_experts(axis):
    g = Graph()
    scores = unary(g, "relu", g.add("input", (5, 4)))
    shape = (1, 4) if axis == 0 else (5, 1)
    total = g.add("sum", shape, scores, axes=(axis,))
    divisor = g.add("add", shape, g.add("mul", shape, total, g.scalar(0.5)), g.scalar(1e-5))
    found = router(g.add("div", scores.shape, scores, divisor))
    assert found == (Router("sum", norm_scale=0.5) if axis == 1 else None)


# --- Layers ---------------------------------------------------------------------------------------


def test_a_layer_as_onnx_spells_it():
    g = Graph()
    x = g.add("input", ("tokens", 16))
    _, y = linear_layer(g, x, 4, 8, router_scores(g, x, 4, norm="rms"))
    g.output(y)
    (match,) = recognise(g.values)
    assert isinstance(match, BlockFFNMatch)
    assert (match.up_axes, match.down_axes) == ("es,h", "h,es")
    assert (match.name, match.router) == ("layer 0", "relu, rms norm")
    spec = match.spec
    assert (spec.hidden_size, spec.num_experts, spec.expert_size) == (16, 4, 8)
    assert (spec.layout, spec.norm, spec.act, spec.eps) == ("block_linear", "rms", "silu", 1e-5)
    assert match.x.value is x
    assert match.output.value is y
    assert match.scores[0].shape == (-1, 4)


def test_axes_are_told_apart_when_all_sizes_are_equal():
    g = Graph()
    x = g.add("input", (4, 4))
    scores = router_scores(g, x, 4)
    up, down = g.add("input", (4, 4, 4)), g.add("input", (4, 4, 4))
    # up is [S, E, H], down [H, S, E]: nothing but the way they are used says so.
    wide = g.add("reshape", (16, 4), up)
    u = g.add("matmul", (4, 16), x, g.add("permute", (4, 16), wide, perm=(1, 0)))
    mid = g.add("reshape", (4, 4, 4), g.add("relu", (4, 16), u))
    mid = g.add("mul", mid.shape, mid, g.add("reshape", (4, 1, 4), scores))
    flat_down = g.add("permute", (16, 4), g.add("reshape", (4, 16), down), perm=(1, 0))
    g.output(g.add("matmul", (4, 4), g.add("reshape", (4, 16), mid), flat_down))
    (match,) = recognise(g.values)
    assert isinstance(match, BlockFFNMatch)
    assert (match.up_axes, match.down_axes) == ("s,e,h", "h,s,e")


def test_the_order_of_storage_is_proved_not_assumed():
    """The same shapes, but the down projection takes E and S in the other order."""
    g = Graph()
    x = g.add("input", (5, 16))
    scores = router_scores(g, x, 8)
    up, down = g.add("input", (16, 64)), g.add("input", (64, 16))
    mid = g.add("reshape", (5, 8, 8), g.add("relu", (5, 64), g.add("matmul", (5, 64), x, up)))
    mid = g.add("mul", mid.shape, mid, g.add("reshape", (5, 8, 1), scores))
    swapped = g.add("reshape", (5, 64), g.add("permute", mid.shape, mid, perm=(0, 2, 1)))
    g.output(g.add("matmul", (5, 16), swapped, down))
    (match,) = recognise(g.values)
    assert isinstance(match, BlockFFNMatch)
    assert (match.up_axes, match.down_axes) == ("h,es", "se,h")


def test_a_sum_over_a_repeated_axis_is_no_layer():
    """Summing copies multiplies the result by their number."""
    g = Graph()
    x = g.add("input", (5, 16))
    scores, up, down = (
        router_scores(g, x, 4),
        g.add("input", (4, 16, 8)),
        g.add("input", (4, 8, 16)),
    )
    u = g.add("matmul", (4, 5, 8), g.add("expand", (4, 5, 16), x), up)
    mid = g.add("permute", (4, 5, 8), g.add("relu", u.shape, u), perm=(0, 1, 2))
    by_expert = g.add("reshape", (4, 5, 1), g.add("permute", (4, 5), scores, perm=(1, 0)))
    each = g.add("matmul", (4, 5, 16), g.add("mul", mid.shape, mid, by_expert), down)
    copies = g.add("expand", (3, 4, 5, 16), each)
    g.output(g.add("sum", (5, 16), copies, axes=(0, 1)))
    assert recognise(g.values) == []


def test_names_come_from_scopes():
    g = Graph()
    x = g.add("input", (5, 16))
    for layer in range(2):
        g.scope = ("model", f"model.layers.{layer}", f"model.layers.{layer}.mlp")
        _, x = linear_layer(g, x, 4, 8)
    g.output(x)
    assert [r.name for r in recognise(g.values)] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_results_are_in_graph_order_and_numbered():
    g = Graph()
    x = g.add("input", (5, 16))
    _, x = linear_layer(g, x, 4, 8)
    logits = g.add("matmul", (5, 4), x, g.add("input", (16, 4)))
    _, x = linear_layer(g, x, 4, 8, unary(g, "softmax", logits))
    _, x = linear_layer(g, x, 2, 8)
    g.output(x)
    results = recognise(g.values)
    assert [r.name for r in results] == ["layer 0", "layer 1", "layer 2"]
    assert [type(r) for r in results] == [BlockFFNMatch, Declined, BlockFFNMatch]


def test_second_user():
    g = Graph()
    mid, y = linear_layer(g, g.add("input", (5, 16)), 4, 8)
    g.output(y, mid)
    (declined,) = recognise(g.values)
    assert declined == Declined("layer 0", "the intermediate activations have a second user")


@pytest.mark.parametrize("experts", ["e", 4])
def test_symbolic_experts(experts):
    g = Graph()
    x = g.add("input", (5, 16))
    scores = router_scores(g, x, experts)
    up, down = g.add("input", (experts, 16, 8)), g.add("input", (experts, 8, 16))
    u = g.add("matmul", (experts, 5, 8), g.add("reshape", (1, 5, 16), x), up)
    by_expert = g.add(
        "reshape", (experts, 5, 1), g.add("permute", (experts, 5), scores, perm=(1, 0))
    )
    mid = g.add("mul", u.shape, g.add("relu", u.shape, u), by_expert)
    each = g.add("matmul", (experts, 5, 16), mid, down)
    g.output(g.add("sum", (5, 16), each, axes=(0,)))
    (result,) = recognise(g.values)
    if experts == "e":
        assert isinstance(result, Declined)
        assert "sizes of the experts are not known" in result.reason
    else:
        assert isinstance(result, BlockFFNMatch)


def test_values_print_briefly():
    g = Graph()
    x = g.add("input", (5, 4))
    for _ in range(200):
        x = g.add("mul", (5, 4), x, x)
    assert len(repr(x)) < 80


@pytest.mark.parametrize("module", ["view", "products", "zeros", "recognizer"])
def test_the_recogniser_knows_no_graph_language(module):
    path = Path(recognizer.__file__).with_name(f"{module}.py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    assert not [name for name in imported if name.split(".")[0] in ("torch", "onnx", "tvm")]
