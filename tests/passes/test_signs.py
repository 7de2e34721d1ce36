"""Signs of values that are built by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from blockffn_compile.passes.onnx_ops import lower
from blockffn_compile.passes.signs import signs

MIXED = "w = Constant <value_floats = [1.0, -2.0, 0.0, -4.0]> ()"
CASES = {
    "relu": ("y = Relu (x)", 1),
    "negated": ("r = Relu (x) y = Neg (r)", None),
    "unknown": ("y = Tanh (x)", None),
    "square": ("y = Mul (x, x)", 1),
    "weights": (f"{MIXED} r = Relu (x) y = Mul (r, w)", [1, -1, 0, -1]),
    "divided": (f"{MIXED} r = Relu (x) y = Div (w, r)", [1, -1, 0, -1]),
    "scaled": (
        f"{MIXED} c = Constant <value_float = -2.0> () r = Relu (x) p = Mul (r, w) y = Mul (c, p)",
        [-1, 1, 0, 1],
    ),
    "shifted": (f"{MIXED} r = Relu (x) p = Mul (r, w) y = Add (p, r)", None),
    "shifted upwards": (
        "c = Constant <value_float = 0.1> () r = Relu (x) y = Add (r, c)",
        1,
    ),
    "shifted downwards": (
        "c = Constant <value_float = -0.1> () r = Relu (x) y = Add (r, c)",
        None,
    ),
    "subtracted": ("r = Relu (x) s = Exp (x) y = Sub (s, r)", None),
    "masked": (
        "z = Constant <value_float = 0.0> () r = Relu (x) m = Greater (x, z) y = Where (m, r, z)",
        1,
    ),
    "mask alone": ("z = Constant <value_float = 0.0> () m = Greater (x, z) y = Where (m, x, z)",
                   None),
    "cast mask": (
        "z = Constant <value_float = 0.0> () m = Greater (x, z) y = Cast <to = 1> (m)",
        1,
    ),
    "maximum": ("c = Constant <value_float = 0.5> () y = Max (x, c)", 1),
    "flattened": (
        f"{MIXED} s = Constant <value_ints = [-1, 4]> () r = Relu (x) p = Mul (r, w) "
        "y = Reshape (p, s)",
        [1, -1, 0, -1],
    ),
    "merged": (
        f"{MIXED} s = Constant <value_ints = [-1]> () r = Relu (x) p = Mul (r, w) "
        "y = Reshape (p, s)",
        None,
    ),
    "moved": (
        f"{MIXED} r = Relu (x) p = Mul (r, w) y = Transpose <perm = [0, 2, 1]> (p)",
        [[1], [-1], [0], [-1]],
    ),
    "summed": ("a = Constant <value_ints = [1]> () r = Relu (x) y = ReduceSum (r, a)", 1),
    "summed with weights": (
        f"{MIXED} a = Constant <value_ints = [2]> () r = Relu (x) p = Mul (r, w) "
        "y = ReduceSum (p, a)",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_signs(name):
    text, want = CASES[name]
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[2, 3, 4] x) => (float y) {{ {text} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = lower(ir.serde.deserialize_model(proto))[-1].inputs
    known = signs(output)
    if want is None:
        assert known is None
    else:
        assert known is not None
        assert known.ndim == len(output.shape)
        shape = np.broadcast_shapes(known.shape, np.shape(want))
        assert np.array_equal(np.broadcast_to(known, shape), np.broadcast_to(want, shape))
