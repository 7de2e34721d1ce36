"""Triton kernels for NVIDIA GPUs, from compute capability 8.0."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockffn_compile.schedules.packing import unfold
from blockffn_compile.schedules.plan import Problem, Regime
from blockffn_compile.schedules.triton.config import LANES, Gpu, bucket, load_table

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
#: Tokens that prefill works on at a time: its intermediate results have a place for every pair.
SEGMENT = 2048


def cuda_schedule(problem: Problem, regime: Regime) -> TritonKernel | None:
    """One kernel for decode and chunk, another for prefill."""
    if problem.device != "cuda":
        return None
    reason = unsupported(problem.dtype)
    if reason is None and problem.quantisation is not None:
        reason = "they do not take quantised weights"
    if reason is not None:
        _warn(reason)
        return None
    return PrefillKernel(problem) if regime == "prefill" else ChunkKernel(problem)


def unsupported(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for this dtype on the current GPU, or None."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"tensor cores have no full-precision {name}; use float16 or bfloat16"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        has, needs = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return f"the GPU has compute capability {has}; the kernels need {needs}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is missing ({error}); install blockffn-compile[cuda]"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"blockffn: no Triton kernels: {reason}; sparse layers run every expert, in PyTorch",
        stacklevel=2,
    )


@functools.cache
def attention_kernel(dtype: torch.dtype, index: int) -> Callable[..., None] | None:
    """``cached_attention`` of ``attention.py`` for a GPU, or None without kernels."""
    with torch.cuda.device(index):
        if unsupported(dtype) is not None:
            return None
    from blockffn_compile.schedules.triton.attention import cached_attention

    return functools.partial(cached_attention, follows=_follows(index))


def _follows(index: int) -> bool:
    return torch.cuda.get_device_properties(index).major >= 9


@functools.cache
def find_gpu(index: int, problem: Problem) -> Gpu:
    """A GPU and its configurations for a problem."""
    gpu = torch.cuda.get_device_properties(index)
    return Gpu(
        load_table(gpu.name, (gpu.major, gpu.minor), problem),
        gpu.multi_processor_count,
        gpu.L2_cache_size,
        follows=_follows(index),
    )


class TritonKernel:
    """What the kernels of one problem share: checks, weights as views, and configurations."""

    def __init__(self, problem: Problem, gpu: Gpu | None = None) -> None:
        """Kernels for the GPU that the tensors are on, or as if for a given one."""
        import triton

        self.problem = problem
        self.sizes = {
            "e": problem.num_experts,
            "h": problem.hidden_size,
            "s": problem.expert_size,
        }
        self.columns = triton.next_power_of_2(-(-problem.num_experts // LANES))
        self._gpu = gpu

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
        """See :class:`blockffn_compile.schedules.Kernel`; there are no ``scales``."""
        tensors = [x, scores, w_up, w_down, *([] if w_gate is None else [w_gate])]
        if x.shape[0] != scores.shape[0] or any(
            t.dtype != x.dtype or t.device != x.device for t in tensors
        ):
            raise ValueError("x, scores and weights do not fit together")
        # Views: GPUs read rows of at least 32 bytes as fast as packed ones.
        up = unfold(w_up, up_axes, self.sizes, "esh")
        gate = up if w_gate is None else unfold(w_gate, up_axes, self.sizes, "esh")
        down = unfold(w_down, down_axes, self.sizes, "ehs")
        if gate.stride() != up.stride():
            gate = gate.contiguous()
            up = up.contiguous()
        with torch.cuda.device_of(x):
            self.run(x.contiguous(), scores.contiguous(), up, gate, down, out)

    def gpu(self, x: Tensor) -> Gpu:
        """What is launched for."""
        return self._gpu or find_gpu(x.device.index, self.problem)

    def run(
        self, x: Tensor, scores: Tensor, up: Tensor, gate: Tensor, down: Tensor, out: Tensor
    ) -> None:
        """Launches; weights are [E, S, H] and [E, H, S] with any strides."""
        raise NotImplementedError


class ChunkKernel(TritonKernel):
    """Up to 64 tokens; see ``chunk.py``."""

    def run(
        self, x: Tensor, scores: Tensor, up: Tensor, gate: Tensor, down: Tensor, out: Tensor
    ) -> None:
        from blockffn_compile.schedules.triton import chunk

        tokens, problem = x.shape[0], self.problem
        e, h, s = problem.num_experts, problem.hidden_size, problem.expert_size
        gpu = self.gpu(x)
        mid = x.new_empty(e * tokens * s)
        plan = x.new_empty(2 * LANES * self.columns + 1, dtype=torch.int64)
        poisons = x.new_empty(tokens, dtype=torch.float32)
        # What is fetched early shares the cache with what is at work.
        fetched = gpu.cache // 2 // (2 * h * s) if down.stride(2) == 1 else 0
        config = gpu.table[f"up {bucket(tokens)}"]
        most = e * -(-s // config.rows) * -(-tokens // config.tokens)
        chunk.up[(min(most, config.programs * gpu.processors),)](
            x, scores, up, gate, down, mid, plan, poisons, tokens, *up.stride(), *down.stride()[:2],
            H=h, E=e, S=s, ACT=problem.act, GATED=problem.gated, FETCH=min(e, fetched),
            FOLLOWS=gpu.follows, COLUMNS=self.columns, launch_pdl=gpu.follows,
            maxnreg=config.registers, **config.options(),
        )  # fmt: skip
        config = gpu.table[f"down {bucket(tokens)}"]
        chunk.down[(-(-h // config.rows) * -(-tokens // config.tokens),)](
            mid, down, plan, poisons, out, tokens, *down.stride(),
            H=h, S=s, FOLLOWS=gpu.follows, COLUMNS=self.columns, launch_pdl=gpu.follows,
            maxnreg=config.registers, **config.options(),
        )  # fmt: skip


class PrefillKernel(TritonKernel):
    """Any number of tokens; see ``prefill.py``."""

    def run(
        self, x: Tensor, scores: Tensor, up: Tensor, gate: Tensor, down: Tensor, out: Tensor
    ) -> None:
        parts = zip(x.split(SEGMENT), scores.split(SEGMENT), out.split(SEGMENT), strict=True)
        for part in parts:
            self._segment(*part, up, gate, down)

    def _segment(
        self, x: Tensor, scores: Tensor, out: Tensor, up: Tensor, gate: Tensor, down: Tensor
    ) -> None:
        from blockffn_compile.schedules.triton import prefill

        tokens, problem = x.shape[0], self.problem
        e, h, s = problem.num_experts, problem.hidden_size, problem.expert_size
        gpu = self.gpu(x)
        tile = gpu.table["prefill down"].tokens
        tiles = -(-tokens // tile)
        mid = x.new_empty(e * tokens * s)
        lists = x.new_empty(e * tokens, dtype=torch.int32)
        counts = x.new_empty(e, dtype=torch.int32)
        plans = x.new_empty(tiles * (2 * LANES * self.columns + 1), dtype=torch.int64)
        poisons = x.new_empty(tokens, dtype=torch.float32)
        prefill.plan[(e + tiles,)](
            x, scores, lists, counts, plans, poisons, tokens,
            H=h, E=e, COLUMNS=self.columns, TOKENS=tile,
        )  # fmt: skip
        config = gpu.table["prefill up"]
        most = e * -(-s // config.rows) * -(-tokens // config.tokens)
        prefill.up[(min(most, config.programs * gpu.processors),)](
            x, scores, up, gate, mid, lists, counts, tokens, *up.stride(),
            H=h, E=e, S=s, ACT=problem.act, GATED=problem.gated, COLUMNS=self.columns,
            **config.options(),
        )  # fmt: skip
        config = gpu.table["prefill down"]
        prefill.down[(tiles * -(-h // config.rows),)](
            mid, down, plans, poisons, out, tokens, *down.stride(),
            H=h, S=s, COLUMNS=self.columns, **config.options(),
        )  # fmt: skip
