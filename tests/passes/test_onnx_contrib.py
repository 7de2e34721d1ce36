"""Layers as ``MoE`` and ``QMoE``, run in ONNX Runtime against fp64."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.passes.onnx import BlockFFNPass, rewrite
from blockffn_compile.passes.onnx_contrib import quantise
from blockffn_compile.passes.recognizer import Declined
from blockffn_compile.passes.verification import QuantisedMatch
from blockffn_compile.report import report
from tests.passes.exporting import export_script
from tests.passes.spellings import MATCHES

TOKENS = (1, 2, 7, 8, 33, 64, 200)
SPECS = {
    "rms": BlockFFNSpec(64, 6, 32, layout="block_linear"),
    "sum": BlockFFNSpec(32, 6, 32, layout="block_linear", norm="sum", act="relu"),
    "gated": BlockFFNSpec(24, 6, 12, layout="block_linear", norm="none", gated=True),
}


def make_layer(name: str, dtype: torch.dtype = torch.float32) -> BlockFFN:
    """With norm weights of both signs."""
    torch.manual_seed(0)
    layer = BlockFFN(SPECS[name])
    if layer.router_norm is not None:
        layer.router_norm.weight.data = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.25, 1.0])
    return layer.requires_grad_(False).to(dtype)


def copy_of(layer: BlockFFN, change=lambda name, weight: weight) -> BlockFFN:
    """In fp64."""
    copy = BlockFFN(layer.spec).double().requires_grad_(False)
    copy.load_state_dict({k: change(k, v.double()) for k, v in layer.state_dict().items()})
    return copy


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == "com.microsoft"]


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.serde.serialize_model(model)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def dequantised(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1)
    e, n = codes.shape[:2]
    groups = codes.astype(np.float64).reshape(e, n, scales[0, 0].size, -1) - (1 << (bits - 1))
    return (groups * scales.reshape(e, n, -1, 1)).reshape(e, n, -1)


def rounded(layer: BlockFFN, bits: int) -> BlockFFN:
    """The layer in fp64, its experts' weights as ``bits`` bits hold them."""
    h, e, s = layer.spec.hidden_size, layer.spec.num_experts, layer.spec.expert_size
    block = 32 if bits == 4 and h % 32 == s % 32 == 0 else None

    def change(name, weight):
        if name not in ("up_proj", "down_proj", "gate_proj"):
            return weight
        down = name == "down_proj"
        rows = weight.reshape(h, e, s).permute(1, 0, 2) if down else weight.reshape(e, s, h)
        new = torch.from_numpy(dequantised(*quantise(rows.numpy(), bits, block), bits))
        return (new.permute(1, 0, 2) if down else new).reshape(weight.shape)

    return copy_of(layer, change)


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [
        (None, torch.float32),
        ("int8", torch.float32),
        ("int8", torch.float16),
        ("int4", torch.float32),
        ("int4", torch.float16),
    ],
)
@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name, quantize, dtype):
    """Any number of tokens; all experts off, some, and all on.  Quantised, the only error is that
    of the weights."""
    layer = make_layer(name, dtype)
    model = export_script(layer, torch.zeros(3, layer.spec.hidden_size, dtype=dtype), dynamic=True)
    (result,) = rewrite(model, flavour="contrib", quantize=quantize, verify=True)
    assert operators(model) == ["QMoE" if quantize else "MoE"]
    assert isinstance(result, QuantisedMatch) == bool(quantize)
    exact = rounded(layer, int(quantize[3:])) if quantize else copy_of(layer)
    session = session_of(model)
    directions = layer.router_proj.weight.float().pinverse().sum(1).to(dtype)
    for tokens, experts in itertools.product(TOKENS, ("off", "some", "on")):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, layer.spec.hidden_size, generator=generator).to(dtype)
        if experts != "some":  # every logit is the same number
            x = directions.expand(tokens, -1).contiguous() * (1 if experts == "on" else -1)
        active = (layer.scores(layer.router_proj(x)) != 0).float().mean().item()
        assert (active in (0, 1)) == (experts != "some") or tokens < 7
        want = exact(x.double())
        eager = (layer(x).double() - copy_of(layer)(x.double())).norm()
        (y,) = session.run(None, {"x": x.numpy()})
        # The logarithm of a score of 1e-3 has seven times the rounding error of the score.
        limit = 1.5 * eager + (2e-7 if dtype == torch.float32 else 2e-3) * want.norm()
        assert (torch.from_numpy(y).double() - want).norm() <= limit


@pytest.mark.parametrize("name", SPECS)
def test_reports_what_quantising_costs(name):
    layer = make_layer(name)
    x = torch.randn(50, layer.spec.hidden_size)
    model = export_script(layer, x)
    errors = []
    for quantize in ("int8", "int4"):
        copy = model.clone()
        (result,) = report(rewrite(copy, flavour="contrib", quantize=quantize)).layers
        assert f"{quantize}: error {result.error:.1%}" in result.description
        (y,) = session_of(copy).run(None, {"x": x.numpy()})
        error = (torch.from_numpy(y) - layer(x)).abs().max() / layer(x).abs().max()
        assert 0.3 * error <= result.error <= 3 * error
        errors.append(result.error)
    assert 0 < 5 * errors[0] < errors[1] < 0.5


def test_nan_stays_in_its_token():
    layer = make_layer("rms")
    x = torch.randn(4, 64)
    for quantize in (None, "int8"):
        model = export_script(layer, x)
        rewrite(model, flavour="contrib", quantize=quantize)
        bad = x.clone()
        bad[2, 5] = torch.nan
        (y,) = session_of(model).run(None, {"x": bad.numpy()})
        assert np.isnan(y).all(axis=1).tolist() == [False, False, True, False], quantize


@pytest.mark.parametrize(
    ("name", "quantize", "reason"),
    [
        ("act_gelu", "int8", "approximate GELU by tanh"),
        ("norm_rms_handwritten_float16", None, "route float16 less exactly"),
    ],
)
def test_layers_that_do_not_map_exactly_stay(name, quantize, reason):
    (spelling,) = (s for s in MATCHES if s.name == name)
    model = export_script(*spelling.build())
    rewrite(model.clone())  # names constants
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    own = BlockFFNPass(flavour="contrib", quantize=quantize)
    assert not own(model).modified
    (result,) = own.results
    assert isinstance(result, Declined)
    assert reason in result.reason
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def test_scores_of_any_sign_stay():
    class Shifted(BlockFFN):
        def scores(self, logits):
            return torch.where(logits.abs() > 0.5, logits, 0.0)

    layer = Shifted(SPECS["gated"]).requires_grad_(False)
    model = export_script(layer, torch.zeros(3, 24))
    (result,) = rewrite(model, flavour="contrib")
    assert isinstance(result, Declined)
    assert "ignore negative scores, and some may be negative" in result.reason


@pytest.mark.parametrize(
    ("spec", "quantize", "reason"),
    [
        (SPECS["gated"].replace(act="relu"), None, "gate by silu, not by relu"),
        (SPECS["rms"].replace(expert_size=7), "int4", "take int8"),
    ],
    ids=["gate", "odd"],
)
def test_specs_that_do_not_map_exactly(spec, quantize, reason):
    model = export_script(BlockFFN(spec).requires_grad_(False), torch.zeros(3, spec.hidden_size))
    (result,) = rewrite(model, flavour="contrib", quantize=quantize)
    assert isinstance(result, Declined)
    assert reason in result.reason
    assert not operators(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "dense"}, "flavour is 'dense'; choose portable or contrib"),
        ({"flavour": "contrib", "quantize": "int3"}, "quantize is 'int3'; choose int8 or int4"),
        ({"quantize": "int8"}, "flavour 'portable' has no quantised weights; choose 'contrib'"),
    ],
    ids=["flavour", "weights", "combination"],
)
def test_unknown_options(options, message):
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(ValueError, match=message):
        rewrite(model, **options)


@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, None), (4, 4)])
def test_quantising_rounds_to_the_nearest(bits, block):
    weight = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    weight[1, 2] = 0
    codes, scales = quantise(weight, bits, block)
    assert codes.shape == (2, 3, 8 * bits // 8)
    assert scales.shape == ((2, 3, 2) if block else (2, 3))
    back = dequantised(codes, scales, bits)
    steps = np.repeat(scales.reshape(2, 3, -1), block or 8, axis=-1)
    assert (np.abs(back - weight) <= steps * (0.5 + 1e-6)).all()
    assert (back[1, 2] == 0).all()
