"""How a chunk-sparse FFN runs: schedules, tried in order, each of which may decline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from blockffn_compile.schedules import reference, tir, triton
from blockffn_compile.schedules.plan import Problem, Regime


class Kernel(Protocol):
    """Runs one problem."""

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
        """Fills ``out`` [T, H] from x [T, H], scores [T, E] and weights with the given axes.

        Quantised weights come with the scales of up, down and, where there is one, gate.
        """
        ...


Schedule = Callable[[Problem, Regime], Kernel | None]

#: First one that does not decline wins; the reference never declines.
SCHEDULES: tuple[Schedule, ...] = (tir.cpu_schedule, triton.cuda_schedule, reference.schedule)


def select(problem: Problem, regime: Regime) -> Kernel:
    """The kernel of the first schedule that takes the problem."""
    for schedule in SCHEDULES:
        kernel = schedule(problem, regime)
        if kernel is not None:
            return kernel
    raise AssertionError("the reference schedule declined")
