from __future__ import annotations

import pytest

from blockffn_compile.onnx.files import save
from tests.onnx.test_rewrite import LAYER, SOFTMAX
from tests.passes.exporting import export_script


@pytest.mark.parametrize(
    ("spelling", "row"),
    [(LAYER, "4 experts of 8, hidden 16, silu"), (SOFTMAX, "scores come from softmax")],
    ids=["rewritten", "declined"],
)
def test_lists_layers(blockffn, tmp_path, spelling, row) -> None:
    save(export_script(*spelling.build()), tmp_path / "model.onnx")
    result = blockffn("rewrite", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx", "--verify")
    assert result.exit_code == 0, result.output
    assert row in result.stdout
    assert f"{int(spelling is LAYER)} of 1 layers rewritten" in result.stdout
    assert (tmp_path / "out.onnx").is_file()


def test_bad_files(refused, tmp_path) -> None:
    model = tmp_path / "model.onnx"
    assert "no such file" in refused("rewrite", model, "-o", tmp_path / "out.onnx")
    model.write_text("no model")
    assert "not an ONNX model" in refused("rewrite", model, "-o", tmp_path / "out.onnx")
    assert "the model itself" in refused("rewrite", model, "-o", model)


def test_quantises(blockffn, refused, tmp_path) -> None:
    save(export_script(*LAYER.build()), tmp_path / "model.onnx")
    names = ("rewrite", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx", "--quantize", "int8")
    assert "choose 'contrib'" in refused(*names)
    result = blockffn(*names, "--flavour", "contrib")
    assert result.exit_code == 0, result.output
    assert ", int8: error " in result.stdout.replace("\n", " ")
