"""Small problems, run through a kernel and by the plain layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blockffn_compile.layer import experts_reference
from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import TritonKernel
from blockffn_compile.schedules.triton.config import KERNELS, Config, Gpu, Table

#: Every value of every axis, not every product; small, because the interpreter is slow.
PROBLEMS = {
    "even": Problem(128, 4, 32, "silu", False, torch.bfloat16, "cuda"),
    "even gated": Problem(128, 4, 32, "silu", True, torch.float16, "cuda"),
    "odd": Problem(52, 5, 24, "gelu", False, torch.float16, "cuda"),
    "odd gated": Problem(76, 3, 20, "relu", True, torch.bfloat16, "cuda"),
    "one expert": Problem(48, 1, 32, "gelu", True, torch.bfloat16, "cuda"),
}
MANY_EXPERTS = Problem(32, 512, 16, "relu", False, torch.float16, "cuda")


def table(tokens: int = 32, rows: int = 64, depth: int = 16, programs: int = 2) -> Table:
    """One configuration for all kernels; the interpreter has no pipeline."""
    config = Config(tokens, rows, depth, stages=1, programs=programs)
    return dict.fromkeys(KERNELS, config)


def gpu(cache: int = 1 << 20, **config: int) -> Gpu:
    """One multiprocessor, with the configuration of :func:`table`."""
    return Gpu(table(**config), 1, cache)


def weights(problem: Problem, seed: int = 0) -> dict[str, Any]:
    e, h, s = problem.num_experts, problem.hidden_size, problem.expert_size
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=g) * size[-1] ** -0.5).to(problem.dtype)

    return {
        "w_up": normal(e, s, h),
        "w_down": normal(e, h, s),
        "w_gate": normal(e, s, h) if problem.gated else None,
    }


def inputs(problem: Problem, tokens: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(tokens, problem.num_experts, generator=g) < density
    scores = torch.randn(tokens, problem.num_experts, generator=g) * active
    x = torch.randn(tokens, problem.hidden_size, generator=g)
    return x.to(problem.dtype), scores.to(problem.dtype)


def run(
    kernel: TritonKernel,
    x: Tensor,
    scores: Tensor,
    w: dict[str, Any],
    up_axes: str = "e,s,h",
    down_axes: str = "e,h,s",
) -> Tensor:
    out = torch.full_like(x, math.nan, memory_format=torch.contiguous_format)
    kernel(x, scores, w["w_up"], w["w_down"], w["w_gate"], up_axes, down_axes, out)
    return out


def eager(problem: Problem, x: Tensor, scores: Tensor, w: dict[str, Any]) -> Tensor:
    return experts_reference(x, scores, w["w_up"], w["w_down"], problem.act, w["w_gate"])


def oracle(problem: Problem, x: Tensor, scores: Tensor, w: dict[str, Any]) -> Tensor:
    """The plain layer in fp64."""
    double = {name: None if t is None else t.double() for name, t in w.items()}
    return eager(problem, x.double(), scores.double(), double)


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
