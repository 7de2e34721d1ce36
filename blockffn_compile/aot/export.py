"""A model's decoding step as Relax functions.

TVM's importer of exported PyTorch programs does most of it; converters here stand for what it
lacks, or does in another precision than PyTorch.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax


def _matmul(node: fx.Node, importer: Any) -> relax.Var:
    """Summed in fp32 and rounded once, as PyTorch does."""
    a, b = (importer.env[arg] for arg in node.args[:2])
    y = importer.block_builder.emit(relax.op.matmul(a, b, out_dtype="float32"))
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return y if dtype == "float32" else importer.block_builder.emit(relax.op.astype(y, dtype))


def _amax(node: fx.Node, importer: Any) -> relax.Var:
    args: Any = (*node.args, None, False)
    x, axes, keepdim = args[:3]
    return importer.block_builder.emit(
        relax.op.max(importer.env[x], axis=list(axes) if axes else None, keepdims=keepdim)
    )


CONVERTERS = {"mm.default": _matmul, "bmm.default": _matmul, "amax.default": _amax}
