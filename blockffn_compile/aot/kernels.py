"""The TIR kernels for one kind of device, as exporting and rewriting ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import tvm
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from tvm import tirx

from blockffn_compile.layer import BlockFFNSpec, Quantisation
from blockffn_compile.passes import relax_emit
from blockffn_compile.passes.relax_emit import Panels
from blockffn_compile.schedules.packing import panel_width, to_panels, unfold
from blockffn_compile.schedules.quantisation import quantised, stays
from blockffn_compile.schedules.tir import attention, cache, cpu, linear, tile
from blockffn_compile.schedules.tir.cuda import attention as cuda_attention
from blockffn_compile.schedules.tir.cuda import cache as cuda_cache
from blockffn_compile.schedules.tir.cuda import ffn as cuda_ffn
from blockffn_compile.schedules.tir.cuda import linear as cuda_linear
from blockffn_compile.schedules.tir.cuda.tile import PANEL


class StepKernels(relax_emit.Kernels, Protocol):
    """All kernels of a decoding step."""

    def attention(
        self, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: str
    ) -> tirx.PrimFunc:
        """See ``schedules.tir.attention.cached_attention``."""

    def store(self, heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
        """See ``schedules.tir.cache.store_entries``."""

    def move(self, heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
        """See ``schedules.tir.cache.move_entries``."""


class _Packing:
    """Panels of constants; weights as they are."""

    def quantisation(self, weight: str, inputs: int) -> Quantisation | None:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        return None

    def pack(self, panels: Panels, weights: Sequence[tvm.runtime.Tensor]) -> tvm.runtime.Tensor:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        packed = pack(panels, [from_dlpack(weight) for weight in weights])
        return tvm.runtime.from_dlpack(packed)


class CpuKernels(_Packing):
    """Kernels for CPUs with such registers."""

    attention = staticmethod(attention.cached_attention)
    store = staticmethod(cache.store_entries)
    move = staticmethod(cache.move_entries)

    def __init__(self, registers: tile.Registers, quantisation: Quantisation | None = None) -> None:
        self.registers, self._quantisation = registers, quantisation

    def quantisation(self, weight: str, inputs: int) -> Quantisation | None:
        """As asked for; but routers, which decide what runs, stay as they are."""
        asked = self._quantisation
        fits = asked is not None and inputs % asked.group == 0
        return asked if fits and not stays(weight) else None

    def ffn(
        self, spec: BlockFFNSpec, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        hidden, experts, size = spec.hidden_size, spec.num_experts, spec.expert_size
        up, down = (panel_width(n, self.registers.widest) for n in (size, hidden))
        tiling = tile.Tiling(up, down, self.registers)
        function = cpu.chunk_sparse_ffn(
            hidden, experts, size, dtype, spec.act, spec.gated, tiling, quantisation
        )
        return function, up, down

    def linear(
        self, inputs: int, outputs: int, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        panel, registers = panel_width(outputs, self.registers.widest), self.registers
        function = linear.panel_linear(inputs, outputs, dtype, panel, registers, quantisation)
        return function, panel


class CudaKernels(_Packing):
    """Kernels for a GPU that runs so many blocks at once."""

    attention = staticmethod(cuda_attention.cached_attention)
    store = staticmethod(cuda_cache.store_entries)
    move = staticmethod(cuda_cache.move_entries)

    def __init__(self, programs: int) -> None:
        self.programs = programs

    def ffn(
        self, spec: BlockFFNSpec, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        hidden, experts, size = spec.hidden_size, spec.num_experts, spec.expert_size
        function = cuda_ffn.chunk_sparse_ffn(
            hidden, experts, size, dtype, spec.act, spec.gated, self.programs
        )
        return function, PANEL, PANEL

    def linear(
        self, inputs: int, outputs: int, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int]:
        """See :class:`~blockffn_compile.passes.relax.Kernels`."""
        return cuda_linear.panel_linear(inputs, outputs, dtype), PANEL


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
            made = torch.cat(rows).to(dtype)
            if panels.quantisation is not None:
                try:
                    made = quantised(made, panels.quantisation)[panels.scales]
                except ValueError as error:
                    names = " or ".join(weight.name for weight in panels.weights)
                    raise ValueError(f"{names}: {error}") from None
            yield to_panels(made[None], panels.panel)
