"""TVM TIR kernels under PyTorch, zero copy through DLPack."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blockffn_compile.layer import CHUNK_TOKENS, Quantisation
from blockffn_compile.schedules.packing import PANELS, panel_width
from blockffn_compile.schedules.plan import Problem, Regime

if TYPE_CHECKING:
    from blockffn_compile.schedules.tir.tile import Registers

ALIGNMENT = 64

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def _host() -> tuple[Any, Registers] | None:
    """TVM target of this CPU and its registers, or None after one warning."""
    # For TVM's own pool, should PyTorch's not be usable: its size is fixed when TVM starts.
    os.environ.setdefault("TVM_NUM_THREADS", str(torch.get_num_threads()))
    try:
        from blockffn_compile.schedules.tir import build

        target = build.host_target()
    except Exception as error:  # TVM missing or broken, or a CPU that its LLVM does not know
        warnings.warn(
            f"blockffn: no TVM kernels on this machine ({error}); "
            "sparse layers run every expert, in PyTorch",
            stacklevel=2,
        )
        return None
    return target, build.registers(target)


def cpu_schedule(problem: Problem, regime: Regime) -> CpuKernel | None:
    """One kernel for decode and chunk; prefill runs it chunk after chunk."""
    if problem.device != "cpu" or problem.dtype not in DTYPES or _host() is None:
        return None
    return _kernel(problem)


@functools.cache
def _kernel(problem: Problem) -> CpuKernel:
    return CpuKernel(problem)


@functools.cache
def linear_kernel(
    inputs: int, outputs: int, dtype: torch.dtype, quantisation: Quantisation | None = None
) -> tuple[Any, int] | None:
    """The function of ``tir/linear.py`` and its panel width, or None without kernels."""
    if dtype not in DTYPES or (host := _host()) is None:
        return None
    from blockffn_compile.schedules.tir import build
    from blockffn_compile.schedules.tir.linear import panel_linear

    target, registers = host
    panel = panel_width(outputs, registers.widest)
    function = panel_linear(inputs, outputs, DTYPES[dtype], panel, registers, quantisation)
    return build.load(function, target), panel


@functools.cache
def attention_kernel(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> Any | None:
    """The function of ``tir/attention.py``, or None without kernels."""
    if dtype not in DTYPES or key_dim % 16 or value_dim % 16 or (host := _host()) is None:
        return None
    from blockffn_compile.schedules.tir import build
    from blockffn_compile.schedules.tir.attention import cached_attention

    return build.load(cached_attention(heads, kv_heads, key_dim, value_dim, DTYPES[dtype]), host[0])


class CpuKernel:
    """The TIR kernel of one problem, compiled for this CPU."""

    def __init__(self, problem: Problem) -> None:
        from blockffn_compile.schedules.tir import build, cpu, tile

        host = _host()
        assert host is not None
        target, registers = host
        self.tiling = tile.Tiling(
            panel_width(problem.expert_size, registers.widest),
            panel_width(problem.hidden_size, registers.widest),
            registers,
        )
        self.chunk = CHUNK_TOKENS
        self.sizes = {
            "e": problem.num_experts,
            "h": problem.hidden_size,
            "s": problem.expert_size,
        }
        self.rows = (1, 1)  # how many rows of weights are one of their integers, and of scales
        if problem.quantisation is not None:
            self.rows = (problem.quantisation.per_byte, problem.quantisation.group)
        self.function = build.load(
            cpu.chunk_sparse_ffn(
                problem.hidden_size,
                problem.num_experts,
                problem.expert_size,
                DTYPES[problem.dtype],
                problem.act,
                problem.gated,
                self.tiling,
                problem.quantisation,
            ),
            target,
        )

    def __call__(
        self,
        x: Tensor,
        scores: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        w_gate: Tensor | None,
        up_axes: str,
        down_axes: str,
        out: Tensor,
        scales: Sequence[Tensor] = (),
    ) -> None:
        up_panel, down_panel = self.tiling.up_panel, self.tiling.down_panel
        weights: list[Tensor] = []

        def add(index: int, weight: Tensor, axes: str, order: str, panel: int) -> None:
            if not scales:
                weights.append(PANELS.get(weight, axes, self.sizes, order, panel))
                return
            for stored, rows in zip((weight, scales[index]), self.rows, strict=True):
                # Integers that share a byte, and weights that share a scale, lie along the last,
                # summed axis.
                sizes = self.sizes | {order[2]: self.sizes[order[2]] // rows}
                weights.append(PANELS.get(stored, axes, sizes, order, panel))

        add(0, w_up, up_axes, "esh", up_panel)
        if w_gate is not None:
            add(2, w_gate, up_axes, "esh", up_panel)
        add(1, w_down, down_axes, "ehs", down_panel)
        if x.shape[0] <= self.chunk:
            self.function(aligned(x), aligned(scores), *weights, out)
            return
        for part, part_scores, result in zip(
            x.split(self.chunk), scores.split(self.chunk), out.split(self.chunk), strict=True
        ):
            y = torch.empty_like(result, memory_format=torch.contiguous_format)
            self.function(aligned(part), aligned(part_scores), *weights, y)
            result.copy_(y)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and 64-byte aligned, as the vector loads of the kernel need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
