"""The TIR kernels for one tiling, as :mod:`blockffn_compile.passes.relax` asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import tvm
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from tvm import tirx

from blockffn_compile.layer import BlockFFNSpec
from blockffn_compile.passes.relax_emit import Panels
from blockffn_compile.schedules.packing import panel_width, to_panels, unfold
from blockffn_compile.schedules.tir import cpu, linear, tile


class CpuKernels:
    """Kernels for CPUs with such registers."""

    def __init__(self, registers: tile.Registers) -> None:
        self.registers = registers

    def ffn(self, spec: BlockFFNSpec, dtype: str) -> tuple[tirx.PrimFunc, int, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        hidden, experts, size = spec.hidden_size, spec.num_experts, spec.expert_size
        widest, tokens, dot = self.registers
        up, down = panel_width(size, widest), panel_width(hidden, widest)
        tiling = tile.Tiling(up, down, tokens, dot)
        function = cpu.chunk_sparse_ffn(hidden, experts, size, dtype, spec.act, spec.gated, tiling)
        return function, up, down

    def linear(self, inputs: int, outputs: int, dtype: str) -> tuple[tirx.PrimFunc, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        widest, tokens, dot = self.registers
        panel = panel_width(outputs, widest)
        return linear.panel_linear(inputs, outputs, dtype, panel, tokens, dot), panel

    def pack(self, panels: Panels, weights: Sequence[tvm.runtime.Tensor]) -> tvm.runtime.Tensor:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        packed = pack(panels, [from_dlpack(weight) for weight in weights])
        return tvm.runtime.from_dlpack(packed)


def pack(panels: Panels, weights: Sequence[Tensor]) -> Tensor:
    """Panels of stored weights, in the order of ``panels.weights``."""
    return torch.cat([part.flatten() for part in parts(panels, weights)]).view(panels.shape)


def parts(panels: Panels, weights: Sequence[Tensor], outputs: int = 1024) -> Iterator[Tensor]:
    """The same as consecutive pieces, each of about so many outputs of one expert."""
    matrices = [
        unfold(
            weight,
            stored.axes,
            {"e": panels.experts, "n": stored.outputs, "k": panels.inputs},
            "enk",
        )
        for stored, weight in zip(panels.weights, weights, strict=True)
    ]
    total, dtype = sum(stored.outputs for stored in panels.weights), getattr(torch, panels.dtype)
    step = -(-outputs // panels.panel) * panels.panel
    for expert in range(panels.experts):
        for start in range(0, total, step):
            rows, first = [], 0
            for matrix in matrices:
                rows.append(matrix[expert, max(start - first, 0) : max(start + step - first, 0)])
                first += matrix.shape[1]
            yield to_panels(torch.cat(rows).to(dtype)[None], panels.panel)
