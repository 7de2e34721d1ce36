"""Metrics against brute force over sets of experts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from blockffn_compile.training.metrics import (
    chunk_sparsity,
    layer_sparsity,
    mean_cls,
    measure_sparsity,
    reuse_ratio,
)
from tests.conftest import make_config


@pytest.fixture
def active() -> torch.Tensor:
    return torch.rand(37, 10, generator=torch.Generator().manual_seed(0)) < 0.2


def sets_of(active: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in active]


@pytest.mark.parametrize("n", [1, 2, 5, 8, 37])
def test_chunk_sparsity(active, n) -> None:
    tokens = sets_of(active)
    whole = range(0, len(tokens) - n + 1, n)
    unions = [set().union(*tokens[start : start + n]) for start in whole]
    expected = 1 - sum(len(union) for union in unions) / (10 * len(unions))
    assert chunk_sparsity(active, n) == pytest.approx(expected)


def test_chunk_sparsity_needs_a_whole_chunk(active) -> None:
    with pytest.raises(ValueError, match="CLS_38 needs at least 38 tokens, got 37"):
        chunk_sparsity(active, 38)


def test_reuse_ratio(active) -> None:
    tokens = sets_of(active)
    pairs = list(pairwise(tokens))
    shared = sum(len(here & before) for before, here in pairs)
    assert reuse_ratio(active) == pytest.approx(shared / sum(len(here) for _, here in pairs))
    assert math.isnan(reuse_ratio(torch.zeros(3, 4, dtype=torch.bool)))


def test_layer_sparsity(active) -> None:
    layer = layer_sparsity("mlp", active, (8, 16))
    assert list(layer.cls) == [1, 8, 16]
    assert layer.tls == layer.cls[1] == pytest.approx(1 - active.float().mean().item())
    assert layer.tls > layer.cls[8] > layer.cls[16]


def test_measure_sparsity_on_a_model(make_model) -> None:
    model = make_model(make_config())
    tokens = torch.arange(1, 71) % 300
    layers = measure_sparsity(model, tokens, sizes=(8,), context=32)
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    masks: list[list[torch.Tensor]] = [[], []]
    for window in tokens.split(32):
        for i, block in enumerate(model.model.layers):
            block.mlp.router_proj.register_forward_hook(
                lambda _module, _inputs, logits, i=i: masks[i].append(logits > 0)
            )
        model(window[None])
        for block in model.model.layers:
            block.mlp.router_proj._forward_hooks.clear()
    for layer, parts in zip(layers, masks, strict=True):
        active = torch.cat(parts)
        assert layer.cls == {1: chunk_sparsity(active, 1), 8: chunk_sparsity(active, 8)}
        assert layer.reuse == reuse_ratio(active)
    assert mean_cls(layers, 8) == pytest.approx((layers[0].cls[8] + layers[1].cls[8]) / 2)


def test_a_dense_model_has_no_sparse_layer(make_model) -> None:
    model = make_model(make_config(ffn_type="vanilla", intermediate_size=16))
    assert measure_sparsity(model, torch.arange(16)) == []
