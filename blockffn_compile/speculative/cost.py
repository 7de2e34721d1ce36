"""What a verification costs on this machine, by its number of nodes."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping

from blockffn_compile.engines.engine import BUCKETS, Engine
from blockffn_compile.speculative.tree import DraftTree

#: Calls that are timed; only the faster half counts, so that a busy moment does not.
CALLS = 12


def fastest_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call: the median of the faster half of several."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(sorted(times)[: CALLS // 2])


def measure(
    engine: Engine, progress: Callable[[int], object] = lambda bucket: None
) -> dict[int, float]:
    """Milliseconds of one verification for each token count that the engine prepares for.

    The trees hold different tokens, so that they use as many experts as real ones, or more.
    Compiles whatever is not yet compiled.  The text of row 0 is forgotten.

    Args:
        engine: any.
        progress: called with each token count when it is done.
    """
    cost: dict[int, float] = {}
    stride = max(1, engine.vocab_size // BUCKETS[-1])
    tokens = [i * stride % engine.vocab_size for i in range(BUCKETS[-1])]
    engine.prefill(0, tokens[: max(1, min(BUCKETS[-1], engine.max_length // 2))])
    for bucket in BUCKETS:
        if engine.length(0) + bucket > engine.max_length:
            break
        tree = DraftTree.chain(tokens[0], tokens[1:bucket], [0.0] * (bucket - 1))
        engine.verify({0: tree})
        cost[bucket] = fastest_ms(functools.partial(engine.verify, {0: tree}))
        progress(bucket)
    return cost


def share(cost: Mapping[int, float], texts: int) -> dict[int, float]:
    """One text's part of ``cost`` where several are verified at once, all with equal trees."""
    sizes = sorted(cost)
    parts = {1: cost[sizes[-1]] / texts}
    for nodes in sizes:
        for bucket in sizes:
            if bucket >= nodes * texts:
                parts[nodes] = cost[bucket] / texts
                break
    return parts
