"""Which products become ``blockffn::linear``, and what else happens to the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import blockffn_compile.ops
import blockffn_compile.step_ops  # noqa: F401  registers the operators
from blockffn_compile.layer import CHUNK_TOKENS, Quantisation
from blockffn_compile.passes.linears import rewrite
from blockffn_compile.schedules.quantisation import quantised
from tests.passes.tracing import targets, trace

aten = torch.ops.aten
LINEAR = torch.ops.blockffn.linear.default
MATERIALIZE = torch.ops.blockffn.materialize.default
K = 24


def weight(outputs: int = 16, inputs: int = K) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5, requires_grad=False)


class Projections(nn.Module):
    """Three products of one input, and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = weight(), weight(), weight(5), weight(7, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = F.linear(x, self.q), F.linear(x, self.k), F.linear(x, self.v)
        return F.linear(q * torch.sigmoid(k), self.o), v


class Forms(nn.Module):
    """One product, as ``form`` says."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.w, self.bias = form, weight(K), nn.Parameter(torch.randn(K))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.form(x, self.w, self.bias),)


def products(gm: fx.GraphModule) -> int:
    return sum(target in (aten.mm.default, aten.addmm.default) for target in targets(gm))


def rewritten(module: nn.Module, x: Tensor, **kwargs) -> tuple[fx.GraphModule, int]:
    """The graph after the rewrite, checked against the module, and how many products went."""
    torch.manual_seed(0)
    gm, arguments = trace(module, x, **kwargs)
    before = products(gm)
    count = rewrite(gm.graph)
    assert products(gm) == before - count
    gm.recompile()
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[x.dtype]
    for got, want in zip(gm(*arguments), module(x), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=limit, rtol=limit)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
    return gm, count


@pytest.mark.parametrize("shape", [(1, K), (5, K), (2, 3, K), (CHUNK_TOKENS, K)], ids=str)
def test_products_of_one_input_are_one_call(shape):
    gm, count = rewritten(Projections(), torch.randn(shape))
    assert count == 4
    assert targets(gm).count(LINEAR) == 2
    assert targets(gm).count(aten.slice.Tensor) == 3
    assert aten.permute.default not in targets(gm)
    first, second = (node for node in gm.graph.nodes if node.target is LINEAR)
    assert first.meta["val"].shape == (torch.Size(shape[:-1]).numel(), 37)
    assert len(first.args[1]) == 3
    assert len(second.args[1]) == 1


def test_products_of_different_inputs_are_different_calls():
    class Module(Projections):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x, self.q), F.linear(x + 1, self.k), F.linear(x[:1], self.v)

    gm, count = rewritten(Module(), torch.randn(3, K))
    assert (count, targets(gm).count(LINEAR), targets(gm).count(aten.slice.Tensor)) == (3, 3, 1)


def test_views_of_one_input_in_other_shapes_are_kept_apart():
    """The same numbers, but as other tokens."""

    class Module(Projections):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = weight(3, K // 2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x, self.q), F.linear(x.view(6, K // 2), self.narrow)

    gm, count = rewritten(Module(), torch.randn(3, K))
    assert (count, targets(gm).count(LINEAR)) == (2, 2)


def test_one_weight_twice():
    class Module(Projections):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x, self.q), F.linear(x + 1, self.q)

    _, count = rewritten(Module(), torch.randn(3, K))
    assert count == 2


LEFT_ALONE = {
    "not transposed": lambda x, w, b: x @ w,
    "transposed the other way": lambda x, w, b: x @ w.view(1, K, K).permute(2, 1, 0)[:, :, 0],
    "bias": F.linear,
    "weight computed": lambda x, w, b: x @ (w * 2).T,
    "weight viewed": lambda x, w, b: x @ w.flatten().view(K, K).T,
    "batched": lambda x, w, b: x[None] @ w.T.expand(1, K, K).clone(),
}


@pytest.mark.parametrize("form", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_left_alone(form):
    gm, count = rewritten(Forms(form), torch.randn(3, K))
    assert count == 0
    assert LINEAR not in targets(gm)


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS + 1, 200])
def test_more_tokens_are_left_alone(tokens):
    assert rewritten(Projections(), torch.randn(tokens, K))[1] == 0


def test_symbolic_tokens_are_left_alone():
    assert rewritten(Projections(), torch.randn(3, K), dynamic=True)[1] == 0


def test_a_bias_that_stays_an_addition():
    _, count = rewritten(Forms(lambda x, w, b: (x @ w.T).relu() + b), torch.randn(3, K))
    assert count == 1


def test_other_devices_are_left_alone():
    with torch.device("meta"):
        module = Projections()
    gm, _ = trace(module, torch.randn(3, K, device="meta"))
    assert rewrite(gm.graph) == 0


def test_weights_are_read_anew():
    """The graph holds no copy of a weight."""
    module, x = Projections(), torch.randn(3, K)
    gm, arguments = trace(module, x)
    rewrite(gm.graph)
    gm.recompile()
    gm(*arguments)
    module.v.mul_(3)
    torch.testing.assert_close(gm(*arguments)[1], module(x)[1])


# --- Rounding -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """``x + f(x)``, where x is a sum itself, and f has a value of its own that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weight(K), weight(K)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x + F.linear(x, self.a)
        return (x + F.linear(x * 0.5, self.b),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shared_values_of_low_precision_are_rounded(dtype):
    gm, count = rewritten(Residual().to(dtype), torch.randn(3, K).to(dtype))
    assert count == 2
    (rounded,) = (node for node in gm.graph.nodes if node.target is MATERIALIZE)
    (source,) = rounded.args
    assert source.target is aten.add.Tensor
    assert list(source.users) == [rounded]
    assert {user.target for user in rounded.users} == {aten.mul.Tensor, aten.add.Tensor}
    assert rounded.meta["val"].dtype == dtype


def test_shared_values_of_full_precision_are_not():
    gm, _ = rewritten(Residual(), torch.randn(3, K))
    assert MATERIALIZE not in targets(gm)


def test_graphs_without_products_are_not_rounded():
    form = Forms(lambda x, w, b: (x + 1) * (x + 1).sin()).bfloat16()
    before = targets(trace(form, torch.randn(3, K).bfloat16())[0])
    gm, count = rewritten(form, torch.randn(3, K).bfloat16())
    assert count == 0
    assert targets(gm) == before


# --- Quantised weights ----------------------------------------------------------------------------

DEQUANTIZE = torch.ops.blockffn.dequantize.default


class Stored(nn.Module):
    """``x @ w.T`` of a quantised weight [outputs, 64]."""

    def __init__(self, scheme: Quantisation, outputs: int = 16, bias: bool = False) -> None:
        super().__init__()
        self.values, self.scales = (
            nn.Parameter(t, requires_grad=False)
            for t in quantised(torch.randn(outputs, 64) / 8, scheme)
        )
        self.bias = nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.blockffn.dequantize(self.values, self.scales, x.dtype)
        return F.linear(x, weight, self.bias)


class Several(nn.Module):
    """Products of one input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


INT8, INT4 = Quantisation(8, 32), Quantisation(4, 32)


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS, CHUNK_TOKENS + 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
def test_quantised_products_are_calls_for_any_number_of_tokens(scheme, dtype, tokens):
    module = Several(Stored(scheme), Stored(scheme, 5))
    gm, count = rewritten(module, torch.randn(tokens, 64).to(dtype))
    assert count == 2
    assert [name for name in targets(gm) if name in (LINEAR, DEQUANTIZE)] == [LINEAR]


def test_quantised_products_of_a_symbolic_number_of_tokens():
    gm, count = rewritten(Several(Stored(INT8)), torch.randn(100, 64), dynamic=True)
    assert count == 1
    assert DEQUANTIZE not in targets(gm)


def test_weights_that_are_stored_in_other_ways_are_other_calls():
    ways = (INT8, INT4, Quantisation(8, 64), INT8)
    layers = [*(Stored(scheme) for scheme in ways), nn.Linear(64, 3, bias=False)]
    gm, count = rewritten(Several(*layers).requires_grad_(False), torch.randn(3, 64))
    assert count == 5
    calls = [node for node in gm.graph.nodes if node.target is LINEAR]
    assert sorted(len(node.args[1]) for node in calls) == [1, 1, 1, 2]


def test_a_bias_is_added_to_a_quantised_product():
    gm, count = rewritten(Several(Stored(INT4, bias=True)), torch.randn(3, 64))
    assert count == 1
    assert [t for t in targets(gm) if t in (LINEAR, aten.add.Tensor, aten.addmm.default)] == [
        LINEAR,
        aten.add.Tensor,
    ]


def test_only_quantised_products():
    module = Several(Stored(INT8), nn.Linear(64, 3, bias=False)).requires_grad_(False)
    gm, arguments = trace(module, torch.randn(3, 64))
    assert rewrite(gm.graph, quantised_only=True) == 1
    assert targets(gm).count(aten.mm.default) == 1
    gm.recompile()
    for got, want in zip(gm(*arguments), module(arguments[-1]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_integers_that_are_computed_stay():
    """They are no weight that a kernel could pack once."""

    class Computed(Stored):
        def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
            weight = torch.ops.blockffn.dequantize(-self.values, self.scales, x.dtype)
            return (F.linear(x, weight),)

    gm, count = rewritten(Computed(INT8), torch.randn(3, 64))
    assert count == 0
    assert DEQUANTIZE in targets(gm)
