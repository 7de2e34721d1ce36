"""Layers within control flow and functions are reported, and stay as they are."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.passes.onnx import rewrite
from blockffn_compile.passes.recognizer import Declined
from tests.passes.exporting import export_script


def layer_model() -> ir.Model:
    layer = BlockFFN(BlockFFNSpec(16, 4, 8, layout="block_linear")).requires_grad_(False)
    return export_script(layer, torch.zeros(5, 16))


def inside(kind: str, captures: bool) -> ir.Model:
    """The layer as a branch, the body of a loop or a function; ``captures``: its weights and input
    stay outside."""
    model = layer_model()
    graph = model.graph
    (x,), (y,) = graph.inputs, graph.outputs
    weights = list(graph.initializers.values())
    nodes = list(graph)
    if kind == "function":
        graph.inputs.extend(weights)
        for weight in weights:
            graph.initializers.pop(weight.name or "")
        function = ir.Function("other", "FFN", graph=graph, attributes={})
        function.opset_imports[""] = 17
        new_x = ir.val("x", ir.DataType.FLOAT, [5, 16])
        stored = [ir.val(w.name, w.dtype, w.shape, const_value=w.const_value) for w in weights]
        call = ir.node("FFN", [new_x, *stored], domain="other", name="call")
        call.outputs[0].type, call.outputs[0].shape = y.type, y.shape
        main = ir.Graph(
            [new_x], call.outputs, nodes=[call], initializers=stored,
            opset_imports={"": 17, "other": 1}, name="main",
        )  # fmt: skip
        return ir.Model(main, ir_version=10, functions=[function])
    for node in nodes:
        graph.remove(node)
    graph.outputs.clear()
    condition = ir.val("go", ir.DataType.BOOL, [])
    if not captures:
        for weight in weights:
            graph.initializers.pop(weight.name or "")
    branch = ir.Graph([], [y], nodes=nodes, initializers=[] if captures else weights, name="then")
    other = ir.Graph([], [], nodes=[ir.node("Neg", [x], name="negated")], name="else")
    other.outputs.append(other[0].outputs[0])
    chosen = ir.node("If", [condition], {"then_branch": branch, "else_branch": other}, name="if")
    chosen.outputs[0].type, chosen.outputs[0].shape = y.type, y.shape
    graph.append(chosen)
    graph.outputs.append(chosen.outputs[0])
    graph.inputs.append(condition)
    return model


@pytest.mark.parametrize(
    ("kind", "captures", "reason"),
    [
        ("branch", True, "it is within If, where layers are not rewritten"),
        ("branch", False, "it is within If, where layers are not rewritten"),
        ("function", False, "it is within a function; inline it"),
    ],
)
def test_is_reported(kind, captures, reason):
    model = inside(kind, captures)
    rewrite(model.clone())  # names constants
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (result,) = rewrite(model)
    assert isinstance(result, Declined)
    assert reason in result.reason
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_a_rewritten_layer_is_not_reported_again():
    model = layer_model()
    assert len(rewrite(model)) == 1
    assert rewrite(model) == []
