"""Inductor lowerings: compiled graphs call our kernels directly, past PyTorch's dispatcher.

The dispatcher costs more than a small kernel does.  Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from blockffn_compile import step_ops


def _linear_out(x: Tensor, *weights: Tensor, out: Tensor) -> None:
    step_ops.linear(x, weights, out)


# Generated code finds them by name in this namespace.
setattr(extern_kernels, "blockffn_linear", _linear_out)  # noqa: B010
setattr(extern_kernels, "blockffn_cached_attention", step_ops.cached_attention)  # noqa: B010


def _call(name: str, inputs: Sequence[Any], size: Sequence[Any]) -> ir.TensorBox:
    """A call ``extern_kernels.name(*inputs, out=buffer)`` with a new contiguous buffer."""
    first = inputs[0]
    layout = ir.FixedLayout(first.get_device(), first.get_dtype(), list(size))
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(i)) for i in inputs]
    return ir.TensorBox.create(
        ir.ExternKernelOut(layout, inputs, python_kernel_name=f"extern_kernels.{name}")
    )


@register_lowering(torch.ops.blockffn.linear.default, type_promotion_kind=None)
def _linear(x: ir.TensorBox, weights: Sequence[ir.TensorBox]) -> ir.TensorBox:
    outputs = sum(w.get_size()[0] for w in weights)
    return _call("blockffn_linear", [x, *weights], [x.get_size()[0], outputs])


@register_lowering(torch.ops.blockffn.cached_attention.default, type_promotion_kind=None)
def _attention(q: ir.TensorBox, *rest: ir.TensorBox) -> ir.TensorBox:
    tokens, heads, _ = q.get_size()
    values = rest[1]
    size = [tokens, heads, values.get_size()[3]]
    return _call("blockffn_cached_attention", [q, *rest], size)


class _Barrier(ir.ExternKernel):
    """Claims to write to a buffer, so that no loop is fused across it; emits no code."""

    def __init__(self, buffer: ir.IRNode) -> None:
        layout = ir.NoneLayout(device=buffer.get_device())
        super().__init__(None, layout, self.unwrap_storage([buffer]))
        V.graph.mark_buffer_mutated(buffer.get_name())
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        pass

    def should_allocate(self) -> bool:
        return False

    def get_mutation_names(self) -> Sequence[str]:
        return [self.input_name(0)]

    def get_unbacked_symbol_defs(self) -> OrderedSet[Any]:
        return OrderedSet()


@register_lowering(torch.ops.blockffn.materialize.default, type_promotion_kind=None)
def _materialize(x: ir.TensorBox) -> ir.TensorBox:
    x.realize()
    _Barrier(x)
    return x
