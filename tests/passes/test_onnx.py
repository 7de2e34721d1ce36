"""The ONNX pass on every spelling: what it matches, what it leaves, and that the numbers stay."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from blockffn_compile.passes import onnx as passes
from blockffn_compile.passes.onnx import BlockFFNPass, find, rewrite
from blockffn_compile.passes.onnx_function import DOMAIN, NAME
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, recognise
from blockffn_compile.passes.verification import VerificationError
from tests.passes.exporting import Bundle, export, export_script
from tests.passes.near_misses import NEAR_MISSES, OTHERS
from tests.passes.spellings import MATCHES, E, H, S, Spelling

#: What the older exporter has no translation for, or hides behind shapes computed in the graph.
NOT_IN_SCRIPT = {
    "router_threshold", "scores_expanded", "bmm_chain", "matmul_of_repeated_input",
    "linear_up_bmm_down", "matvec_as_inductor_decomposes_it", "scores_after_down", "gated",
    "gated_scores_on_up", "gated_silu_by_sigmoid", "norm_rms_functional",
    "norm_rms_functional_bfloat16", "norm_rms_without_weight", "input_3d_bmm", "bias_after_norm",
    "weights_cast", "gate_reads_another_input", "attention",
}  # fmt: skip
#: Exporters compute with constants, so that these become plain layers.
FOLDED = {"weights_cast", "weights_scaled", "gate_stored_otherwise"}
#: The newer exporter, by operator set: with fixed sizes, with symbolic ones, and not optimized.
VARIANTS = {18: {"optimize": False}, 20: {}, 23: {"dynamic": True}}
#: Exported at every operator set; the other spellings at one of them.
EVERYWHERE = {
    "einsum_as_published", "linear_functional", "norm_rms_functional", "norm_rms_handwritten",
    "norm_rms_functional_bfloat16", "norm_rms_handwritten_float16", "norm_sum", "act_gelu",
    "softmax", "bias_after_relu", "dense_ffn",
}  # fmt: skip
ALL = MATCHES + NEAR_MISSES + OTHERS


def named(*names: str) -> list[Spelling]:
    return [s for s in ALL if s.name in names]


def nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def elements(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.is_initializer()
    assert value.const_value is not None
    return value.const_value.numpy()


def check(model: ir.Model) -> onnx.ModelProto:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: ir.Model, *inputs: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(check(model).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def assert_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        limit = 4e-3 if b.dtype == torch.float16 else 1e-5
        np.testing.assert_allclose(a, b.numpy(), atol=limit, rtol=limit)


def assert_as_expected(spelling: Spelling, result, folded: bool = True) -> None:
    """The outcome that the spelling asks for, in the words of ONNX.

    With ``folded``, the exporter has computed scores that depend on constants alone.
    """
    if spelling in NEAR_MISSES and spelling.name not in FOLDED:
        assert isinstance(result, Declined)
        reason = re.sub(r"aten\.(\w+)", lambda m: m[1].capitalize(), spelling.expect["reason"])
        if spelling.name == "scores_of_experts_alone" and folded:
            reason = "scores enter the graph as data"
        assert reason in result.reason
        return
    assert isinstance(result, BlockFFNMatch), result
    if spelling in MATCHES:
        # Weights may be stored in another orientation.
        fields = spelling.expect.keys() - {"up_axes", "down_axes", "layout"}
        found = {f: getattr(result, f, getattr(result.spec, f, None)) for f in fields}
        assert found == {f: spelling.expect[f] for f in fields}
    assert (result.spec.hidden_size, result.spec.num_experts, result.spec.expert_size) == (H, E, S)


# --- The matrix of spellings ----------------------------------------------------------------------

in_script = [s for s in ALL if s.name not in NOT_IN_SCRIPT]


@pytest.mark.parametrize("spelling", in_script, ids=lambda s: s.name)
def test_older_exporter(spelling: Spelling):
    module, x = spelling.build()
    model = export_script(module, x)
    names = [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    find(model)  # names constants
    before = ir.serde.serialize_model(model)
    results = rewrite(model, verify=True)
    if spelling in OTHERS:
        assert results == []
    else:
        (result,) = results
        assert_as_expected(spelling, result, folded=False)
    matched = [r for r in results if isinstance(r, BlockFFNMatch)]
    assert len(nodes(model)) == len(matched)
    assert (ir.serde.serialize_model(model) == before) == (not matched)
    assert names == [
        [v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)
    ]
    if x.dtype in (torch.float32, torch.float16):  # ONNX Runtime has no bfloat16 on CPUs
        assert_same(run(model, x), module(x))


DYNAMIC = named("linear_functional", "input_3d_linear", "einsum_as_published", "input_3d_einsum")


@pytest.mark.parametrize("spelling", DYNAMIC, ids=lambda s: s.name)
def test_older_exporter_with_symbolic_sizes(spelling: Spelling):
    """One graph for every number of tokens, the shapes computed in it."""
    module, x = spelling.build()
    model = export_script(module, x, dynamic=True)
    (result,) = rewrite(model, verify=True)
    assert_as_expected(spelling, result)
    for tokens in (x, torch.cat((x, x.flip(-2)), dim=-2)):
        assert_same(run(model, tokens), module(tokens))


def spellings_at(opset: int) -> list[Spelling]:
    # (The newer exporter refuses a module that returns a value twice.)
    exported = [s for s in ALL if s.name != "projection_used_twice"]
    share = exported[list(VARIANTS).index(opset) :: len(VARIANTS)]
    return [s for s in exported if s in share or s.name in EVERYWHERE]


@pytest.mark.parametrize("opset", VARIANTS)
def test_newer_exporter(opset):
    spellings = spellings_at(opset)
    bundle = Bundle(spellings)
    model = export(bundle, bundle.inputs, opset, **VARIANTS[opset])
    outputs = [value.name for value in model.graph.outputs]
    results = {result.name: result for result in rewrite(model, verify=True)}
    check(model)
    assert [value.name for value in model.graph.outputs] == outputs
    matched = 0
    for i, spelling in enumerate(spellings):
        result = results.pop(f"layers.{i}", None)
        if spelling in OTHERS:
            assert result is None
        elif result is None:  # the exporter dropped the module's name when it fused a bias
            assert spelling.name in ("up_bias", "down_bias")
            numbered = next(name for name in results if name.startswith("layer "))
            assert_as_expected(spelling, results.pop(numbered))
        elif not (opset == 18 and spelling.name in (*FOLDED, "scores_of_experts_alone")):
            assert_as_expected(spelling, result)
        matched += isinstance(result, BlockFFNMatch)
    assert not results
    assert len(nodes(model)) == matched > 10


# --- Whole graphs ---------------------------------------------------------------------------------


def layer_model(name: str = "linear_functional") -> ir.Model:
    (spelling,) = named(name)
    return export_script(*spelling.build())


def test_nothing_else_changes():
    bundle = Bundle(named("einsum_as_published", "dense_ffn", "softmax"))
    model = export(bundle, bundle.inputs)
    before = {n.name: str(n) for n in model.graph if "layers.0" not in str(n.metadata_props)}
    metadata, version = dict(model.metadata_props), model.ir_version
    rewrite(model)
    after = {n.name: str(n) for n in model.graph}
    assert before.items() <= after.items()
    assert (model.metadata_props, model.ir_version) == (metadata, version)
    (node,) = nodes(model)
    assert "layers.0" in node.metadata_props["pkg.torch.onnx.name_scopes"]


def test_weights_become_initializers_of_their_own_layout():
    model = layer_model()
    stored = [elements(v) for v in model.graph.initializers.values()]
    rewrite(model)
    (node,) = nodes(model)
    up, down = map(elements, node.inputs[2:])
    assert up.shape == down.shape == (E, S, H)
    assert len(model.graph.initializers) == 3  # the router's, up and down: nothing unused is left
    for weight in (up.reshape(E * S, H).T, down.reshape(E * S, H)):
        assert any(np.array_equal(weight, array) for array in stored)


def test_a_second_rewrite_finds_nothing():
    model = layer_model()
    assert rewrite(model)
    once = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    assert rewrite(model) == []
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == once


def test_one_function_for_layers_of_one_kind_and_overloads_for_others():
    bundle = Bundle(named("einsum_both", "bmm_chain", "act_gelu", "gated"))
    model = export(bundle, bundle.inputs)
    results = rewrite(model, verify=True)
    assert all(isinstance(r, BlockFFNMatch) for r in results)
    assert [n.overload for n in nodes(model)] == ["", "", "gelu", "gated_silu"]
    assert [f.overload for f in model.functions.values()] == ["", "gelu", "gated_silu"]
    assert model.ir_version >= 10
    expected = [y for outputs in bundle(*bundle.inputs) for y in outputs]
    assert_same(run(model, *bundle.inputs), expected)


def test_layers_that_read_each_other_and_share_weights():
    (spelling,) = named("input_3d_linear")
    module, x = spelling.build()
    model = export(torch.nn.Sequential(module, Unpack(), module), (x,))
    results = rewrite(model, verify=True)
    assert [type(r) for r in results] == [BlockFFNMatch, BlockFFNMatch]
    first, second = nodes(model)
    assert first.inputs[2] is second.inputs[2]
    assert_same(run(model, x), module(module(x)[0]))


class Unpack(torch.nn.Module):
    def forward(self, outputs):
        return outputs[0]


# --- Graphs that stay as they are -----------------------------------------------------------------


def declined(model: ir.Model) -> str:
    find(model)  # names constants
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (result,) = rewrite(model)
    assert isinstance(result, Declined)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before
    return result.reason


def test_old_operator_sets_are_declined():
    (spelling,) = named("einsum_as_published")
    model = export_script(*spelling.build(), opset=13)
    assert "operator set 13; convert it to 15 or newer" in declined(model)


def test_weights_that_a_caller_may_replace_are_declined():
    model = layer_model()
    model.graph.inputs.extend(model.graph.initializers.values())
    assert declined(model) == passes.INPUTS


def test_a_second_user_within_a_subgraph():
    model = layer_model("input_of_one_token")
    activation = next(n for n in model.graph if n.op_type == "Mul").outputs[0]
    branch = ir.Graph([], [], nodes=[ir.node("Identity", [activation])], name="branch")
    branch.outputs.append(branch[0].outputs[0])
    condition = ir.val("go", ir.DataType.BOOL, [])
    model.graph.inputs.append(condition)
    chosen = ir.node("If", [condition], {"then_branch": branch, "else_branch": branch.clone(True)})
    chosen.outputs[0].shape, chosen.outputs[0].dtype = activation.shape, ir.DataType.FLOAT
    model.graph.append(chosen)
    model.graph.outputs.append(chosen.outputs[0])
    assert declined(model) == "the intermediate activations have a second user"


def test_shapes_that_nothing_tells():
    model = layer_model()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = None
    assert find(model) == []


# --- Verification and pipelines -------------------------------------------------------------------


def test_verification_catches_a_wrong_rewrite(monkeypatch):
    def misread(values):
        return [
            dataclasses.replace(match, name="model.mlp", spec=match.spec.replace(act="relu"))
            for match in recognise(values)
            if isinstance(match, BlockFFNMatch)
        ]

    monkeypatch.setattr(passes, "recognise", misread)
    model = layer_model()
    with pytest.raises(VerificationError, match=r"model\.mlp: .* differs .* by \d"):
        rewrite(model, verify=True)
    assert not nodes(model)


def test_pass_pipeline():
    model = layer_model()
    own = BlockFFNPass(verify=True)
    result = ir.passes.Sequential(own, ir.passes.common.RemoveUnusedOpsetsPass())(model)
    assert result.modified
    assert len(own.results) == 1
    assert not own(model).modified
    check(model)
