"""The operator ``blockffn::chunk_sparse_ffn``: schema, shape rule, dispatch and gradient.

It takes scores, not a router, so that any router with provable zeros can use it and recorded
routing can be replayed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from blockffn_compile.layer import ACTIVATIONS, Activation
from blockffn_compile.schedules import Kernel, reference, select
from blockffn_compile.schedules.plan import Problem, Regime, regime

torch.library.define(
    "blockffn::chunk_sparse_ffn",
    "(Tensor x, Tensor scores, Tensor w_up, Tensor w_down, str act, Tensor? w_gate=None, "
    'str up_axes="e,s,h", str down_axes="e,h,s") -> Tensor',
)


def _fake(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    w_gate: Tensor | None = None,
    up_axes: str = "e,s,h",
    down_axes: str = "e,h,s",
) -> Tensor:
    tensors = [x, scores, w_up, w_down, *([] if w_gate is None else [w_gate])]
    torch._check(x.dim() == 2 and scores.dim() == 2, lambda: "x and scores must be [T, H], [T, E]")
    torch._check(
        x.shape[0] == scores.shape[0],
        lambda: f"x has {x.shape[0]} tokens, scores has {scores.shape[0]}",
    )
    torch._check(act in ACTIVATIONS, lambda: f"unknown activation {act!r}")
    for tensor in tensors:
        torch._check(
            tensor.dtype == x.dtype and tensor.device == x.device,
            lambda: "x, scores and weights must have one dtype and device",
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    w_gate: Tensor | None = None,
    up_axes: str = "e,s,h",
    down_axes: str = "e,h,s",
) -> Tensor:
    """``y[t] = sum_e scores[t, e] * act(x[t] @ up[e].T) @ down[e].T`` over non-zero scores.

    With a gate, ``act(x @ gate.T) * (x @ up.T)`` stands for the activation.

    Args:
        x: [T, H], any T.
        scores: [T, E]; an expert runs for a token unless its score is exactly zero (+0 or -0).
        w_up: stored up weight with the axes ``up_axes`` (dims comma-separated, letters that
            share a dim merged row-major: ``"es,h"`` is [E*S, H]).
        w_down: stored down weight with the axes ``down_axes``.
        act: ``silu``, ``relu`` or ``gelu`` (exact).
        w_gate: gate weight stored like ``w_up``, or None.

    Returns:
        [T, H].  A NaN in a token's x or scores makes its row NaN.  An Inf in x or in a weight of
        a skipped expert does not: running every expert would give 0 * Inf = NaN there.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: the axes do not describe a weight.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run_into(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes, y)
    return y


def run_into(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    w_gate: Tensor | None,
    act: str,
    up_axes: str,
    down_axes: str,
    out: Tensor,
) -> None:
    """The operator with its result written to ``out`` [T, H], contiguous."""
    try:
        if x.shape[0] == 0:
            _fake(x, scores, w_up, w_down, act, w_gate, up_axes, down_axes)
            return
        kernel = _kernel(
            x.shape[1],
            scores.shape[1],
            w_up.numel(),
            act,
            w_gate is not None,
            x.dtype,
            x.device.type,
            regime(x.shape[0]),
        )
        kernel(x, scores, w_up, w_down, w_gate, up_axes, down_axes, out)
    except Exception:
        # Kernels check what they are given; the shape rule says it in the op's own words.
        _fake(x, scores, w_up, w_down, act, w_gate, up_axes, down_axes)
        raise


@functools.cache
def _kernel(
    hidden: int,
    experts: int,
    weight_size: int,
    act: Activation,
    gated: bool,
    dtype: torch.dtype,
    device: str,
    regime: Regime,
) -> Kernel:
    """The selected kernel; looked up on every call, so keyed by what is cheap to read."""
    size = weight_size // (hidden * experts)
    return select(Problem(hidden, experts, size, act, gated, dtype, device), regime)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scores, w_up, w_down, act, w_gate, up_axes, down_axes = inputs
    ctx.save_for_backward(x, scores, w_up, w_down, w_gate)
    ctx.static = act, up_axes, down_axes


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the dense form: a score of zero has a gradient too."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    x, scores, w_up, w_down, w_gate = tensors
    act, up_axes, down_axes = ctx.static
    with torch.enable_grad():
        y = reference.dense(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes)  # type: ignore[arg-type]
    needed = [t for t in tensors if t is not None]
    grads = iter(torch.autograd.grad(y, needed, grad))
    dx, dscores, dup, ddown, dgate = (None if t is None else next(grads) for t in tensors)
    return dx, dscores, dup, ddown, None, dgate, None, None


torch.library.register_fake("blockffn::chunk_sparse_ffn", _fake)
torch.library.impl("blockffn::chunk_sparse_ffn", "CompositeExplicitAutograd", _run)
torch.library.register_autograd("blockffn::chunk_sparse_ffn", _backward, setup_context=_save)
