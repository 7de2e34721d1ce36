"""How many bytes the kernels of a layer move: a model, exact for the loads they issue.

What is only fetched into the level 2 cache, to be loaded from there, is not counted twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from blockffn_compile.schedules.plan import Problem, regime
from blockffn_compile.schedules.triton.config import bucket, load_table


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch.

    Attributes:
        fewest: what any kernel must read: the weights of the union, once.
        memory: read or written once, whatever it is, if the level 2 cache keeps what is used again.
        requested: all loads and stores of all programs, weights included; the level 2 cache serves
            what is more than ``memory``.
    """

    fewest: int
    memory: int
    requested: int


def layer_traffic(
    problem: Problem, scores: Tensor, capability: tuple[int, int]
) -> dict[str, Traffic]:
    """Traffic of ``up`` and ``down`` of a layer, without the plan's few kilobytes.

    Args:
        problem: what runs, in 16-bit floats.
        scores: [T, E], T at most ``SEGMENT``.
        capability: of the GPU whose safe configurations are used.
    """
    h, s = problem.hidden_size, problem.expert_size
    tokens, on = len(scores), scores != 0
    prefill = regime(tokens) == "prefill"
    table = load_table("", capability, problem)
    pairs, union = int(on.sum()), int(on.any(0).sum())
    result = {}
    for name, gates, outputs, inputs in (
        ("up", 2 if problem.gated else 1, s, h),
        ("down", 1, h, s),
    ):
        config = table[f"prefill {name}" if prefill else f"{name} {bucket(tokens)}"]
        if prefill and name == "up":
            # An expert's weights are read for each tile of its tokens.
            reads = sum(math.ceil(int(count) / config.tokens) for count in on.sum(0))
        else:
            # A tile of tokens reads the weights of its own union.
            reads = sum(int(part.any(0).sum()) for part in on.split(config.tokens))
        weights = 2 * gates * h * s
        requested = weights * reads + 2 * pairs * inputs * math.ceil(outputs / config.rows)
        # The results of a pair lie between the two; a token's inputs and results outside.
        once = 2 * pairs * s + 2 * tokens * h
        if name == "up":
            # The plan looks for NaN in tokens without experts.
            requested += 2 * h * int((~on.any(1)).sum()) + 2 * pairs * s
        else:
            requested += 2 * tokens * h
        result[name] = Traffic(weights * union, weights * union + once, requested)
    return result
