from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

import blockffn_compile.onnx
from blockffn_compile.onnx.files import ModelError, save
from blockffn_compile.onnx.headers import HeadersError
from blockffn_compile.onnx.library import LibraryError
from tests.onnx.test_files import make_model
from tests.onnx.test_rewrite import LAYER
from tests.passes.exporting import Bundle, export, export_script
from tests.passes.spellings import MATCHES

#: The module, not the function of its name.
session_module = sys.modules["blockffn_compile.onnx.session"]


@pytest.fixture
def sparse(tmp_path):
    """A rewritten layer; ``plain.onnx`` beside it is what it was."""
    save(export_script(*LAYER.build()), tmp_path / "plain.onnx")
    blockffn_compile.onnx.rewrite(tmp_path / "plain.onnx", tmp_path / "sparse.onnx")
    return tmp_path / "sparse.onnx"


def assert_runs(session):
    module, x = LAYER.build()
    (y,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, module(x)[0], rtol=1e-5, atol=1e-5)


def test_says_how_sparse_layers_run(sparse):
    library = blockffn_compile.onnx.build_library()
    for path, options, flavour in (
        (sparse.with_name("plain.onnx"), {}, "dense"),
        (sparse, {"portable": True}, "portable"),
        (sparse, {"portable": True, "library": library}, "portable"),
        (sparse, {}, "native"),
        (sparse, {"library": library}, "native"),
    ):
        session = blockffn_compile.onnx.session(path, threads=1, **options)
        assert session.flavour == flavour
        assert_runs(session)


@pytest.mark.parametrize(
    "error", [LibraryError("no compiler"), HeadersError("no headers"), ImportError("no tvm")]
)
def test_where_the_library_cannot_be_built(sparse, monkeypatch, caplog, error):
    def refuse():
        raise error

    monkeypatch.setattr(session_module, "build_library", refuse)
    with caplog.at_level(logging.WARNING, "blockffn_compile"):
        session = blockffn_compile.onnx.session(sparse)
    assert session.flavour == "portable"
    assert f"sparse layers run without our kernels: {error}" in caplog.text
    assert_runs(session)


def test_a_missing_library(sparse):
    with pytest.raises(ModelError, match=r"sparse\.onnx: ONNX Runtime refuses it: .*absent\.so"):
        blockffn_compile.onnx.session(sparse, library=sparse.with_name("absent.so"))


def test_layers_of_several_kinds_run_natively(tmp_path):
    """Overloads of the function are one operator to the library."""
    names = ("einsum_both", "act_gelu", "gated")
    bundle = Bundle([s for s in MATCHES if s.name in names])
    save(export(bundle, bundle.inputs), tmp_path / "plain.onnx")
    blockffn_compile.onnx.rewrite(tmp_path / "plain.onnx", tmp_path / "sparse.onnx")
    session = blockffn_compile.onnx.session(tmp_path / "sparse.onnx")
    assert session.flavour == "native"
    inputs = zip(session.get_inputs(), bundle.inputs, strict=True)
    results = session.run(None, {value.name: x.numpy() for value, x in inputs})
    for y, (want,) in zip(results, bundle(*bundle.inputs), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_models_that_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="no such file"):
        blockffn_compile.onnx.session(path)
    model = make_model()
    model.graph[0].op_type = "NoSuchOperator"
    save(model, path)
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime refuses it: .*NoSuchOperator"):
        blockffn_compile.onnx.session(path)
