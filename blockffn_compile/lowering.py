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

from blockffn_compile import ops, step_ops


def _linear_out(x: Tensor, *weights: Tensor, out: Tensor) -> None:
    step_ops.linear(x, weights, out=out)


def _quantised_linear_out(x: Tensor, *tensors: Tensor, out: Tensor) -> None:
    count = len(tensors) // 2
    step_ops.linear(x, tensors[:count], tensors[count:], out)


def _ffn_out(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    up_axes: str,
    down_axes: str,
    out: Tensor,
) -> None:
    ops.run_into(x, scores, w_up, w_down, None, act, up_axes, down_axes, out)


def _quantised_ffn_out(x: Tensor, scores: Tensor, *rest: Any, out: Tensor) -> None:
    *tensors, act, up_axes, down_axes = rest
    count = len(tensors) // 2
    w_up, w_down, w_gate = (*tensors[:count], None)[:3]
    ops.run_into(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes, out, tensors[count:])


# Generated code finds them by name in this namespace.
setattr(extern_kernels, "blockffn_ffn", _ffn_out)  # noqa: B010
setattr(extern_kernels, "blockffn_gated_ffn", ops.run_into)  # noqa: B010
setattr(extern_kernels, "blockffn_quantised_ffn", _quantised_ffn_out)  # noqa: B010
setattr(extern_kernels, "blockffn_linear", _linear_out)  # noqa: B010
setattr(extern_kernels, "blockffn_quantised_linear", _quantised_linear_out)  # noqa: B010
setattr(extern_kernels, "blockffn_cached_attention", step_ops.cached_attention)  # noqa: B010


def _call(
    name: str, inputs: Sequence[Any], size: Sequence[Any], constants: Sequence[Any] = ()
) -> ir.TensorBox:
    """``extern_kernels.name(*inputs, *constants, out=buffer)`` with a new contiguous buffer."""
    first = inputs[0]
    layout = ir.FixedLayout(first.get_device(), first.get_dtype(), list(size))
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(i)) for i in inputs]
    return ir.TensorBox.create(
        ir.ExternKernelOut(layout, inputs, constants, python_kernel_name=f"extern_kernels.{name}")
    )


@register_lowering(torch.ops.blockffn.chunk_sparse_ffn.default, type_promotion_kind=None)
def _ffn(
    x: ir.TensorBox,
    scores: ir.TensorBox,
    w_up: ir.TensorBox,
    w_down: ir.TensorBox,
    act: str,
    w_gate: ir.TensorBox | None = None,
    up_axes: str = "e,s,h",
    down_axes: str = "e,h,s",
    up_scales: ir.TensorBox | None = None,
    down_scales: ir.TensorBox | None = None,
    gate_scales: ir.TensorBox | None = None,
) -> ir.TensorBox:
    inputs, name = [x, scores, w_up, w_down], "blockffn_ffn"
    if w_gate is not None:
        inputs, name = [*inputs, w_gate], "blockffn_gated_ffn"
    scales = [s for s in (up_scales, down_scales, gate_scales) if s is not None]
    if scales:
        inputs, name = [*inputs, *scales], "blockffn_quantised_ffn"
    return _call(name, inputs, x.get_size(), (act, up_axes, down_axes))


@register_lowering(torch.ops.blockffn.linear.default, type_promotion_kind=None)
def _linear(
    x: ir.TensorBox, weights: Sequence[ir.TensorBox], scales: Sequence[ir.TensorBox] | None = None
) -> ir.TensorBox:
    outputs = sum(w.get_size()[0] for w in weights)
    name = "blockffn_quantised_linear" if scales else "blockffn_linear"
    return _call(name, [x, *weights, *(scales or ())], [x.get_size()[0], outputs])


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
