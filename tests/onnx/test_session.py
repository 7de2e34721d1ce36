from __future__ import annotations

import numpy as np
import pytest

import blockffn_compile.onnx
from blockffn_compile.onnx.files import ModelError, save
from tests.onnx.test_files import make_model
from tests.onnx.test_rewrite import LAYER
from tests.passes.exporting import export_script


def test_says_how_sparse_layers_run(tmp_path):
    module, x = LAYER.build()
    plain, sparse = tmp_path / "plain.onnx", tmp_path / "sparse.onnx"
    save(export_script(module, x), plain)
    blockffn_compile.onnx.rewrite(plain, sparse)
    for path, flavour in ((plain, "dense"), (sparse, "portable")):
        session = blockffn_compile.onnx.session(path, threads=1)
        assert session.flavour == flavour
        (y,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(y, module(x)[0], rtol=1e-5, atol=1e-5)


def test_a_missing_library(tmp_path):
    save(export_script(*LAYER.build()), tmp_path / "plain.onnx")
    blockffn_compile.onnx.rewrite(tmp_path / "plain.onnx", tmp_path / "sparse.onnx")
    with pytest.raises(ModelError, match=r"sparse\.onnx: ONNX Runtime refuses it: .*absent\.so"):
        blockffn_compile.onnx.session(tmp_path / "sparse.onnx", library=tmp_path / "absent.so")


def test_models_that_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="no such file"):
        blockffn_compile.onnx.session(path)
    model = make_model()
    model.graph[0].op_type = "NoSuchOperator"
    save(model, path)
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime refuses it: .*NoSuchOperator"):
        blockffn_compile.onnx.session(path)
