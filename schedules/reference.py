"""The last resort: every expert for every token, in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blockffn_compile.layer import Activation, experts_reference
from blockffn_compile.schedules.packing import unfold
from blockffn_compile.schedules.plan import Problem, Regime
from blockffn_compile.schedules.quantisation import dequantised


def dense(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    w_gate: Tensor | None,
    act: Activation,
    up_axes: str,
    down_axes: str,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """[T, H]; differentiable in every float tensor.  Weights are stored with the given axes.

    ``scales`` are those of quantised weights: up, down and, where there is one, gate.
    """
    if scales:
        w_up, w_down = (
            dequantised(w, s, x.dtype) for w, s in zip((w_up, w_down), scales[:2], strict=True)
        )
        w_gate = None if w_gate is None else dequantised(w_gate, scales[2], x.dtype)
    sizes = axis_sizes(x, scores, w_up)
    up = unfold(w_up, up_axes, sizes, "esh")
    gate = None if w_gate is None else unfold(w_gate, up_axes, sizes, "esh")
    return experts_reference(x, scores, up, unfold(w_down, down_axes, sizes, "ehs"), act, gate)


def axis_sizes(x: Tensor, scores: Tensor, w_up: Tensor) -> dict[str, int]:
    """Lengths of the axes e, s and h of a problem."""
    h, e = x.shape[1], scores.shape[1]
    return {"e": e, "h": h, "s": w_up.numel() // (e * h)}


def schedule(problem: Problem, regime: Regime):  # type: ignore[no-untyped-def]
    """Takes every problem."""

    def kernel(
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
        act = problem.act
        out.copy_(dense(x, scores, w_up, w_down, w_gate, act, up_axes, down_axes, scales))

    return kernel
