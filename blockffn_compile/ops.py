"""The operator ``blockffn::chunk_sparse_ffn``: schema, shape rule, dispatch and gradient.

And ``blockffn::dequantize``, the weights that integers and scales stand for.

The layer takes scores, not a router, so that any router with provable zeros can use it and recorded
routing can be replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockffn_compile.layer import ACTIVATIONS, Activation, Quantisation
from blockffn_compile.schedules import Kernel, reference, select
from blockffn_compile.schedules.plan import Problem, Regime, regime
from blockffn_compile.schedules.quantisation import dequantised, quantisation_of

torch.library.define(
    "blockffn::chunk_sparse_ffn",
    "(Tensor x, Tensor scores, Tensor w_up, Tensor w_down, str act, Tensor? w_gate=None, "
    'str up_axes="e,s,h", str down_axes="e,h,s", Tensor? up_scales=None, '
    "Tensor? down_scales=None, Tensor? gate_scales=None) -> Tensor",
)
torch.library.define(
    "blockffn::dequantize", "(Tensor values, Tensor scales, ScalarType dtype) -> Tensor"
)


def _given(*scales: Tensor | None) -> list[Tensor]:
    return [each for each in scales if each is not None]


def _fake(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    w_gate: Tensor | None = None,
    up_axes: str = "e,s,h",
    down_axes: str = "e,h,s",
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    gate_scales: Tensor | None = None,
) -> Tensor:
    weights = [w_up, w_down, *([] if w_gate is None else [w_gate])]
    scales = _given(up_scales, down_scales, gate_scales)
    torch._check(x.dim() == 2 and scores.dim() == 2, lambda: "x and scores must be [T, H], [T, E]")
    torch._check(
        x.shape[0] == scores.shape[0],
        lambda: f"x has {x.shape[0]} tokens, scores has {scores.shape[0]}",
    )
    torch._check(act in ACTIVATIONS, lambda: f"unknown activation {act!r}")
    if scales:
        torch._check(len(scales) == len(weights), lambda: "every weight must have its scales")
        for tensor in (*weights, *scales):
            torch._check(tensor.device == x.device, lambda: "tensors must have one device")
        for weight, its_scales in zip(weights, scales, strict=True):
            torch._check(
                weight.dtype in (torch.int8, torch.uint8) and weight.dtype == w_up.dtype,
                lambda: "weights with scales must all be int8 or all be uint8",
            )
            torch._check(
                its_scales.dtype == torch.bfloat16
                and quantisation_of(weight, its_scales) == quantisation_of(w_up, scales[0]),
                lambda: "scales must be bfloat16, of groups of one size",
            )
        weights = []
    for tensor in (x, scores, *weights):
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
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    gate_scales: Tensor | None = None,
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
        up_scales: where the weights are quantised: bfloat16, along the last axis, which is the
            summed one, h or s; see ``schedules/quantisation.py``.
        down_scales: likewise.
        gate_scales: likewise.

    Returns:
        [T, H].  A NaN in a token's x or scores makes its row NaN.  An Inf in x or in a weight of
        a skipped expert does not: running every expert would give 0 * Inf = NaN there.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: the axes do not describe a weight.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = _given(up_scales, down_scales, gate_scales)
    run_into(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes, y, scales)
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
    scales: Sequence[Tensor] = (),
) -> None:
    """The operator with its result written to ``out`` [T, H], contiguous."""
    try:
        if x.shape[0] == 0:
            _fake(x, scores, w_up, w_down, act, w_gate, up_axes, down_axes, *scales)
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
            quantisation_of(w_up, scales[0]) if scales else None,
        )
        kernel(x, scores, w_up, w_down, w_gate, up_axes, down_axes, out, scales)
    except Exception:
        # Kernels check what they are given; the shape rule says it in the op's own words.
        _fake(x, scores, w_up, w_down, act, w_gate, up_axes, down_axes, *scales)
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
    quantisation: Quantisation | None,
) -> Kernel:
    """The selected kernel; looked up on every call, so keyed by what is cheap to read."""
    if quantisation is not None:
        weight_size *= quantisation.per_byte
    size = weight_size // (hidden * experts)
    problem = Problem(hidden, experts, size, act, gated, dtype, device, quantisation)
    return select(problem, regime)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scores, w_up, w_down, act, w_gate, up_axes, down_axes, *scales = inputs
    ctx.save_for_backward(x, scores, w_up, w_down, w_gate, *_given(*scales))
    ctx.static = act, up_axes, down_axes


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the dense form: a score of zero has a gradient too."""
    saved, scales = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    tensors: list[Any] = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in saved
    ]
    x, scores, w_up, w_down, w_gate = tensors
    act, up_axes, down_axes = ctx.static
    with torch.enable_grad():
        y = reference.dense(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes, scales)
    needed = [t for t in tensors if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, needed, grad))
    dx, dscores, dup, ddown, dgate = (
        next(grads) if t is not None and t.requires_grad else None for t in tensors
    )
    return dx, dscores, dup, ddown, None, dgate, *(None,) * 5


def _fake_dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(
        values.dtype in (torch.int8, torch.uint8) and scales.dtype == torch.bfloat16,
        lambda: "values must be int8 or uint8, scales bfloat16",
    )
    *outer, last = values.shape
    return values.new_empty(*outer, last * (2 if values.dtype == torch.uint8 else 1), dtype=dtype)


torch.library.register_fake("blockffn::chunk_sparse_ffn", _fake)
torch.library.impl("blockffn::chunk_sparse_ffn", "CompositeExplicitAutograd", _run)
torch.library.register_autograd("blockffn::chunk_sparse_ffn", _backward, setup_context=_save)
torch.library.register_fake("blockffn::dequantize", _fake_dequantize)
torch.library.impl("blockffn::dequantize", "CompositeExplicitAutograd", dequantised)
