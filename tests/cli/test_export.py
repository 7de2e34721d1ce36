from __future__ import annotations

import onnxruntime


def test_writes_a_model(blockffn, checkpoint, tmp_path) -> None:
    out = tmp_path / "model.onnx"
    result = blockffn("export", checkpoint, "-o", out, "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers rewritten" in result.stdout
    inputs = {v.name: v.type for v in onnxruntime.InferenceSession(out).get_inputs()}
    assert inputs["past.1.value"] == "tensor(float16)"


def test_bad_places(refused, checkpoint, tmp_path) -> None:
    message = refused("export", checkpoint, "-o", tmp_path / "absent" / "m.onnx", "--no-past")
    assert "cannot be written" in message
    assert "no such directory" in refused("export", tmp_path / "absent", "-o", tmp_path / "m.onnx")
