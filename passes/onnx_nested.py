"""BlockFFN layers that are not in a model's main graph, where rewrites do not reach them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage
from onnx_ir.passes.common import InlinePass

from blockffn_compile.passes.onnx_function import DOMAIN
from blockffn_compile.passes.onnx_ops import lower
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, recognise

SUBGRAPH = "it is within {}, where layers are not rewritten; move it to the main graph"
FUNCTION = "it is within a function; inline it, for example with onnx.inliner"


def nested(model: ir.Model) -> list[Declined]:
    """Layers within control flow and functions, each with what to do about it."""
    found = []
    captured = analyze_implicit_usage(model.graph)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graph = attribute.as_graph()
                layers = _layers(_standing_alone(graph, captured[graph], model))
                found += [Declined(m.name, SUBGRAPH.format(node.op_type)) for m in layers]
    if any(domain != DOMAIN for domain, _, _ in model.functions):
        own = {value.name for node in model.graph for value in node.outputs}
        inlined = model.clone()
        InlinePass()(inlined)
        calls = {
            value.name
            for node in model.graph
            if node.op_identifier() in model.functions
            for value in node.outputs
        }
        found += [
            Declined(match.name, FUNCTION)
            for match in _layers(inlined)
            if (name := match.output.value.source.name) in calls or name not in own
        ]
    return found


def _layers(model: ir.Model) -> list[BlockFFNMatch]:
    return [match for match in recognise(lower(model)) if isinstance(match, BlockFFNMatch)]


def _standing_alone(graph: ir.Graph, captured: set[ir.Value], model: ir.Model) -> ir.Model:
    """A model of the subgraph, with what it reads from around it as inputs."""
    proto = ir.serde.serialize_graph(graph)
    proto.input.extend(map(ir.serde.serialize_value, captured))
    copy = ir.serde.deserialize_graph(proto)
    copy.opset_imports.update(model.opset_imports)
    return ir.Model(copy, ir_version=model.ir_version)
