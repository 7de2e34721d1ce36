"""The objectives against their formulas, written out as loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.training.objectives import (
    activation_locality_loss,
    chunk_sparsification_loss,
    record_router_logits,
)


@pytest.fixture
def logits() -> torch.Tensor:
    values = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    values[0, 3] = -1.0  # a token without experts
    values[1, 2] = torch.tensor([3.0, -1, -1, -1, -1])  # one expert takes everything
    return values.requires_grad_()


def test_locality_loss_is_the_formula(logits) -> None:
    alpha, terms = 2.0, []
    for row in logits.double().tolist():
        for here, right in pairwise(row):
            for a, b in zip(here, right, strict=True):
                p, q = 1 / (1 + math.exp(-alpha * a)), 1 / (1 + math.exp(-alpha * b))
                terms.append(-(q * math.log(p) + (1 - q) * math.log(1 - p)))
    loss = activation_locality_loss(logits, alpha)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_locality_loss_prefers_equal_neighbours() -> None:
    steady = torch.tensor([[[1.0, -1.0]] * 4])
    flipping = steady * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    assert activation_locality_loss(steady) < 1e-6
    assert activation_locality_loss(flipping).item() == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_sparsification_loss_is_the_formula(logits, chunk) -> None:
    terms = []
    for row in logits.double().tolist():
        for start in range(0, len(row), chunk):
            for expert in range(5):
                off = 1.0
                for token in row[start : start + chunk]:
                    total = sum(max(a, 0.0) for a in token)
                    off *= 1 - max(token[expert], 0.0) / total if total else 1.0
                terms.append(1 - off)
    loss = chunk_sparsification_loss(logits, chunk)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=5e-4)


def test_sparsification_loss_counts_experts_of_a_chunk() -> None:
    one_each = torch.eye(4)[None]  # four tokens, each with an expert of its own
    assert chunk_sparsification_loss(one_each, 4).item() == pytest.approx(1, abs=1e-3)
    same = torch.eye(4)[:1].expand(1, 4, 4)
    assert chunk_sparsification_loss(same, 4).item() == pytest.approx(0.25, abs=1e-3)
    assert chunk_sparsification_loss(-one_each, 4).item() == pytest.approx(0, abs=1e-3)


def test_gradients_are_finite(logits) -> None:
    for extreme in (logits, logits * 1e4, logits * 1e-6):
        loss = activation_locality_loss(extreme) + chunk_sparsification_loss(extreme, 4)
        (gradient,) = torch.autograd.grad(loss, extreme)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


def test_losses_are_fp32_under_bf16(logits) -> None:
    half = logits.bfloat16()
    assert activation_locality_loss(half).dtype == torch.float32
    assert chunk_sparsification_loss(half, 4).dtype == torch.float32


def test_a_chunk_must_divide_the_text(logits) -> None:
    with pytest.raises(RuntimeError):
        chunk_sparsification_loss(logits, 3)


def test_recording_sees_every_layer_and_leaves_no_hook() -> None:
    first, second = BlockFFN(BlockFFNSpec(6, 4, 3)), BlockFFN(BlockFFNSpec(6, 4, 3))
    model = torch.nn.Sequential(first, second)
    x = torch.randn(5, 6)
    with record_router_logits(model) as logits:
        model(x)
        assert list(logits) == ["0", "1"]
        torch.testing.assert_close(logits["0"], first.router_proj(x))
    model(2 * x)
    torch.testing.assert_close(logits["0"], first.router_proj(x))
