"""Model files: streamed, aligned weights, and what is wrong with a bad file in one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from blockffn_compile.onnx import files
from blockffn_compile.onnx.files import ALIGNMENT, ModelError, external_tensors, load, save

WIDTH = 64


def make_model(weights: int = 3) -> ir.Model:
    """A chain of products with random matrices, and a vector that is too small for a data file."""
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, ["t", WIDTH])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="chain")
    value = x
    shapes = [*[(WIDTH, WIDTH)] * weights, (WIDTH,)]
    for i, shape in enumerate(shapes):
        tensor = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=f"w{i}")
        weight = ir.val(tensor.name, ir.DataType.FLOAT, list(shape), const_value=tensor)
        graph.register_initializer(weight)
        node = ir.node("MatMul" if len(shape) == 2 else "Add", [value, weight])
        graph.append(node)
        value = node.outputs[0]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["t", WIDTH])
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"x": np.eye(WIDTH, dtype=np.float32)})[0]


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """A model with a data file."""
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(files, "EMBEDDED_BYTES", 0)
        save(make_model(), path)
    return path


def test_small_models_are_one_file(tmp_path):
    save(make_model(), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert not list(external_tensors(load(tmp_path / "model.onnx")))


def test_data_files_are_aligned_and_kept(stored, tmp_path):
    first = list(external_tensors(load(stored)))
    assert [t.name for t in first] == ["w0", "w1", "w2"]
    steps: list[tuple[int, int]] = []
    copy = tmp_path / "elsewhere" / "copy.onnx"
    copy.parent.mkdir()
    save(load(stored), copy, lambda done, total: steps.append((done, total)))
    second = list(external_tensors(load(copy)))
    assert [t.location for t in second] == ["copy.onnx.data"] * 3
    assert all((t.offset or 0) % ALIGNMENT == 0 for t in second)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(run(copy), run(stored))
    onnx.checker.check_model(copy, full_check=True)


def test_weights_are_streamed(tmp_path, monkeypatch):
    """Lazily computed ones need memory one after another, not all at once."""
    monkeypatch.setattr(files, "EMBEDDED_BYTES", 0)
    elements, model = 1 << 20, make_model(0)
    for i in range(8):
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ones(elements, np.float32)),
            ir.DataType.FLOAT,
            ir.Shape([elements]),
            name=f"lazy{i}",
        )
        value = ir.val(tensor.name, ir.DataType.FLOAT, [elements], const_value=tensor)
        model.graph.register_initializer(value)
    tracemalloc.start()
    save(model, tmp_path / "model.onnx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "model.onnx.data").stat().st_size >= 8 * 4 * elements
    assert peak < 3 * 4 * elements


def test_a_model_is_not_written_over_its_own_weights(stored):
    model = load(stored)
    before = stored.with_name("model.onnx.data").read_bytes()
    with pytest.raises(ModelError, match="own weights are read from there; choose another"):
        save(model, stored)
    assert stored.with_name("model.onnx.data").read_bytes() == before


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(ModelError, match="cannot be written"):
        save(make_model(), tmp_path / "absent" / "model.onnx")


# --- Bad files ------------------------------------------------------------------------------------


def point(path: Path, **entries: object) -> None:
    """Changes what the first tensor says about its data."""
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = str(entries.get(entry.key, entry.value))
    path.write_bytes(proto.SerializeToString())


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_missing_data(stored):
    stored.with_name("model.onnx.data").unlink()
    assert "tensor w0: data file 'model.onnx.data' is missing" in refusal(stored)


def test_truncated_data(stored):
    data = stored.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    message = refusal(stored)
    assert "tensor w2: data file 'model.onnx.data' is truncated" in message
    assert f"the file at {data.stat().st_size}" in message


@pytest.mark.parametrize(("offset", "reason"), [(-4096, "offset"), (1 << 40, "truncated")])
def test_offsets_outside_of_the_data(stored, offset, reason):
    point(stored, offset=offset)
    assert reason in refusal(stored)


def test_lengths_that_are_not_those_of_the_tensor(stored):
    point(stored, length=8)
    needed = 4 * WIDTH * WIDTH
    assert f"holds 8 bytes of it, {needed} are needed" in refusal(stored)


@pytest.mark.parametrize("how", ["relative", "absolute", "link"])
def test_data_outside_of_the_directory(stored, tmp_path_factory, how):
    outside = tmp_path_factory.mktemp("outside") / "weights"
    outside.write_bytes(stored.with_name("model.onnx.data").read_bytes())
    link = stored.with_name("link")
    link.symlink_to(outside)
    location = {"relative": f"../../{outside}", "absolute": outside, "link": "link"}[how]
    point(stored, location=location)
    assert "outside of the model's directory; move it there" in refusal(stored)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"\xff" * 64, "not an ONNX model"), (b"", "not an ONNX model")],
    ids=["absent", "garbage", "empty"],
)
def test_files_that_are_no_models(tmp_path, content, reason):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    assert reason in refusal(path)


def test_a_directory(tmp_path):
    assert "directory" in refusal(tmp_path)
