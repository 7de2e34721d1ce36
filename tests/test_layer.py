"""The reference layer against a loop over tokens, experts and neurons in plain Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from blockffn_compile.layer import BlockFFN, BlockFFNSpec, experts_reference, rms_norm

ACTS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
}
VARIANTS = list(
    itertools.product(
        ["block", "block_linear"], ["none", "sum", "rms"], ["silu", "relu", "gelu"], [False, True]
    )
)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def expert_rows(weight: torch.Tensor, spec: BlockFFNSpec) -> list[list[list[float]]]:
    """Up or gate weights as [expert][neuron][hidden] numbers, whatever the layout."""
    return weight.reshape(spec.num_experts, spec.expert_size, spec.hidden_size).tolist()


def oracle(layer: BlockFFN, x: torch.Tensor) -> torch.Tensor:
    spec = layer.spec
    h, e, s = spec.hidden_size, spec.num_experts, spec.expert_size
    act = ACTS[spec.act]
    router = layer.router_proj.weight.tolist()
    up = expert_rows(layer.up_proj, spec)
    gate = None if layer.gate_proj is None else expert_rows(layer.gate_proj, spec)
    down = layer.down_proj.tolist()
    rows = []
    for token in x.tolist():
        scores = [max(dot(token, router[i]), 0.0) for i in range(e)]
        if spec.norm == "sum":
            total = sum(scores) * spec.norm_scale + 1e-5
            scores = [score / total for score in scores]
        elif spec.norm == "rms":
            assert layer.router_norm is not None
            root = math.sqrt(sum(score**2 for score in scores) / e + spec.eps)
            weight = layer.router_norm.weight.tolist()
            scores = [score / root * w for score, w in zip(scores, weight, strict=True)]
        y = [0.0] * h
        for i, j in itertools.product(range(e), range(s)):
            mid = dot(token, up[i][j])
            mid = act(mid) if gate is None else act(dot(token, gate[i][j])) * mid
            for k in range(h):
                w = down[i][k][j] if spec.layout == "block" else down[k][i * s + j]
                y[k] += scores[i] * mid * w
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64)


def make_layer(spec: BlockFFNSpec, dtype: torch.dtype) -> BlockFFN:
    torch.manual_seed(0)
    layer = BlockFFN(spec).to(dtype)
    if layer.router_norm is not None:
        torch.nn.init.uniform_(layer.router_norm.weight, 0.5, 1.5)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # The rms norm takes its variance in fp32 whatever the dtype.
        pytest.param(torch.float64, 1e-6, id="fp64"),
        pytest.param(torch.float32, 1e-5, id="fp32"),
        pytest.param(torch.bfloat16, 5e-2, id="bf16"),
    ],
)
@pytest.mark.parametrize(("layout", "norm", "act", "gated"), VARIANTS)
def test_every_published_variant_equals_the_loops(
    layout, norm, act, gated, dtype, tolerance
) -> None:
    spec = BlockFFNSpec(6, 4, 3, layout, norm, act, gated, norm_scale=0.7)
    layer = make_layer(spec, dtype)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = oracle(layer.double(), x.double())
    layer.to(dtype)
    scale = expected.abs().max().item()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("layout", ["block", "block_linear"])
def test_leading_dimensions_are_tokens(layout) -> None:
    layer = make_layer(BlockFFNSpec(6, 4, 3, layout), torch.float32)
    x = torch.randn(2, 5, 6)
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
    assert layer(torch.randn(0, 6)).shape == (0, 6)


@pytest.mark.parametrize("norm", ["none", "sum", "rms"])
def test_scores_of_experts_that_are_off_are_exactly_zero(norm) -> None:
    layer = make_layer(BlockFFNSpec(6, 4, 3, norm=norm), torch.float32)
    logits = torch.tensor([[-1.0, 2.0, -0.0, 0.5], [-1.0, -2.0, 0.0, -3.0]])
    scores = layer.scores(logits)
    assert torch.equal(scores == 0, logits <= 0)
    assert torch.isfinite(scores).all()


def test_experts_reference_skips_nothing_but_zeros() -> None:
    x, scores = torch.randn(3, 6), torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0]])
    up, down = torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    y = experts_reference(x, scores, up, down, "relu")
    torch.testing.assert_close(y[0], down[0] @ torch.relu(up[0] @ x[0]))
    torch.testing.assert_close(y[1], 2 * (down[1] @ torch.relu(up[1] @ x[1])))
    assert torch.equal(y[2], torch.zeros(6))


def test_rms_norm_has_fp32_variance_under_bf16() -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(512, dtype=torch.bfloat16), 1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("num_experts", -1),
        ("expert_size", 1.5),
        ("layout", "dense"),
        ("norm", "softmax"),
        ("act", "tanh"),
        ("norm_scale", 0.0),
        ("eps", float("nan")),
    ],
)
def test_spec_refuses(field, value) -> None:
    with pytest.raises(ValueError, match=rf"BlockFFNSpec\.{field} "):
        BlockFFNSpec(8, 4, 2).replace(**{field: value})


def test_spec_is_a_value() -> None:
    assert BlockFFNSpec(8, 4, 2) == BlockFFNSpec(8, 4, 2).replace(act="silu")
    assert len({BlockFFNSpec(8, 4, 2), BlockFFNSpec(8, 4, 2), BlockFFNSpec(8, 4, 3)}) == 2
    with pytest.raises(AttributeError):
        BlockFFNSpec(8, 4, 2).act = "relu"  # type: ignore[misc]


def test_initial_weights_follow_the_fan_in() -> None:
    layer = BlockFFN(BlockFFNSpec(64, 4, 16, gated=True))
    assert layer.gate_proj is not None
    for weight, fan_in in ((layer.up_proj, 64), (layer.gate_proj, 64), (layer.down_proj, 16)):
        assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5
