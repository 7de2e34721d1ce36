"""Spellings as ONNX models, by PyTorch's two exporters."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.spellings import Spelling


@contextmanager
def quietly():
    """Without what exporters print and log."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def export_script(module: nn.Module, x: Tensor, opset: int = 17, dynamic: bool = False) -> ir.Model:
    """By the older exporter, which goes through TorchScript."""
    file = io.BytesIO()
    axes = {"x": list(range(x.dim() - 1))} if dynamic else None
    with quietly():
        torch.onnx.export(
            module,
            (x,),
            file,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_axes=axes,
        )
    return ir.serde.deserialize_model(onnx.load_from_string(file.getvalue()))


class Bundle(nn.Module):
    """Many layers side by side, because an export costs more than a layer.

    Layer i is the module ``layers.i`` and reads ``inputs[i]``.
    """

    def __init__(self, spellings: Sequence[Spelling]) -> None:
        super().__init__()
        built = [spelling.build() for spelling in spellings]
        self.layers = nn.ModuleList(layer for layer, _ in built)
        self.inputs = tuple(x for _, x in built)

    def forward(self, *inputs: Tensor) -> list[tuple[Tensor, ...]]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    opset: int = 20,
    dynamic: bool = False,
    optimize: bool = True,
) -> ir.Model:
    """By the exporter that goes through ``torch.export``.

    Args:
        dynamic: all dimensions of the inputs but the last are symbolic, unless they are one.
        optimize: fold constants and fuse operators.
    """
    bundled = isinstance(module, Bundle)  # whose inputs are a list
    shapes = tuple({i: Dim.DYNAMIC for i in range(x.dim() - 1) if x.shape[i] > 1} for x in inputs)
    with quietly():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=None if not dynamic else (shapes,) if bundled else shapes,
            optimize=optimize,
            verbose=False,
        )
    assert program is not None
    return program.model
