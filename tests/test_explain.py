"""``explain``: what it reports, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import pgo
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import blockffn_compile
import blockffn_compile.layer
from blockffn_compile.explain import explain
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.models.cache import StaticCache
from blockffn_compile.report import Report
from tests.conftest import make_config
from tests.passes.near_misses import NEAR_MISSES
from tests.passes.spellings import MATCHES

SPEC = BlockFFNSpec(16, 4, 8, layout="block_linear", norm="sum", act="gelu", gated=True)


@pytest.fixture
def layer():
    return BlockFFN(SPEC).requires_grad_(False)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_model(attention, make_model):
    model = make_model(make_config(attention))
    report = explain(model, torch.zeros(1, 5, dtype=torch.long))
    names = [f"model.layers.{i}.mlp" for i in range(model.config.num_hidden_layers)]
    assert [layer.name for layer in report.layers] == names
    assert {layer.status for layer in report.layers} == {"rewritten"}
    assert {layer.spec for layer in report.layers} == {model.config.ffn_spec}
    assert not any(layer.reason for layer in report.layers)


class Softmax(BlockFFN):
    def scores(self, logits):
        return logits.softmax(-1)


def test_table(layer):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparse, self.dense = layer, Softmax(BlockFFNSpec(16, 4, 8)).requires_grad_(False)

        def forward(self, x):
            return self.dense(self.sparse(x))

    report = explain(Both(), torch.randn(5, 16))
    lines = str(report).splitlines()
    assert lines[0].split(maxsplit=2) == [
        "sparse",
        "rewritten",
        "4 experts of 8, hidden 16, gated gelu, block_linear, scores: relu, sum norm",
    ]
    assert lines[1].split(maxsplit=2) == [
        "dense",
        "declined",
        "scores come from softmax, which has no exact zeros",
    ]
    assert lines[2:] == ["1 of 2 layers rewritten"]


@pytest.mark.parametrize("spelling", NEAR_MISSES[::4], ids=lambda s: s.name)
def test_reasons(spelling):
    (layer,) = explain(*spelling.build()).layers
    assert layer.status == "declined"
    assert spelling.expect["reason"] in layer.reason
    assert layer.spec is None


@pytest.mark.parametrize("spelling", MATCHES[::12], ids=lambda s: s.name)
def test_matches(spelling):
    (layer,) = explain(*spelling.build()).layers
    assert layer.status == "rewritten"


def test_gradients_are_said_to_be_the_reason():
    layer, x = BlockFFN(SPEC), torch.randn(5, 16)
    (needs,) = explain(layer, x).layers
    assert needs.status == "declined"
    assert "torch.no_grad()" in needs.reason
    with torch.inference_mode():
        (without,) = explain(layer, x).layers
    assert without.status == "rewritten"


def test_functions_and_keywords(layer):
    def twice(x, *, scale):
        return layer(layer(x)) * scale

    assert len(explain(twice, torch.randn(5, 16), scale=2.0).layers) == 2


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 4), lambda x: 1, F.silu], ids=["linear", "int", "op"]
)
def test_no_layers(model):
    report = explain(model, torch.randn(3, 4))
    assert report == Report(())
    assert str(report) == "no BlockFFN layers"


def test_graph_breaks_are_errors(layer):
    def broken(x):
        x = layer(x)
        torch._dynamo.graph_break()
        return layer(x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        explain(broken, torch.randn(5, 16))


def test_nothing_is_left_behind(make_model):
    model = make_model(make_config())
    cache, tokens = StaticCache(model.config, 1, 16), torch.zeros(1, 5, dtype=torch.long)
    code, names = type(model).forward.__code__, type(model).forward.__globals__

    def state():
        return (
            torch.get_rng_state().tolist(),
            len(_debug_get_cache_entry_list(code)),
            set(names),
            {key: str(entry) for key, entry in pgo.get_code_state().items()},
            torch.is_grad_enabled(),
            sorted(torch._dynamo.config.get_config_copy()),
        )

    before = state()
    explain(model, tokens, torch.arange(5), cache)
    assert state() == before
    assert not any(keys.any() for keys in cache.keys)


def test_compiled_code_stays_valid(layer):
    """Explaining with another shape neither recompiles nor makes shapes dynamic."""
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="eager")
    fast(torch.randn(5, 16))
    explain(layer, torch.randn(7, 16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast(torch.randn(5, 16))
    torch._dynamo.reset()


def test_the_package_offers_a_function(layer):
    """Although importing the module of the same name replaces the attribute."""
    assert len(blockffn_compile.explain(layer, torch.randn(5, 16)).layers) == 1
