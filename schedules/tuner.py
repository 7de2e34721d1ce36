"""Finds the fastest configurations of the Triton kernels on this GPU and writes them down.

``python -m blockffn_compile.schedules.tuner --hidden 2048 --experts 128 --size 128`` compiles 500
to 800 kernels, which takes about 20 minutes; what is found is written kernel by kernel, and
``--only "up 8" --only "down 8"`` tunes some.  Results do not depend on configurations, so nothing
else changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from blockffn_compile.layer import ACTIVATIONS
from blockffn_compile.schedules.plan import Problem, regime
from blockffn_compile.schedules.triton import ChunkKernel, PrefillKernel, config, find_gpu
from blockffn_compile.schedules.triton.config import Config, Table

#: Experts of a token, and in the union of 32, as measured on the published models.
PAIRS, UNION = 0.125, 0.31
PREFILL_TOKENS = 512


def candidates(name: str, problem: Problem, limit: int) -> list[Config]:
    """Configurations worth a try for a kernel, e.g. ``up 8``, within bytes of shared memory."""
    tokens: tuple[int, ...]
    if name.startswith("prefill"):
        tokens = (64, 128) if name == "prefill up" else (64,)
        rows, depths, warps = [64, 128], [32, 64], [4, 8]
    else:
        most = int(name.split()[1])
        tokens = tuple(size for size in (8, 16, 32) if most // 4 <= size <= most)
        rows, depths, warps = [16, 32], [32, 64, 128], [config.LANES]
    stages = [3, 5, 7, 9] if "down" in name else [2, 3, 4, 5, 6]
    programs = [1, 2]
    choices = itertools.product(tokens, rows, depths, stages, warps, programs)
    fitted = (config.fit(name, Config(*choice), problem, limit) for choice in choices)
    return list(dict.fromkeys(fitted))


def tune(
    problem: Problem,
    start: Table,
    limit: int,
    measure: Callable[[str, Table], float],
    names: Sequence[str],
) -> Iterator[Table]:
    """A faster table after each kernel.

    Args:
        problem: what to run.
        start: a table that works.
        limit: bytes of shared memory of a program.
        measure: time with a table of the work that uses the kernel named; infinite if the GPU
            refuses it.
        names: the kernels, of ``start``.
    """
    table = dict(start)
    for name in track(names, description="tuning"):
        tables = [table] + [table | {name: c} for c in candidates(name, problem, limit)]
        table = min(tables, key=lambda t: measure(name, t))
        yield table


def write(gpu: str, problem: Problem, table: Table, folder: Path = config.TUNED) -> Path:
    """Adds the table of a shape to the file of a GPU; returns the file."""
    path = folder / f"{config.gpu_name(gpu)}.json"
    shapes = json.loads(path.read_text()) if path.exists() else {}
    shapes[config.shape_name(problem)] = {n: dataclasses.asdict(c) for n, c in table.items()}
    entries = (
        f"  {json.dumps(shape)}: {{\n"
        + ",\n".join(f"    {json.dumps(n)}: {json.dumps(c)}" for n, c in kernels.items())
        + "\n  }"
        for shape, kernels in shapes.items()
    )
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    return path


def routing(tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Scores [tokens, experts] with about the published densities."""
    union = min(1.0, PAIRS + (UNION - PAIRS) * math.log2(tokens) / 5)
    on = torch.rand(tokens, experts, generator=generator) < PAIRS / union
    on &= torch.rand(experts, generator=generator) < union
    return on * (0.1 + torch.rand(tokens, experts, generator=generator))


class Bench:
    """Times kernels on the current GPU, over layers whose weights no cache holds."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        e, h, s = problem.num_experts, problem.hidden_size, problem.expert_size
        self.gpu = find_gpu(torch.cuda.current_device(), problem)
        used = 4 * e * h * s * PAIRS
        self.layers = max(2, math.ceil(3 * self.gpu.cache / used))
        self.weights = [self._random(e, s, h) for _ in range(self.layers)]
        self.downs = [self._random(e, h, s) for _ in range(self.layers)]

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self.problem.dtype, device="cuda").mul_(size[-1] ** -0.5)

    def __call__(self, name: str, table: Table) -> float:
        """Microseconds a layer of the work that the kernel is for."""
        from triton.runtime.errors import OutOfResources, PTXASError

        tokens = PREFILL_TOKENS if name.startswith("prefill") else int(name.split()[1])
        tokens = 1 if tokens == config.BUCKETS[0] else tokens
        kind = PrefillKernel if regime(tokens) == "prefill" else ChunkKernel
        kernel = kind(self.problem, dataclasses.replace(self.gpu, table=table))
        generator = torch.Generator().manual_seed(0)
        x = self._random(tokens, self.problem.hidden_size)
        scores = routing(tokens, self.problem.num_experts, generator).to(x)
        out = torch.empty_like(x)

        def work() -> None:
            for up, down in zip(self.weights, self.downs, strict=True):
                gate = up if self.problem.gated else None
                kernel(x, scores, up, down, gate, "e,s,h", "e,h,s", out)

        try:
            return replay_us(work, 0.02) / self.layers
        except (OutOfResources, PTXASError):
            return math.inf


def warm_up(work: Callable[[], object], seconds: float = 0.3) -> None:
    """Works untimed for as long as a GPU that was idle takes to reach its clock."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        torch.cuda.synchronize()


def replay_us(work: Callable[[], object], warm_up_s: float = 0.3, replays: int = 50) -> float:
    """Microseconds that a CUDA graph of some work takes: the median of its replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    warm_up(graph.replay, warm_up_s)
    times = []
    for _ in range(replays):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # while it runs, the host launches the one that is timed
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, required=True, help="H")
    parser.add_argument("--experts", type=int, required=True, help="E")
    parser.add_argument("--size", type=int, required=True, help="S")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--act", choices=sorted(ACTIVATIONS), default="silu")
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--only", action="append", choices=config.KERNELS, help="tunes these")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: tuning needs an NVIDIA GPU, and PyTorch finds none")
    problem = Problem(
        options.hidden, options.experts, options.size, options.act, options.gated,
        getattr(torch, options.dtype), "cuda",
    )  # fmt: skip
    gpu, bench = torch.cuda.get_device_properties(), Bench(problem)
    start, limit = bench.gpu.table, config.shared_bytes((gpu.major, gpu.minor))
    for table in tune(problem, start, limit, bench, options.only or list(start)):
        path = write(gpu.name, problem, table)
    print(path)


if __name__ == "__main__":
    main()
