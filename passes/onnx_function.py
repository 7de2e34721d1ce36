"""The operator ``com.blockffn::ChunkSparseFFN`` as a function in standard ONNX operators.

Inputs: ``x`` [T, H], ``scores`` [T, E], ``up`` [E, S, H], ``down`` [E, S, H] (the down weight of
each expert transposed) and, for gated experts, ``gate`` [E, S, H].  Output: ``y`` [T, H].
Attribute: ``act``.  A runtime that has no kernel for the operator runs this body.

The body loops over the experts that any token uses.  Their rows are gathered expert by expert, so
that the copy stays in the core's cache, and row by row, because runtimes share a gather among
threads by rows.  The sum starts at zero, or at NaN for a token that has one in ``x``, which may
use no expert.  Where many experts are used, two matrix products over all of them are faster.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx import parser

from blockffn_compile.layer import Activation
from blockffn_compile.passes.onnx_emit import Emitter, opset, weights
from blockffn_compile.passes.recognizer import BlockFFNMatch

DOMAIN, NAME, VERSION = "com.blockffn", "ChunkSparseFFN", 1

#: The oldest operator set that has what the body uses.
MIN_OPSET = 15

_ACTIVATIONS: dict[Activation, str] = {
    "relu": "a = Relu (u)",
    "silu": "half = Sigmoid (u)  a = Mul (u, half)",
    "gelu": """
        half_f = Constant <value_float = 0.5> ()  half = CastLike (half_f, u)
        root_f = Constant <value_float = 0.70710678118654752> ()  root = CastLike (root_f, u)
        one_f = Constant <value_float = 1.0> ()  one = CastLike (one_f, u)
        scaled = Mul (u, root)  erf = Erf (scaled)  shifted = Add (erf, one)
        twice = Mul (u, shifted)  a = Mul (twice, half)""",
}

# A zero in a shape stands for the operand's own size.  All that shapes of weights decide is
# constant, and runtimes compute it once; the limit is the same in all layers.
#
# Sparse if used * (S * H + 35000) * (T + 100) <= E * S * H * (T + 26): for few tokens, an expert in
# the loop costs up to 15/4 of what it costs among all of them, as its weights are copied; for many,
# little more.  Its few nodes cost as much again as 35000 elements of a weight.  (Fitted to the loop
# with ONNX Runtime 1.32 on two cores with AVX2, at S * H = 262144, at its worst: it takes up to a
# third longer for seconds at a time, and shall not be slower than the products even then.)  Both
# sides are divided by E * S * H * (T + 100), in units of 2**-16.
_BODY = """
<domain: "{domain}", overload: "{overload}", opset_import: ["": {opset}]>
{name} <act> ({inputs}) => (y)
{{
    zero = Constant <value_int = 0> ()
    zeros = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    weight_shape = Shape (up)
    row_shape = Shape <start = 2> (up)
    matrix = Concat <axis = 0> (last, row_shape)
    up_rows = Reshape (up, matrix)
    down_rows = Reshape (down, matrix)
    {gate_rows}
    is_used = Cast <to = 9> (scores)
    is_used_f = Cast <to = 1> (is_used)
    uses = ReduceSum <keepdims = 0> (is_used_f, zeros)
    used_1 = NonZero (uses)
    count = Size (used_1)
    expert_shape = Shape <start = 1> (up)
    expert_elements = ReduceProd <keepdims = 0> (expert_shape)
    elements = Size (up)
    overhead = Constant <value_int = 35000> ()
    expert_cost = Add (expert_elements, overhead)
    unit = Constant <value_int = 65536> ()
    expert_units = Mul (expert_cost, unit)
    share = Div (expert_units, elements)
    tokens = Shape <end = 1> (x)
    copying = Constant <value_int = 100> ()
    reading = Constant <value_int = 26> ()
    tokens_copied = Add (tokens, copying)
    tokens_read = Add (tokens, reading)
    read_units = Mul (tokens_read, unit)
    limit = Div (read_units, tokens_copied)
    share_of_used = Mul (count, share)
    few = LessOrEqual (share_of_used, limit)
    y = If (few) <
        then_branch = sparse () => (y_sparse) {{
            used = Reshape (used_1, last)
            size_1 = Shape <start = 1, end = 2> (up)
            size = Squeeze (size_1)
            one_row = Constant <value_int = 1> ()
            rows_of_first = Range (zero, size, one_row)
            y_shape = Shape (x)
            x_f = Cast <to = 1> (x)
            no_f = Constant <value_float = 0.0> ()
            nan_or_zero = Mul (x_f, no_f)
            of_token = ReduceSum (nan_or_zero, last)
            y_0 = Expand (of_token, y_shape)
            true_i = Constant <value_int = 1> ()
            true = Cast <to = 9> (true_i)
            y_f = Loop (count, true, y_0) <
                body = expert (int64 i, bool go, float[t, h] y_before) => (go_on, y_after) {{
                    go_on = Identity (go)
                    e = Gather <axis = 0> (used, i)
                    first_row = Mul (e, size)
                    rows = Add (rows_of_first, first_row)
                    up_e = Gather <axis = 0> (up_rows, rows)
                    {project_expert}
                    e_1 = Reshape (e, last)
                    score = Gather <axis = 1> (scores, e_1)
                    weighted = Mul (mid, score)
                    down_e = Gather <axis = 0> (down_rows, rows)
                    y_e = MatMul (weighted, down_e)
                    y_e_f = Cast <to = 1> (y_e)
                    y_after = Add (y_before, y_e_f)
                }}
            >
            y_sparse = CastLike (y_f, x)
        }},
        else_branch = dense () => (y_dense) {{
            {project_all}
            counts = Shape <end = 2> (up)
            width = ReduceProd (counts)
            by_expert = Concat <axis = 0> (zeros, counts)
            flat = Concat <axis = 0> (zeros, width)
            mid_by_expert = Reshape (mid, by_expert)
            score = Unsqueeze (scores, last)
            weighted_by_expert = Mul (mid_by_expert, score)
            weighted = Reshape (weighted_by_expert, flat)
            y_dense = MatMul (weighted, down_rows)
        }}
    >
}}
"""


def function(act: Activation, gated: bool, opset: int, overload: str = "") -> ir.Function:
    """The body for experts of one kind.

    Args:
        act: activation.
        gated: with the input ``gate``, which the activation is then applied to.
        opset: version of the standard operators, at least ``MIN_OPSET``; a model and its
            functions should agree on it.
        overload: tells bodies of one model apart.
    """

    def project(up: str, gate: str) -> str:
        argument = f"p = Gemm <transB = 1> (x, {up})  u = Gemm <transB = 1> (x, {gate})"
        if gated:
            return f"{argument} {_ACTIVATIONS[act]}  mid = Mul (a, p)"
        return f"u = Gemm <transB = 1> (x, {up}) {_ACTIVATIONS[act]}  mid = Identity (a)"

    gate_e = "gate_e = Gather <axis = 0> (gate_rows, rows)" if gated else ""
    text = _BODY.format(
        domain=DOMAIN,
        name=NAME,
        overload=overload,
        opset=opset,
        inputs="x, scores, up, down" + ", gate" * gated,
        gate_rows="gate_rows = Reshape (gate, matrix)" if gated else "",
        project_expert=f"{gate_e} {project('up_e', 'gate_e')}",
        project_all=project("up_rows", "gate_rows"),
    )
    return ir.serde.deserialize_function(parser.parse_function(text))


class FunctionEmitter(Emitter):
    """Replaces layers by the operator, and gives the model its function."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self._overloads: dict[tuple[str, bool], str] = {}

    def experts(self, match: BlockFFNMatch, x: ir.Value, scores: ir.Value) -> ir.Value:
        stored = [self.stored(weight, "esh") for weight in weights(match)]
        return self.op(
            NAME,
            *(x, scores, *stored),
            domain=DOMAIN,
            overload=self._overload(match),
            act=match.spec.act,
        )

    def _overload(self, match: BlockFFNMatch) -> str:
        """Makes sure that the model has the function, and names it.

        A model whose layers are all of one kind, which is the rule, needs no overloads.
        """
        spec, model = match.spec, self.model
        kind = spec.act, spec.gated
        if kind not in self._overloads:
            first = all((f.domain, f.name) != (DOMAIN, NAME) for f in model.functions.values())
            name = "" if first else f"gated_{spec.act}" if spec.gated else spec.act
            body = function(spec.act, spec.gated, opset(model), name)
            model.functions.setdefault(body.identifier(), body)
            model.opset_imports[DOMAIN] = VERSION
            # Versions of the file format that brought functions, and overloads of them.
            model.ir_version = max(model.ir_version, 10 if name else 8)
            self._overloads[kind] = name
        return self._overloads[kind]
