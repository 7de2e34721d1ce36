"""The function body against the reference layer in fp64, in ONNX Runtime."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from blockffn_compile.layer import experts_reference
from blockffn_compile.passes.onnx_function import DOMAIN, MIN_OPSET, NAME, function

#: Of the second size, up to two active experts make the loop pay (up to three of very many tokens);
#: of the first, none do.
SIZES = {"small": (4, 8, 16), "large": (6, 256, 512)}
#: Numbers of tokens; the work of large layers is that of the small ones, and slow.
TOKENS = {"small": (1, 2, 7, 8, 33, 64, 200), "large": (1, 7, 64)}
TYPES = {
    np.dtype(np.float16): "float16",
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
}


class Layer:
    """Weights and a model of one node."""

    def __init__(self, size, act="silu", gated=False, dtype="float32", opset=20):
        e, s, h = self.sizes = SIZES[size]
        self.act, self.dtype = act, np.dtype(dtype)
        rng = np.random.default_rng(0)
        self.weights = [
            (rng.standard_normal((e, s, h)) * n**-0.5).astype(dtype) for n in (h, s, h)[: 2 + gated]
        ]
        kind = TYPES[self.dtype]
        names = ["up", "down", "gate"][: 2 + gated]
        declared = ", ".join(f"{kind}[{e}, {s}, {h}] {name}" for name in names)
        self.model = onnx.parser.parse_model(f"""
            <ir_version: 10, opset_import: ["": {opset}, "{DOMAIN}": 1]>
            layer ({kind}[t, {h}] x, {kind}[t, {e}] scores) => ({kind}[t, {h}] y) <{declared}> {{
                y = {DOMAIN}.{NAME} <act = "{act}"> (x, scores, {", ".join(names)})
            }}""")
        for name, weight in zip(names, self.weights, strict=True):
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
        self.model.functions.append(ir.serde.serialize_function(function(act, gated, opset)))

    def session(self):
        return onnxruntime.InferenceSession(self.model.SerializeToString())

    def inputs(self, tokens, active):
        """Random tokens; each uses some of the first ``active`` experts, the first one all."""
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, self.sizes[2]))
        scores = rng.uniform(-0.5, 1, (tokens, self.sizes[0])).clip(min=0)
        scores[:1] = 0.5
        scores[:, active:] = 0
        return {"x": x.astype(self.dtype), "scores": scores.astype(self.dtype)}

    def oracle(self, inputs, dtype=torch.float64):
        x, scores, up, down, *gate = (
            torch.from_numpy(a).to(dtype) for a in (*inputs.values(), *self.weights)
        )
        y = experts_reference(x, scores, up, down.mT, self.act, *gate)
        return y.double().numpy()


def error(actual, exact):
    return np.linalg.norm(actual.astype(np.float64) - exact)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("act", "gated"), list(itertools.product(["silu", "relu", "gelu"], [0, 1]))
)
def test_error_is_within_that_of_the_plain_layer(act, gated, size, dtype):
    layer = Layer(size, act, bool(gated), dtype)
    session = layer.session()
    for tokens, active in itertools.product(TOKENS[size], (1, 2, layer.sizes[0])):
        inputs = layer.inputs(tokens, active)
        (y,) = session.run(None, inputs)
        exact = layer.oracle(inputs)
        plain = layer.oracle(inputs, getattr(torch, dtype))
        assert y.dtype == dtype
        assert y.shape == (tokens, layer.sizes[2])
        # One token and one expert leave so few roundings that their ratio is one of chance.
        assert error(y, exact) <= 1.5 * error(plain, exact) + 2e-7 * np.linalg.norm(exact)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opset", [MIN_OPSET, 17, 18, 20, 21, 23])
def test_every_operator_set(size, opset):
    layer = Layer(size, "gelu", opset=opset)
    onnx.checker.check_model(layer.model, full_check=True)
    inputs = layer.inputs(5, 2)
    (y,) = layer.session().run(None, inputs)
    again: Any
    (again,) = ReferenceEvaluator(layer.model).run(None, inputs)
    exact = layer.oracle(inputs)
    for actual in (y, again):
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", SIZES)
def test_no_expert_and_no_token(size, dtype):
    layer = Layer(size, dtype=dtype)
    session = layer.session()
    inputs = layer.inputs(3, 0)
    inputs["scores"][1] = -0.0
    (y,) = session.run(None, inputs)
    assert (y == 0).all()
    (y,) = session.run(None, layer.inputs(0, 0))
    assert y.shape == (0, layer.sizes[2])


@pytest.mark.parametrize("size", SIZES)
def test_nan_of_a_token_without_experts(size):
    layer = Layer(size)
    inputs = layer.inputs(3, 0)
    inputs["x"][1, 0] = math.nan
    (y,) = layer.session().run(None, inputs)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert (y[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["x", "scores"])
def test_nan_stays_in_its_token(size, where, dtype):
    layer = Layer(size, dtype=dtype)
    inputs = layer.inputs(3, 1)
    inputs[where][1, 0] = math.nan
    (y,) = layer.session().run(None, inputs)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert not np.isnan(y[[0, 2]]).any()


@pytest.mark.parametrize(("tokens", "most"), [(4, 1), (200, 3)])
def test_experts_that_no_token_uses_are_not_read(tokens, most):
    """The loop's branch; with many experts in use the dense one multiplies them by zero."""
    layer = Layer("large")
    layer.weights[0][most + 1 :] = math.nan
    layer.model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(layer.weights[0], "up"))
    session = layer.session()
    (sparse,) = session.run(None, layer.inputs(tokens, most))
    (dense,) = session.run(None, layer.inputs(tokens, most + 1))
    assert np.isfinite(sparse).all()
    assert np.isnan(dense).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_score_counts(size, dtype):
    layer = Layer(size, dtype=dtype)
    layer.weights[0][1] = math.nan
    layer.model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(layer.weights[0], "up"))
    inputs = layer.inputs(3, 1)
    inputs["scores"][1, 1] = np.finfo(dtype).smallest_subnormal
    (y,) = layer.session().run(None, inputs)
    assert np.isnan(y[1]).all()
