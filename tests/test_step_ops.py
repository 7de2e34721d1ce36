"""The operators of a decoding step against fp64, and the bits of a token in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import blockffn_compile.ops
import blockffn_compile.step_ops  # noqa: F401  registers the operators
from blockffn_compile.layer import Quantisation
from blockffn_compile.schedules import tir
from blockffn_compile.schedules.quantisation import dequantised, quantised
from blockffn_compile.step_ops import _plain_attention

LINEAR = torch.ops.blockffn.linear
ATTENTION = torch.ops.blockffn.cached_attention
NAN, INF = float("nan"), float("inf")

#: Relative to the norm of the result: the rounding of the element type, and that of fp32 sums.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- Linear ---------------------------------------------------------------------------------------

#: K and the Ni of the weights.
MATRICES = {"even": (64, [96]), "odd": (37, [53]), "one": (1, [1]), "three": (40, [24, 1, 9])}
matrices = pytest.mark.parametrize("shape", MATRICES)


def product(shape: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    inputs, outputs = MATRICES[shape]
    weights = [normal(n, inputs, dtype=dtype, seed=i + 1) for i, n in enumerate(outputs)]
    return normal(tokens, inputs, dtype=dtype), weights


def exact(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.double() @ torch.cat(weights).double().T


@dtypes
@matrices
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 8, 33, 64, 65])
def test_linear(shape, tokens, dtype):
    x, weights = product(shape, tokens, dtype)
    y = LINEAR(x, weights)
    assert y.dtype == dtype
    want = exact(x, weights)
    assert y.shape == want.shape
    if tokens:
        assert error(y, want) <= LIMITS[dtype]


@dtypes
@matrices
def test_linear_rows_do_not_depend_on_company(shape, dtype):
    x, weights = product(shape, 64, dtype)
    together = LINEAR(x, weights)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(LINEAR(x[order], weights), together[order])
    for size in (1, 2, 3, 5, 6, 7, 31):
        for first in range(0, 64 - size, 13):
            part = slice(first, first + size)
            assert torch.equal(LINEAR(x[part], weights), together[part])


@matrices
def test_linear_of_several_weights_is_each_alone(shape):
    x, weights = product(shape, 5, torch.float32)
    alone = torch.cat([LINEAR(x, [w]) for w in weights], dim=1)
    assert torch.equal(LINEAR(x, weights), alone)


@dtypes
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_linear_keeps_non_finite_values_in_their_row(value, dtype):
    x, weights = product("odd", 7, dtype)
    clean = LINEAR(x, weights)
    x[3, 36] = value
    y = LINEAR(x, weights)
    assert (y[3].isnan() if value != value else y[3].isinf()).all()
    rest = torch.arange(7) != 3
    assert torch.equal(y[rest], clean[rest])


def test_linear_sees_writes_to_every_weight():
    x, weights = product("three", 3, torch.float32)
    before = LINEAR(x, weights)
    for weight, part in zip(weights, before.split([24, 1, 9], 1), strict=True):
        weight.mul_(2)
        part.mul_(2)
        assert torch.equal(LINEAR(x, weights), before)
    weights[1].data = torch.zeros(1, 40)
    assert (LINEAR(x, weights)[:, 24] == 0).all()


def test_linear_tells_views_of_one_address_apart():
    x, [first] = product("even", 3, torch.float32)
    square = normal(64, 64, seed=5)
    for weight in (square, square.T, square[:32], square[:48]):
        assert error(LINEAR(x, [first, weight]), exact(x, [first, weight])) < 1e-6


@pytest.mark.parametrize("view", ["transposed", "sliced", "misaligned"])
def test_linear_of_views(view):
    x, weights = product("even", 8, torch.float32)
    want = LINEAR(x, weights)
    if view == "transposed":
        x, weights = x.T.contiguous().T, [w.T.contiguous().T for w in weights]
    elif view == "sliced":
        x = x.repeat_interleave(2, 1)[:, ::2]
    else:
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert torch.equal(LINEAR(x, weights), want)


def test_linear_of_a_dtype_without_kernel():
    x, weights = product("odd", 3, torch.float64)
    torch.testing.assert_close(LINEAR(x, weights), exact(x, weights))


def test_linear_without_kernels(monkeypatch):
    monkeypatch.setattr(tir, "linear_kernel", lambda *_: None)
    x, weights = product("three", 3, torch.float32)
    assert error(LINEAR(x, weights), exact(x, weights)) < 1e-6


# --- Quantised linear -----------------------------------------------------------------------------

ways = pytest.mark.parametrize(
    "way", [Quantisation(8, 32), Quantisation(4, 64), Quantisation(4, 32)], ids=str
)


def quantised_product(
    way: Quantisation, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """x, integers, scales, and the weights [N, K] in fp64 that they stand for."""
    pairs = [quantised(normal(n, 192, seed=n), way) for n in (24, 1, 9, 70)]
    values, scales = ([pair[i] for pair in pairs] for i in (0, 1))
    weight = torch.cat([dequantised(*pair, torch.float64) for pair in pairs])
    return normal(tokens, 192, dtype=dtype), values, scales, weight


@dtypes
@ways
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 64, 65, 200])
def test_quantised_linear(way, tokens, dtype):
    x, values, scales, weight = quantised_product(way, tokens, dtype)
    y = LINEAR(x, values, scales)
    assert y.dtype == dtype
    assert y.shape == (tokens, 104)
    if tokens:
        assert error(y, x.double() @ weight.T) <= LIMITS[dtype]


@dtypes
@ways
def test_quantised_rows_do_not_depend_on_company(way, dtype):
    x, values, scales, _ = quantised_product(way, 130, dtype)
    together = LINEAR(x, values, scales)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    assert torch.equal(LINEAR(x[order], values, scales), together[order])
    for size in (1, 2, 3, 4, 6, 7, 31):
        for first in range(0, 130 - size, 26):
            part = slice(first, first + size)
            assert torch.equal(LINEAR(x[part], values, scales), together[part])


@ways
@pytest.mark.parametrize("value", [NAN, INF])
def test_quantised_linear_keeps_non_finite_values_in_their_row(way, value):
    x, values, scales, _ = quantised_product(way, 7, torch.float32)
    clean = LINEAR(x, values, scales)
    x[3, 36] = value
    y = LINEAR(x, values, scales)
    assert not y[3].isfinite().any()
    rest = torch.arange(7) != 3
    assert torch.equal(y[rest], clean[rest])


@ways
def test_quantised_linear_without_kernels(way, monkeypatch):
    monkeypatch.setattr(tir, "linear_kernel", lambda *_: None)
    x, values, scales, weight = quantised_product(way, 3, torch.float32)
    assert error(LINEAR(x, values, scales), x.double() @ weight.T) < 1e-6


def test_opcheck_quantised_linear():
    x, values, scales, _ = quantised_product(Quantisation(4, 32), 5, torch.float32)
    torch.library.opcheck(LINEAR.default, (x, values, scales))
    dequantize = torch.ops.blockffn.dequantize.default
    torch.library.opcheck(dequantize, (values[0], scales[0], torch.bfloat16))


def test_weights_that_are_quantised_in_several_ways():
    x, values, scales, _ = quantised_product(Quantisation(8, 32), 5, torch.float32)
    _, others, theirs, _ = quantised_product(Quantisation(4, 32), 5, torch.float32)
    weights, both = [values[0], others[0]], [scales[0], theirs[0]]
    with pytest.raises(RuntimeError, match="quantised in one way"):
        LINEAR(
            *(t.to("meta") for t in [x]), *([t.to("meta") for t in ts] for ts in (weights, both))
        )


# --- Shape rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.zeros(8), [torch.zeros(4, 8)], r"x must be \[T, K\]"),
        (torch.zeros(2, 8), [torch.zeros(4, 8), torch.zeros(4, 9)], r"weights must be \[N, K\]"),
        (torch.zeros(2, 8), [torch.zeros(8)], r"weights must be \[N, K\]"),
        (torch.zeros(2, 8), [torch.zeros(4, 8).half()], "of the dtype of x"),
    ],
    ids=["x", "inputs", "rank", "dtype"],
)
def test_linear_shape_rule(x, weights, message):
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        LINEAR(mode.from_tensor(x), [mode.from_tensor(w) for w in weights])


def test_opcheck_linear():
    torch.library.opcheck(LINEAR.default, product("three", 5, torch.float32))


# --- Attention ------------------------------------------------------------------------------------

#: Q, G, D, V.
HEADS = {
    "one group": (4, 4, 16, 16),
    "groups of two": (4, 2, 32, 16),
    "groups of three": (6, 2, 16, 80),
    "groups of eight": (8, 1, 48, 32),
    "no kernel": (4, 2, 12, 6),
}
heads_of = pytest.mark.parametrize("heads", HEADS)
kernels = pytest.mark.parametrize("heads", [name for name in HEADS if name != "no kernel"])
LENGTH = 130


class Case:
    """Arguments of one call: q, keys, values, rows, context, ancestors."""

    def __init__(self, heads: str, dtype: torch.dtype, nodes: list[tuple[int, int, int]]) -> None:
        """Nodes are (row, context, mask of ancestors)."""
        q, g, d, v = HEADS[heads]
        self.q = normal(len(nodes), q, d, dtype=dtype, seed=1)
        self.keys = normal(3, g, LENGTH, d, dtype=dtype, seed=2)
        self.values = normal(3, g, LENGTH, v, dtype=dtype, seed=3)
        self.rows, self.context, ancestors = torch.tensor(nodes).T.contiguous()
        self.ancestors = ancestors

    def arguments(self, part: slice | Tensor = slice(None)) -> tuple[Tensor, ...]:
        places = (self.rows[part], self.context[part], self.ancestors[part])
        return (self.q[part], self.keys, self.values, *places)

    def seen(self, t: int) -> list[int]:
        """Slots that token ``t`` sees, in order."""
        past, mask = int(self.context[t]), int(self.ancestors[t])
        return [*range(past), *(past + j for j in range(64) if mask >> j & 1)]

    def exact(self) -> Tensor:
        group = self.q.shape[1] // self.keys.shape[1]
        out = []
        for t, row in enumerate(self.rows.tolist()):
            keys = self.keys[row][:, self.seen(t)].double().repeat_interleave(group, 0)
            values = self.values[row][:, self.seen(t)].double().repeat_interleave(group, 0)
            scores = keys @ self.q[t].double()[:, :, None] * self.q.shape[2] ** -0.5
            out.append((scores.softmax(1) * values).sum(1))
        return torch.stack(out)


def chain(count: int, context: int, row: int = 0) -> list[tuple[int, int, int]]:
    masks = torch.tensor([(1 << i + 1) - 1 for i in range(min(count, 63))] + [-1] * (count - 63))
    return [(row, context, int(mask)) for mask in masks]


#: Root, two children, three grandchildren, an only child.
TREE = [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101, 0b1100101]

SHAPES = {
    "one": [(0, 5, 1)],
    "first of all": [(0, 0, 1)],
    "chain": chain(5, 17),
    "chain from nothing": chain(2, 0),
    "tree": [(1, 31, mask) for mask in TREE],
    "rows": [*((2, 9, mask) for mask in TREE), *chain(3, 0, 0), (1, LENGTH - 1, 1)],
    "all": chain(64, LENGTH - 64),
    "padded": [*chain(5, 17), *[(0, 17, 1)] * 3],
}


@dtypes
@heads_of
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(heads, shape, dtype):
    case = Case(heads, dtype, SHAPES[shape])
    y = ATTENTION(*case.arguments())
    assert y.dtype == dtype
    assert y.shape == (*case.q.shape[:2], case.values.shape[3])
    assert error(y, case.exact()) <= 2 * LIMITS[dtype]
    assert error(_plain_attention(*case.arguments()), case.exact()) <= 2 * LIMITS[dtype]


def test_attention_has_kernels_for_head_sizes_of_whole_vectors():
    for name, sizes in HEADS.items():
        kernel = tir.attention_kernel(*sizes, torch.float32)
        assert (kernel is None) == (name == "no kernel")


def test_attention_to_the_last_ancestor_bit():
    """Bit 63 is the sign of an int64: the last node of 64 sees itself."""
    case = Case("one group", torch.float32, chain(64, 3))
    before = ATTENTION(*case.arguments())
    case.values[0, :, 3 + 63] += 1
    assert torch.equal(ATTENTION(*case.arguments())[:63], before[:63])
    assert not torch.isclose(ATTENTION(*case.arguments())[63], before[63]).any()


@dtypes
@kernels
def test_attention_rows_do_not_depend_on_company(heads, dtype):
    nodes = [(i % 3, 3 * i % 60, 1 << 63 - 1 - i | 1) for i in range(50)]
    case = Case(heads, dtype, [*nodes, *((1, 40, mask) for mask in TREE), *chain(7, 64)])
    together = ATTENTION(*case.arguments())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ATTENTION(*case.arguments(order)), together[order])
    for size in (1, 2, 3, 8, 31):
        for first in range(0, 64 - size, 7):
            part = slice(first, first + size)
            assert torch.equal(ATTENTION(*case.arguments(part)), together[part])


@dtypes
@kernels
def test_attention_to_nodes_is_attention_to_the_context(heads, dtype):
    """A path's keys in a tree, not side by side; then committed, in part or all."""
    scattered = Case(heads, dtype, [(0, 20, 0b1001101)])
    want = ATTENTION(*scattered.arguments())
    assert scattered.seen(0)[20:] == [20, 22, 23, 26]
    for committed in range(4):
        case = Case(heads, dtype, [(0, 20 + committed, (1 << 4 - committed) - 1)])
        for stored in (case.keys, case.values):
            stored[0, :, 20:24] = stored[0][:, [20, 22, 23, 26]].clone()
        assert torch.equal(ATTENTION(*case.arguments()), want), committed


@dtypes
@kernels
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_attention_is_poisoned_by_what_it_sees_alone(heads, where, value, dtype):
    nodes = [(0, 20, mask) for mask in TREE] + [(1, 40, 1), (0, 3, 1)]
    case = Case(heads, dtype, nodes)
    clean = ATTENTION(*case.arguments())
    slot = 20 + 2  # node 2, an ancestor of the nodes 2, 5 and 6
    getattr(case, where)[0, :, slot] = value
    y = ATTENTION(*case.arguments())
    poisoned = torch.tensor([slot in case.seen(t) for t in range(len(nodes) - 2)] + [False] * 2)
    assert poisoned.sum() == 3
    assert torch.equal(y[~poisoned], clean[~poisoned])
    if where == "values":
        assert (y[poisoned].isnan() if value != value else y[poisoned].isinf()).all()
    elif value != value:
        assert y[poisoned].isnan().all()


@pytest.mark.parametrize("where", ["keys", "values"])
def test_attention_without_a_kernel_is_not_poisoned_by_what_is_hidden(where):
    case = Case("groups of two", torch.float32, [(0, 20, mask) for mask in TREE])
    clean = _plain_attention(*case.arguments())
    getattr(case, where)[0, :, 22] = NAN
    y = _plain_attention(*case.arguments())
    seeing = torch.tensor([22 in case.seen(t) for t in range(len(TREE))])
    assert 0 < seeing.sum() < len(TREE)
    assert torch.equal(y[~seeing], clean[~seeing])
    assert y[seeing].isnan().all()


def test_attention_query_of_nan_stays_alone():
    case = Case("groups of two", torch.float32, chain(5, 17))
    clean = ATTENTION(*case.arguments())
    case.q[2, 1, 31] = NAN
    y = ATTENTION(*case.arguments())
    assert y[2, 1].isnan().all()
    y[2, 1] = clean[2, 1]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4])
def test_attention_to_one_key_far_above_the_others(scale):
    case = Case("groups of two", torch.float32, chain(5, 17))
    case.q *= scale
    torch.testing.assert_close(
        ATTENTION(*case.arguments()).double(), case.exact(), rtol=1e-3, atol=1e-3
    )


def test_attention_from_a_transposed_query():
    case = Case("groups of two", torch.float32, chain(5, 17))
    want = ATTENTION(*case.arguments())
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ATTENTION(*case.arguments()), want)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("q", (65, 4, 16), "T <= 64"),
        ("q", (4, 16), "T <= 64"),
        ("q", (3, 5, 16), "G a divisor of Q"),
        ("keys", (3, 4, LENGTH, 32), r"keys must be \[B, G, L, D\]"),
    ],
    ids=["tokens", "rank", "heads", "key dim"],
)
def test_attention_shape_rule(name, size, message):
    case = Case("one group", torch.float32, chain(3, 5))
    arguments = dict(
        zip(("q", "keys", "values", "rows", "context", "ancestors"), case.arguments(), strict=True)
    )
    arguments[name] = torch.zeros(size)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        ATTENTION(*map(mode.from_tensor, arguments.values()))


def test_opcheck_attention():
    case = Case("groups of two", torch.float32, chain(5, 17))
    torch.library.opcheck(ATTENTION.default, case.arguments())


def test_materialize_is_a_copy():
    x = normal(3, 4)
    y = torch.ops.blockffn.materialize(x)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()
