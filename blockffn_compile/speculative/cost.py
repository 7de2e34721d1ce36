"""What a verification costs on this machine, by its number of nodes."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from blockffn_compile.engines.engine import BUCKETS, Engine, wait
from blockffn_compile.schedules.cache import DIGEST_BYTES, cached
from blockffn_compile.speculative.tree import DraftTree

#: Calls that are timed, fewer where they are slow; only the faster half counts, so that a busy
#: moment does not.
CALLS, LEAST_CALLS, BUDGET_MS = 12, 3, 500.0


def fastest_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call: the median of the faster half of several."""
    times: list[float] = []
    while len(times) < LEAST_CALLS or (len(times) < CALLS and sum(times) < BUDGET_MS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(sorted(times)[: len(times) // 2])


def measure(engine: Engine) -> dict[int, float]:
    """Milliseconds of one verification for each token count that the engine prepares for.

    The trees hold different tokens, so that they use as many experts as real ones, or more.  The
    text of row 0 is forgotten.
    """
    cost: dict[int, float] = {}
    stride = max(1, engine.vocab_size // BUCKETS[-1])
    tokens = [i * stride % engine.vocab_size for i in range(BUCKETS[-1])]
    engine.prefill(0, tokens[: max(1, min(BUCKETS[-1], engine.max_length // 2))])
    for bucket in BUCKETS:
        if engine.length(0) + bucket > engine.max_length:
            break
        tree = DraftTree.chain(tokens[0], tokens[1:bucket], [0.0] * (bucket - 1))

        def verify(tree: DraftTree = tree) -> None:
            wait(engine.verify({0: tree}))

        verify()
        cost[bucket] = fastest_ms(verify)
    # A tree may always be padded: what is measured as dearer than that, met a busy moment.
    for larger, smaller in itertools.pairwise(sorted(cost, reverse=True)):
        cost[smaller] = min(cost[smaller], cost[larger])
    return cost


def recall(engine: Engine, device: torch.device, identity: str) -> dict[int, float]:
    """The result of :func:`measure`, kept on disk for this machine.

    Args:
        engine: measured the first time.
        device: that it runs on.
        identity: whatever else its speed depends on, but for the machine, its threads, PyTorch and
            this package.
    """

    def make(path: Path) -> None:
        path.write_text(json.dumps(measure(engine)))

    versions = torch.__version__, version("blockffn-compile")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = (platform.node(), name, torch.get_num_threads(), *versions)
    path = cached("cost", f"{machine} {BUCKETS} {identity}", make, ".json")
    cost = json.loads(path.read_bytes()[:-DIGEST_BYTES])
    return {int(nodes): ms for nodes, ms in cost.items()}


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
