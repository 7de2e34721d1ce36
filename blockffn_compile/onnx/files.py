"""ONNX model files, their weights in files of their own where there are many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

#: Models with more bytes of weights than this get a data file; protocol buffers end at 2 GB.
EMBEDDED_BYTES = 1 << 30

#: Tensors of the data file are aligned to this, so that runtimes can map them into memory.
ALIGNMENT = 4096

#: Smaller tensors stay in the model file.
EXTERNAL_BYTES = 1024

#: Where a loaded model keeps the paths of the files that its weights are read from, even lazily.
_DATA_FILES = "blockffn_compile.data_files"

#: Called with the tensors written so far and their number.
Progress = Callable[[int, int], object]


class ModelError(ValueError):
    """A model file cannot be used; the message names the file and what is wrong with it."""


def load(path: str | Path) -> ir.Model:
    """Reads a model; weights in data files are read when they are needed.

    Raises:
        ModelError: it is no ONNX model, or a tensor's data is missing, truncated, or not within
            the directory of the model.
    """
    path = Path(path)
    try:
        model = ir.load(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except Exception as error:  # the decoders' own, of many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{path}: not an ONNX model: {cause}") from None
    if not model.opset_imports:
        raise ModelError(f"{path}: not an ONNX model: it names no operator set")
    for tensor in external_tensors(model):
        _check(path, tensor)
    model.meta[_DATA_FILES] = {Path(tensor.path).resolve() for tensor in external_tensors(model)}
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Tensors in data files, those of subgraphs and of attributes included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(
                    attribute.value, ir.ExternalTensor
                ):
                    yield attribute.value


def _check(path: Path, tensor: ir.ExternalTensor) -> None:
    directory, file = path.parent.resolve(), Path(tensor.path)
    name = f"{path}: tensor {tensor.name}: data file {str(tensor.location)!r}"
    if not file.resolve().is_relative_to(directory):
        raise ModelError(f"{name} is outside of the model's directory; move it there")
    if not file.is_file():
        raise ModelError(f"{name} is missing; put it beside the model")
    start, size = tensor.offset or 0, file.stat().st_size
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ModelError(f"{name} holds {tensor.length} bytes of it, {tensor.nbytes} are needed")
    if start < 0 or start + tensor.nbytes > size:
        raise ModelError(
            f"{name} is truncated: the tensor ends at byte {start + tensor.nbytes}, the file at "
            f"{size}; copy it again"
        )


def save(model: ir.Model, path: str | Path, progress: Progress = lambda done, total: None) -> None:
    """Writes a model, and ``NAME.data`` beside it if its weights are external or large.

    Weights are streamed: no more than one of them needs memory.  The model file, which makes the
    data count, is written last.

    Raises:
        ModelError: the file cannot be written, or is one that the model's weights are read from.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    sources = model.meta.get(_DATA_FILES, set())
    if sources & {path.resolve(), data.resolve()}:
        raise ModelError(f"{path}: the model's own weights are read from there; choose another")
    weights = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)

    def report(tensor: object, info: ir.external_data.CallbackInfo) -> None:
        progress(info.index + 1, info.total)

    try:
        ir.save(
            model,
            path,
            external_data=data.name if sources or size > EMBEDDED_BYTES else None,
            size_threshold_bytes=EXTERNAL_BYTES,
            alignment=ALIGNMENT,
            align_threshold=EXTERNAL_BYTES,
            callback=report,
        )
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error}") from None
