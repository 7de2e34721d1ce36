"""How many bytes the decode and chunk kernels move: a model, exact for the loads they issue."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from blockffn_compile.schedules.plan import Problem
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


def chunk_traffic(
    problem: Problem, scores: Tensor, capability: tuple[int, int]
) -> dict[str, Traffic]:
    """Traffic of ``up`` and ``down`` of ``chunk.py``, without the plan's few kilobytes.

    Args:
        problem: what runs, in 16-bit floats.
        scores: [T, E], T at most 64.
        capability: of the GPU whose safe configurations are used.
    """
    h, s = problem.hidden_size, problem.expert_size
    tokens, on = len(scores), scores != 0
    table = load_table("", capability, problem)
    pairs = int(on.sum())
    weights = 2 * h * s * int(on.any(0).sum())
    result = {}
    for name, gates, outputs, inputs in (
        ("up", 2 if problem.gated else 1, s, h),
        ("down", 1, h, s),
    ):
        config = table[f"{name} {bucket(tokens)}"]
        # A group of tokens reads the weights of its own union, and a tile of rows its inputs.
        groups = sum(int(part.any(0).sum()) for part in on.split(config.tokens))
        tiles = math.ceil(outputs / config.rows)
        requested = 2 * gates * h * s * groups + 2 * pairs * inputs * tiles
        if name == "up":
            # The plan looks for NaN in tokens without experts.
            once = 2 * tokens * h + 2 * pairs * s
            requested += 2 * h * int((~on.any(1)).sum()) + 2 * pairs * s
        else:
            once = 2 * pairs * s + 2 * tokens * h
            requested += 2 * tokens * h
        result[name] = Traffic(gates * weights, gates * weights + once, requested)
    return result
