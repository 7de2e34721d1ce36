"""Rewriting files: the numbers, the report, and what stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import blockffn_compile.onnx
from blockffn_compile.layer import BlockFFNSpec
from blockffn_compile.onnx import files
from blockffn_compile.onnx.files import ModelError, external_tensors, load, save
from tests.passes.exporting import export_script
from tests.passes.near_misses import NEAR_MISSES
from tests.passes.spellings import MATCHES

LAYER = next(s for s in MATCHES if s.name == "linear_functional")
SOFTMAX = next(s for s in NEAR_MISSES if s.name == "softmax")


@pytest.fixture(params=["embedded", "external"])
def stored(request, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        if request.param == "external":
            patch.setattr(files, "EMBEDDED_BYTES", 0)
        save(export_script(*LAYER.build()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_rewrites_a_file(stored, tmp_path):
    out = tmp_path / "out.onnx"
    report = blockffn_compile.onnx.rewrite(stored, out, verify=True)
    (layer,) = report.layers
    assert (layer.status, layer.router) == ("rewritten", "relu")
    assert layer.spec == BlockFFNSpec(16, 4, 8, layout="block_linear", norm="none")
    module, x = LAYER.build()
    (y,) = onnxruntime.InferenceSession(out).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, module(x)[0], rtol=1e-5, atol=1e-5)
    assert out.with_name("out.onnx.data").exists() == any(external_tensors(load(stored)))


def test_declined_layers_are_reported_and_written_as_they_are(tmp_path):
    module, x = SOFTMAX.build()
    save(export_script(module, x), tmp_path / "model.onnx")
    report = blockffn_compile.onnx.rewrite(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert "layer 0  declined   scores come from softmax" in str(report)
    (y,) = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, module(x)[0], rtol=1e-5, atol=1e-5)


def test_inputs_outputs_and_metadata_stay(tmp_path):
    x = torch.zeros(5, 16)
    model = export_script(LAYER.build()[0], x)
    model.metadata_props["author"] = "someone"
    model.graph.inputs.append(ir.val("unused", ir.DataType.FLOAT, [1]))
    save(model, tmp_path / "model.onnx")
    blockffn_compile.onnx.rewrite(tmp_path / "model.onnx", tmp_path / "out.onnx")
    new = load(tmp_path / "out.onnx")
    assert [v.name for v in new.graph.inputs] == ["x", "unused"]
    assert [v.name for v in new.graph.outputs] == [v.name for v in model.graph.outputs]
    assert new.metadata_props["author"] == "someone"


def test_in_place_is_refused(stored):
    before = stored.read_bytes()
    with pytest.raises(ModelError, match="this is the model itself; write to another file"):
        blockffn_compile.onnx.rewrite(stored, stored.parent / "." / stored.name)
    assert stored.read_bytes() == before
