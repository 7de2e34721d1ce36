"""Tracing to ATen as AOTAutograd does it, with or without Inductor's decompositions."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

TABLES = ("aten", "inductor")


def trace(
    module: nn.Module, x: Tensor, table: str = "inductor", dynamic: bool = False
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The inference graph of ``module``, which returns a tuple, and its arguments.

    Args:
        table: ``aten`` decomposes composite operations only.
        dynamic: whether all dimensions of ``x`` but the last are symbolic.
    """
    kinds = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC] * (x.dim() - 1)
    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(
        x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[*kinds, DimDynamic.STATIC])
    )
    decompositions = select_decomp_table() if table == "inductor" else {}
    with torch.no_grad():
        gm, signature = aot_export_module(
            module, (fake,), trace_joint=False, decompositions=decompositions
        )
    assert isinstance(gm, fx.GraphModule)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    return gm, [*(state[name] for name in (*signature.parameters, *signature.buffers)), x]


def targets(gm: fx.GraphModule) -> list[object]:
    """The operations of a graph, in order."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]
