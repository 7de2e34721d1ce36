"""The FX pass on every spelling: what it matches, what it leaves, and that the numbers stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_manager import PassManager

import blockffn_compile.ops  # noqa: F401  registers the operator
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.passes import fx as passes
from blockffn_compile.passes.fx import (
    BlockFFNGraphPass,
    BlockFFNPass,
    find,
    rewrite,
)
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, recognise
from blockffn_compile.passes.verification import VerificationError
from tests.passes.near_misses import NEAR_MISSES, OTHERS
from tests.passes.spellings import MATCHES, E, H, S, Spelling
from tests.passes.tracing import TABLES, targets, trace

OP = torch.ops.blockffn.chunk_sparse_ffn.default
CONTRACTIONS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default}

spelled = pytest.mark.parametrize("spelling", MATCHES, ids=lambda s: s.name)
tables = pytest.mark.parametrize("table", TABLES)


def assert_same(actual, expected):
    """Equal up to the rounding of the element type."""
    loose = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
    for a, b in zip(actual, expected, strict=True):
        limit = loose.get(b.dtype, 1e-5)
        torch.testing.assert_close(a, b, atol=limit, rtol=limit, equal_nan=True)


def assert_expected(match, expect):
    found = {name: getattr(match, name, getattr(match.spec, name, None)) for name in expect}
    assert found == expect
    assert (match.spec.hidden_size, match.spec.num_experts, match.spec.expert_size) == (H, E, S)


# --- The matrix of spellings ----------------------------------------------------------------------


def test_the_matrix_is_large_enough():
    assert len(MATCHES) >= 30
    assert len(NEAR_MISSES) >= 15


@tables
@spelled
def test_match(spelling: Spelling, table):
    module, x = spelling.build()
    gm, arguments = trace(module, x, table)
    assert OP not in targets(gm)
    (match,) = rewrite(gm.graph, verify=True)
    assert isinstance(match, BlockFFNMatch), match
    assert_expected(match, spelling.expect)
    gm.recompile()
    assert targets(gm).count(OP) == 1
    assert sum(target in CONTRACTIONS for target in targets(gm)) <= 1  # the router's
    assert_same(gm(*arguments), module(x))


@pytest.mark.parametrize("spelling", [s for s in MATCHES if 1 not in s.shape], ids=lambda s: s.name)
def test_match_with_symbolic_tokens(spelling: Spelling):
    """One graph for every number of tokens."""
    module, x = spelling.build()
    gm, arguments = trace(module, x, dynamic=True)
    (match,) = rewrite(gm.graph, verify=True)
    assert isinstance(match, BlockFFNMatch), match
    assert_expected(match, spelling.expect)
    gm.recompile()
    assert targets(gm).count(OP) == 1
    more = torch.cat((x, x.flip(-2)), dim=-2)
    for tokens in (x, more):
        assert_same(gm(*arguments[:-1], tokens), module(tokens))


COMPOSITE = ("linear_at_operator", "input_3d_linear", "input_3d_bmm", "bmm_chain", "gated_linear")


@pytest.mark.parametrize("name", COMPOSITE)
def test_match_in_an_exported_program(name):
    """``torch.export`` keeps linear, matmul and the transposes whole."""
    (spelling,) = (s for s in MATCHES if s.name == name)
    module, x = spelling.build()
    program = torch.export.export(module, (x,))
    (match,) = rewrite(program.graph, verify=True)
    assert isinstance(match, BlockFFNMatch), match
    assert_expected(match, spelling.expect)
    program.graph_module.recompile()
    assert_same(program.module()(x), module(x))


@tables
@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda s: s.name)
def test_near_miss(spelling: Spelling, table):
    module, x = spelling.build()
    gm, arguments = trace(module, x, table)
    before = targets(gm)
    (declined,) = rewrite(gm.graph, verify=True)
    assert isinstance(declined, Declined)
    assert spelling.expect["reason"] in declined.reason
    gm.recompile()
    assert targets(gm) == before
    assert_same(gm(*arguments), module(x))


@tables
@pytest.mark.parametrize("spelling", OTHERS, ids=lambda s: s.name)
def test_nothing_is_said_about_other_networks(spelling: Spelling, table):
    gm, _ = trace(*spelling.build(), table)
    assert find(gm.graph) == []


# --- Whole graphs ---------------------------------------------------------------------------------


class Stack(nn.Module):
    """BlockFFN layers of different specs, each reading the last one's output directly."""

    def __init__(self, *specs: BlockFFNSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BlockFFN(spec) for spec in specs)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x,)


STACK = (
    BlockFFNSpec(16, 4, 8),
    BlockFFNSpec(16, 2, 24, layout="block_linear", norm="sum", act="gelu", norm_scale=0.5),
    BlockFFNSpec(16, 6, 8, norm="none", act="relu", gated=True),
)


@tables
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_layers(table, dtype):
    module, x = Stack(*STACK).to(dtype), torch.randn(3, 7, 16).to(dtype)
    gm, arguments = trace(module, x, table)
    results = rewrite(gm.graph, verify=True)
    assert [getattr(r, "spec", r) for r in results] == list(STACK)
    assert [r.name for r in results] == ["layers.0", "layers.1", "layers.2"]
    gm.recompile()
    assert targets(gm).count(OP) == len(STACK)
    assert_same(gm(*arguments), module(x))


def test_one_of_two_layers():
    class Mixed(Stack):
        def forward(self, x):
            plain: Any = self.layers[0]
            dense: Any = self.layers[1]
            mid = torch.matmul(x, dense.up_proj.mT).relu()
            weights = dense.router_proj(x).softmax(-1).t().unsqueeze(-1)
            return (torch.einsum("ets,ehs->th", mid * weights, dense.down_proj) + plain(x),)

    module, x = (
        Mixed(BlockFFNSpec(16, 4, 8), BlockFFNSpec(16, 4, 8, norm="none")),
        torch.randn(5, 16),
    )
    gm, arguments = trace(module, x)
    results = rewrite(gm.graph, verify=True)
    assert sorted(type(r).__name__ for r in results) == ["BlockFFNMatch", "Declined"]
    gm.recompile()
    assert targets(gm).count(OP) == 1
    assert_same(gm(*arguments), module(x))


def test_weights_held_by_the_graph_module():
    """Constants of the graph, as export to edge devices and freezing leave them."""
    layer, x = BlockFFN(BlockFFNSpec(16, 4, 8)).requires_grad_(False), torch.randn(5, 16)
    gm = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    (match,) = rewrite(gm.graph, verify=True)
    assert isinstance(match, BlockFFNMatch)
    assert match.w_up.source.op == "get_attr"
    gm.recompile()
    assert_same([gm(x)], [layer(x)])


def test_tensors_written_in_place_before():
    """The fused operation reads its inputs later than the nodes that it replaces did."""
    layer = BlockFFN(BlockFFNSpec(16, 4, 8, norm="none")).requires_grad_(False)

    def clear_scores_too_early(x):
        scores = layer.scores(layer.router_proj(x))
        mid = torch.nn.functional.silu(x @ layer.up_proj.mT) * scores.t().unsqueeze(-1)
        scores.zero_()
        return torch.einsum("ets,ehs->th", mid, layer.down_proj)

    x = torch.randn(5, 16)
    gm = make_fx(clear_scores_too_early, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    (declined,) = rewrite(gm.graph)
    assert isinstance(declined, Declined)
    assert "written in place" in declined.reason
    gm.recompile()
    assert_same([gm(x)], [clear_scores_too_early(x)])


def test_nodes_keep_their_types_and_origin():
    gm, _ = trace(Stack(STACK[0]), torch.randn(5, 16))
    (match,) = find(gm.graph)
    assert isinstance(match, BlockFFNMatch)
    match.output.value.source.meta["stack_trace"] = "a line of the model"
    rewrite(gm.graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=OP)
    assert node.meta["val"].shape == (5, 16)
    assert node.meta["stack_trace"] == "a line of the model"
    assert all("val" in n.meta for n in node.all_input_nodes)


# --- Verification and dumps -----------------------------------------------------------------------


@pytest.fixture
def _misread(monkeypatch):
    """A recogniser that takes SiLU for ReLU."""

    def misread(values):
        return [
            dataclasses.replace(match, name="model.mlp", spec=match.spec.replace(act="relu"))
            for match in recognise(values)
            if isinstance(match, BlockFFNMatch)
        ]

    monkeypatch.setattr(passes, "recognise", misread)


@pytest.mark.usefixtures("_misread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verification_catches_a_wrong_rewrite(dtype):
    gm, _ = trace(Stack(STACK[0]).to(dtype), torch.randn(5, 16).to(dtype))
    with pytest.raises(VerificationError, match=r"model\.mlp: .* differs .* by \d"):
        rewrite(gm.graph, verify=True)
    assert OP not in targets(gm)


def test_verification_leaves_the_random_state_alone():
    gm, _ = trace(Stack(STACK[0]), torch.randn(5, 16))
    state = torch.get_rng_state()
    rewrite(gm.graph, verify=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_dump(tmp_path):
    for _ in range(2):
        gm, _ = trace(Stack(STACK[0]), torch.randn(5, 16))
        rewrite(gm.graph, dump_graph=tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [f"graph{i}.{when}.txt" for i in (0, 1) for when in ("after", "before")]
    before, after = (
        (tmp_path / "new" / f"graph1.{w}.txt").read_text() for w in ("before", "after")
    )
    assert "aten.bmm" in before
    assert "chunk_sparse_ffn" not in before
    assert "aten.bmm" not in after
    assert "chunk_sparse_ffn" in after


# --- The forms for others' pipelines --------------------------------------------------------------


def test_fx_pass_manager():
    module, x = Stack(STACK[0]), torch.randn(5, 16)
    gm, arguments = trace(module, x)
    result = PassManager(passes=[BlockFFNPass(verify=True)])(gm)
    assert result.modified
    assert_same(result.graph_module(*arguments), module(x))
    again = BlockFFNPass()(gm)
    assert again is not None
    assert not again.modified


def test_identity_for_inductor():
    identity = BlockFFNGraphPass().uuid()
    assert identity == BlockFFNGraphPass().uuid() is not None
    # Both must happen, and a graph from a cache runs no pass.
    assert BlockFFNGraphPass(verify=True).uuid() is None
    assert BlockFFNGraphPass(dump_graph="graphs").uuid() is None


def test_graph_pass_collects_results():
    graph_pass = BlockFFNGraphPass()
    for _ in range(2):
        gm, _ = trace(Stack(STACK[0]), torch.randn(5, 16))
        graph_pass(gm.graph)
    assert len(graph_pass.results) == 2
