"""Rules against ONNX's reference evaluator, and random graphs that must stay as they are."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from blockffn_compile.passes.onnx import BlockFFNPass, find
from blockffn_compile.passes.onnx_ops import lower
from blockffn_compile.passes.view import Value

NUMPY: dict[str, Any] = {
    "mul": np.multiply, "add": np.add, "sub": np.subtract, "matmul": np.matmul,
    "maximum": np.maximum, "minimum": np.minimum, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "exp": np.exp, "tanh": np.tanh, "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x, "relu": lambda x: x.clip(min=0), "div": np.divide,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": np.vectorize(math.erf),
}  # fmt: skip


def evaluate(value: Value, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the view says that ``value`` is."""
    operands = [evaluate(v, inputs) for v in value.inputs]
    attrs, shape = value.attrs, cast(tuple[int, ...], value.shape)
    if value.op == "input":
        return inputs[value.name]
    if value.op == "constant":
        return attrs["tensor"].numpy().reshape(shape)
    if value.op == "scalar":
        return np.full(shape, attrs["value"])
    if value.op == "reshape":
        return operands[0].reshape(shape)
    if value.op == "permute":
        return operands[0].transpose(attrs["perm"])
    if value.op == "expand":
        return np.broadcast_to(operands[0], shape)
    if value.op in ("sum", "mean", "amax"):
        keep = len(shape) == operands[0].ndim
        return getattr(np, value.op)(operands[0], axis=attrs["axes"], keepdims=keep)
    if value.op == "pow":
        return operands[0] ** attrs["exponent"]
    if value.op == "clamp":
        return operands[0].clip(attrs["min"], attrs["max"])
    return NUMPY[value.op](*operands)


SHAPES = {"a": (3, 4), "b": (4, 5), "c": (5,), "d": (3, 5), "w": (2, 4, 5), "x": (1, 4)}
CASES = {
    "gemm": "z = Gemm (a, b)",
    "gemm bias": "z = Gemm (a, b, c)",
    "gemm alpha": "z = Gemm <alpha = 0.5> (a, b, d)",
    "gemm transposed": "z = Gemm <transA = 1, transB = 1> (b, a)",
    "einsum": 'z = Einsum <equation = "th,hs->ts"> (a, b)',
    "einsum implicit": 'z = Einsum <equation = "th, hs"> (a, b)',
    "einsum batched": 'z = Einsum <equation = "th,ehs->ets"> (a, w)',
    "einsum transposed": 'z = Einsum <equation = "th,ehs->est"> (a, w)',
    "einsum all summed": 'z = Einsum <equation = "th,th->"> (a, a)',
    "einsum nothing summed": 'z = Einsum <equation = "th,s->tsh"> (a, c)',
    "einsum of three": 'z = Einsum <equation = "th,ehs,s->te"> (a, w, c)',
    "einsum of one": 'z = Einsum <equation = "ehs->se"> (w)',
    "einsum broadcast": 'z = Einsum <equation = "th,th->ht"> (a, x)',
    "transpose": "z = Transpose (w)",
    "transpose perm": "z = Transpose <perm = [1, 0, 2]> (w)",
    "reduce": "axes = Constant <value_ints = [-1]> () z = ReduceSum (w, axes)",
    "reduce all": "z = ReduceMean <keepdims = 0> (w)",
    "reduce max": "axes = Constant <value_ints = [0, 2]> () z = ReduceMax <keepdims = 0> (w, axes)",
    "reduce nothing": "z = ReduceSum <noop_with_empty_axes = 1> (w)",
    "inverse root": "p = Abs (a) q = Sqrt (p) z = Reciprocal (q)",
    "inverse root by division":
        "o = Constant <value_float = 1.0> () p = Exp (a) q = Sqrt (p) z = Div (o, q)",
    "power": "e = Constant <value_float = 2.0> () z = Pow (a, e)",
    "clip": "l = Constant <value_float = -0.5> () z = Clip (a, l)",
    "silu": "p = Sigmoid (a) z = Mul (a, p)",
    "expand": "s = Constant <value_ints = [2, 3, 4]> () z = Expand (x, s)",
    "tile": "r = Constant <value_ints = [3, 1]> () z = Tile (x, r)",
    "tile that repeats": "r = Constant <value_ints = [2, 1]> () z = Tile (a, r)",
    "slice whole":
        "s = Constant <value_ints = [0]> () e = Constant <value_ints = [9]> () z = Slice (a, s, e)",
    "unsqueeze": "i = Constant <value_ints = [1]> () z = Unsqueeze (a, i)",
    "extrema": "p = Max (a, x) z = Min (p, a)",
}  # fmt: skip
#: Of these the view knows only that it does not know them.
OPAQUE = {"tile that repeats", "reduce nothing"}


@pytest.mark.parametrize("name", CASES)
def test_rules_say_what_operators_compute(name):
    declared = ", ".join(f"float[{', '.join(map(str, s))}] {n}" for n, s in SHAPES.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({declared}) => (float z) {{ {CASES[name]} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    (output,) = lower(ir.serde.deserialize_model(proto))[-1].inputs
    if name in OPAQUE:
        assert output.op == "other"
        return
    want: Any
    (want,) = ReferenceEvaluator(proto).run(None, inputs)
    got = evaluate(output, inputs)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "node",
    [
        'Einsum <equation = "tt->t"> (q)',
        'Einsum <equation = "...h->..."> (a)',
        "Gemm <beta = 0.5> (a, b, c)",
        "Pow (a, a)",
        "Mean (a, a)",
        "CumSum (a, i)",
        "ReduceSum (a, j)",
        "ReduceSum (i, j)",
        "ReduceSum <axes = 0.5> (a)",
        'Transpose <perm = "x"> (a)',
        'Gemm <alpha = "x"> (a, b)',
    ],
)
def test_what_is_not_known_is_opaque(node):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[3, 4] a, float[4, 5] b, float[5] c, '
        f"float[3, 3] q) => (float z) {{ i = Constant <value_int = 0> () "
        f"j = Constant <value_ints = [2]> () z = {node} }}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = lower(ir.serde.deserialize_model(proto))[-1].inputs
    assert output.op == "other"


def test_a_product_of_numbers_is_opaque():
    """Though the file says what its shape is."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[] s) => (float[] z) { z = Gemm (s, s) }'
    )
    (output,) = lower(ir.serde.deserialize_model(proto))[-1].inputs
    assert output.op == "other"


# --- Random graphs --------------------------------------------------------------------------------

UNARY = ["Relu", "Sigmoid", "Tanh", "Exp", "Erf", "Neg", "Abs", "Sqrt", "Identity", "Cos",
         "Reciprocal", "Softmax", "LayerNormalization", "NoSuchOperator"]  # fmt: skip
BINARY = ["Mul", "Add", "Sub", "Div", "Max", "Min", "MatMul", "Gemm", "Pow", "Concat"]
MOVES = ["Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "ReduceSum", "ReduceMean",
         "Slice", "Split", "Gather", "Expand", "Cast", "Where", "Einsum", "Shape",
         "If"]  # fmt: skip


@st.composite
def graphs(draw) -> ir.Model:
    """Operators on whatever values there are: many of them do not even fit together."""
    sizes = st.sampled_from([1, 2, 4, 8, "t", None])
    shapes = st.none() | st.lists(sizes, max_size=3)
    values = [
        ir.val(f"in{i}", ir.DataType.FLOAT, draw(shapes)) for i in range(draw(st.integers(1, 3)))
    ]
    inputs = list(values)
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 20}, name="random")
    for i in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=3))
        kind = draw(st.sampled_from([np.float32, np.int64, np.bool_]))
        array = np.random.default_rng(i).integers(-1, 3, shape).astype(kind)
        tensor = ir.tensor(array, name=f"w{i}")
        weight = ir.val(tensor.name, tensor.dtype, shape, const_value=tensor)
        graph.register_initializer(weight)
        values.append(weight)
    for i in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from(UNARY + BINARY + MOVES))
        arity = 2 if op in BINARY else 1 if op in UNARY else draw(st.integers(1, 3))
        operands = [draw(st.sampled_from(values)) for _ in range(arity)]
        attributes: dict[str, Any] = {}
        if op == "Einsum":
            attributes["equation"] = draw(st.sampled_from(["ab,bc->ac", "a,a->", "abc->cab", "x"]))
        elif op in ("Transpose",) and draw(st.booleans()):
            attributes["perm"] = draw(st.permutations(range(3)))
        elif op == "Cast":
            attributes["to"] = draw(st.sampled_from([1, 7, 9, 10]))
        elif op == "If":
            inner = ir.node("Neg", [operands[0]], name=f"inner{i}")
            branch = ir.Graph([], inner.outputs, nodes=[inner], name=f"branch{i}")
            attributes = {"then_branch": branch, "else_branch": branch.clone(True)}
        node = ir.node(op, operands, attributes, num_outputs=2 if op == "Split" else 1)
        graph.append(node)
        for output in node.outputs:
            if draw(st.booleans()):
                output.dtype, shape = ir.DataType.FLOAT, draw(shapes)
                output.shape = None if shape is None else ir.Shape(shape)
            values.append(output)
    made = [v for v in values if v.producer() is not None]
    graph.outputs.extend(draw(st.lists(st.sampled_from(made), min_size=1, unique=True)))
    return ir.Model(graph, ir_version=10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs_stay_as_they_are(model):
    find(model)  # names constants
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    own = BlockFFNPass(verify=True)
    assert not own(model).modified
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before
