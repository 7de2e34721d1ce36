"""The published shapes on an NVIDIA GPU: FFN layers, and decoding at the 2.8B shape.

Run: ``python -m benchmarks.gpu`` [--json FILE], 24 GB of GPU memory, under 8 minutes.  36 layers
with different weights, so that no cache holds them; routing replayed at the published densities;
every form checked against fp64 first.  A layer is timed without its router.  ``--traffic`` prints
the bytes that each kernel moves by their model, and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import blockffn_compile.backend  # noqa: F401
from benchmarks.first_light import DTYPE, EXPERT_SIZE, EXPERTS, HIDDEN, WORK, routing
from benchmarks.scale import ACCEPTED, CONTEXT, SHAPE, random_model
from benchmarks.scale import check as check_logits
from benchmarks.speculative import record
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.layer import experts_reference
from blockffn_compile.models.cache import StaticCache
from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import ChunkKernel, find_gpu, unsupported
from blockffn_compile.schedules.triton.traffic import layer_traffic
from blockffn_compile.schedules.tuner import replay_us, warm_up
from blockffn_compile.speculative.tree import DraftTree

LAYERS = 36
#: Tokens, and densities of the union and of pairs, of what the traffic of prefill is printed for.
PREFILL = 512, 0.8, 0.125
#: Slack over the active fraction of a dense layer's time; share of the copy bandwidth; published
#: ratios of plain and speculative decoding over dense.
SLACK, BANDWIDTH, PLAIN, SPECULATIVE = 1.05, 0.85, 3.14, 3.67


def copy_gb_per_s() -> float:
    """Bytes read and written by a copy that no cache holds, per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_us(lambda: target.copy_(source)) / 1e3


def sparse(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What the backend puts in the place of a layer: up [E, S, H] and down [E, H, S]."""
    result: Tensor = torch.ops.blockffn.chunk_sparse_ffn(x, scores, up, down, "silu")
    return result


def block(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The published form, with the same weights."""
    return experts_reference(x, scores, up, down, "silu")


def linear(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two matmuls, the fastest dense form there is: up [E * S, H] and down [H, E * S]."""
    mid = functional.silu(functional.linear(x, up)).unflatten(1, (EXPERTS, EXPERT_SIZE))
    return functional.linear((mid * scores.unsqueeze(-1)).flatten(1), down)


SUBJECTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "blockffn": (sparse, "default"),
    "inductor": (block, "default"),
    "inductor, two matmuls": (linear, "default"),
    "inductor, two matmuls, max-autotune": (linear, "max-autotune-no-cudagraphs"),
}


def error(result: Tensor, x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> float:
    """Relative Frobenius error against fp64."""
    want = experts_reference(x.double(), scores.double(), up.double(), down.double(), "silu")
    return ((result.double() - want).norm() / want.norm()).item()


def layer_us(
    call: Callable[..., object], x: Tensor, scores: list[Tensor], weights: list[list[Tensor]]
) -> float:
    """Microseconds of a layer: of one CUDA graph of all, so that the host is not timed."""

    def all_layers() -> None:
        for its_scores, its_weights in zip(scores, weights, strict=True):
            call(x, its_scores, *its_weights)

    return replay_us(all_layers) / len(weights)


def parts(x: Tensor, scores: list[Tensor], weights: list[list[Tensor]]) -> dict[str, float]:
    """Microseconds of a layer with no expert on, and without what the kernels do to save time."""
    problem = Problem(HIDDEN, EXPERTS, EXPERT_SIZE, "silu", False, DTYPE, "cuda")
    gpu, out = find_gpu(torch.cuda.current_device(), problem), torch.empty_like(x)
    idle = [torch.zeros_like(s) for s in scores]
    result = {}
    for name, variant, its_scores in (
        ("no expert on", gpu, idle),
        ("fetching nothing ahead", dataclasses.replace(gpu, cache=0), scores),
        ("launches one by one", dataclasses.replace(gpu, follows=False), scores),
        ("neither", dataclasses.replace(gpu, cache=0, follows=False), scores),
    ):
        kernel = ChunkKernel(problem, variant)

        def call(x: Tensor, s: Tensor, up: Tensor, down: Tensor, run: Any = kernel) -> None:
            run(x, s, up, down, None, "e,s,h", "e,h,s", out)

        result[name] = layer_us(call, x, its_scores, weights)
    return result


def check() -> None:
    """Raises SystemExit, with the way out, where kernels cannot run."""
    built = torch.version.cuda
    if not torch.cuda.is_available():
        raise SystemExit(
            f"error: PyTorch {torch.__version__} finds no NVIDIA GPU; "
            + (
                f"it needs a driver for CUDA {built} or newer, see nvidia-smi"
                if built
                else "it is built without CUDA: install torch from PyPI or from "
                "https://download.pytorch.org/whl/cu130"
            )
        )
    if (reason := unsupported(DTYPE)) is not None:
        raise SystemExit(f"error: {reason}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise SystemExit("error: Triton needs Python's headers; install python3-dev")


@torch.no_grad()
def ffn(console: Console) -> list[dict[str, Any]]:
    """One record for each token count and peer."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    bandwidth = copy_gb_per_s()
    sizes = (EXPERTS, EXPERT_SIZE, HIDDEN), (EXPERTS, HIDDEN, EXPERT_SIZE)
    layers = [
        [torch.randn(size, dtype=DTYPE, device="cuda").mul_(size[-1] ** -0.5) for size in sizes]
        for _ in range(LAYERS)
    ]
    matmuls = [[up.flatten(0, 1), down.transpose(0, 1).flatten(1)] for up, down in layers]
    records = []
    for tokens, union, pairs, *_ in WORK:
        torch._dynamo.reset()
        x = torch.randn(tokens, HIDDEN, generator=generator).to("cuda", DTYPE)
        scores = [routing(tokens, union, pairs, generator).cuda() for _ in layers]
        plain = error(block(x, scores[0], *layers[0]), x, scores[0], *layers[0])
        ms = {}
        for name, (form, mode) in SUBJECTS.items():
            with console.status(f"{tokens} tokens: {name}"):
                call: Any = torch.compile(form, mode=mode, fullgraph=True)
                weights = matmuls if form is linear else layers
                wrong = error(call(x, scores[0], *weights[0]), x, scores[0], *layers[0])
                if not wrong <= 1.5 * plain:
                    raise SystemExit(f"{name}: error {wrong:.2e}, eager {plain:.2e}")

                ms[name] = layer_us(call, x, scores, weights) / 1e3
        best = min((n for n in ms if n != "blockffn"), key=ms.__getitem__)
        active = statistics.mean((s != 0).any(0).float().mean().item() for s in scores)
        share = ms["blockffn"] / ms[best]
        read = active * 4 * EXPERTS * EXPERT_SIZE * HIDDEN
        reached = read / ms["blockffn"] / 1e6 / bandwidth
        table = Table(title=f"FFN ({HIDDEN}, {EXPERTS}, {EXPERT_SIZE}), {tokens} tokens, "
                            f"{active:.2%} of the experts in the union")  # fmt: skip
        for column in ("form", "microseconds a layer", "share of the best dense", "bar"):
            table.add_column(column, justify="left" if column == "form" else "right")
        for name, value in ms.items():
            bar = f"<= {SLACK * active:.2%}" if name == "blockffn" else ""
            table.add_row(name, f"{value * 1e3:.2f}", f"{value / ms[best]:.2%}", bar)
        for name, us in parts(x, scores, layers).items():
            table.add_row(f"blockffn, {name}", f"{us:.2f}", f"{us / 1e3 / ms[best]:.2%}", "")
        console.print(table)
        bar = f" (bar: {BANDWIDTH:.0%})" if tokens == 1 else ""
        console.print(f"{reached:.1%} of the copy bandwidth, {bandwidth:.0f} GB/s{bar}; "
                      f"{share / active:.3f} of the active fraction (bar: {SLACK})")  # fmt: skip
        density = statistics.mean((s != 0).float().mean().item() for s in scores)
        shape = {"shape": [HIDDEN, EXPERT_SIZE, EXPERTS], "tokens": tokens, "dtype": "bfloat16",
                 "pair_density": density, "union_density": active,
                 "copy_gb_per_s": bandwidth, "bandwidth_share": reached}  # fmt: skip
        for name, value in ms.items():
            if name != "blockffn":
                records.append(record("ffn", "blockffn", name, ms["blockffn"], value) | shape)
    return records


def median_ms(call: Callable[[], object], calls: int = 20) -> float:
    """Milliseconds of a call, host included, after a while in which the clock may rise."""
    warm_up(call)
    times = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def decode(console: Console) -> list[dict[str, Any]]:
    """Plain and speculative decoding at the 2.8B shape, weights random, routing replayed."""
    with console.status("2.8B shape: two layers against fp64"):
        check_logits("cuda")
    with console.status("2.8B shape: model"):
        model = random_model(SHAPE).to("cuda")
    cache = StaticCache(SHAPE, 1, CONTEXT + 64, torch.bfloat16, "cuda")
    tokens = torch.zeros(1, dtype=torch.long, device="cuda")
    positions = torch.tensor([CONTEXT], device="cuda")
    with console.status("2.8B shape: dense"):
        dense: Any = torch.compile(model, backend="inductor", fullgraph=True)
        dense_ms = replay_us(lambda: dense(tokens[None], positions, cache)) / 1e3
    engine = TorchEngine(model, max_length=CONTEXT + 64)
    costs = {}
    for nodes in (1, 32):
        # The path that is right is not the first, so that a commit has something to move.
        parents = np.maximum(np.arange(nodes) - 2, np.minimum(np.arange(nodes) - 1, 0))
        tree = DraftTree(np.arange(nodes), parents, np.zeros(nodes, np.float32))

        def step(tree: DraftTree = tree) -> None:
            # What is in the cache costs the same whatever it says.
            engine._texts.lengths[0] = CONTEXT
            engine.verify({0: tree})
            engine.commit(0, [0, 2, 4] if len(tree) > 1 else [0])

        with console.status(f"2.8B shape: {nodes} nodes"):
            costs[nodes] = median_ms(step)
    speculative = costs[32] / ACCEPTED
    table = Table(title=f"decoding at the 2.8B shape, bf16, {CONTEXT} tokens of context")
    for column in ("", "ms a token", "faster than dense", "bar"):
        table.add_column(column)
    table.add_row("dense, inductor", f"{dense_ms:.3f}", "")
    table.add_row("blockffn, plain", f"{costs[1]:.3f}", f"{dense_ms / costs[1]:.2f}x",
                  f"{PLAIN}x")  # fmt: skip
    table.add_row(
        f"blockffn, 32 nodes, {ACCEPTED} tokens a step as published, drafting free",
        f"{speculative:.3f}", f"{dense_ms / speculative:.2f}x", f"{SPECULATIVE}x",
    )  # fmt: skip
    console.print(table)
    console.print("verification and commit by nodes, with the host's part, ms: "
                  + ", ".join(f"{nodes}: {ms:.3f}" for nodes, ms in costs.items()))  # fmt: skip
    work = "2.8B shape, replayed"
    return [
        record(work, "plain", "inductor", costs[1], dense_ms),
        record(work, "32 nodes, drafting free", "inductor", speculative, dense_ms),
    ]


def traffic(console: Console) -> None:
    """Prints what each kernel moves at the published shape, by the model."""
    problem = Problem(HIDDEN, EXPERTS, EXPERT_SIZE, "silu", False, DTYPE, "cuda")
    table = Table(title="bytes moved at the published shape, over the fewest possible")
    for column in ("tokens", "kernel", "fewest", "memory", "level 2 cache"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    generator = torch.Generator().manual_seed(0)
    for tokens, union, pairs in (*((n, u, p) for n, u, p, *_ in WORK), PREFILL):
        scores: Tensor = routing(tokens, union, pairs, generator)
        for name, moved in layer_traffic(problem, scores, (9, 0)).items():
            table.add_row(
                str(tokens), name, f"{moved.fewest / 1e6:.2f} MB",
                f"{moved.memory / moved.fewest:.3f}x", f"{moved.requested / moved.fewest:.2f}x",
            )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    parser.add_argument("--traffic", action="store_true", help="print the traffic model alone")
    parser.add_argument("--check", action="store_true", help="say whether kernels can run here")
    options = parser.parse_args()
    console = Console(width=110)
    if options.traffic:
        traffic(console)
        return
    check()
    if options.check:
        return
    card = torch.cuda.get_device_name()
    traffic(console)
    console.print(card)
    records = [entry | {"card": card} for entry in ffn(console) + decode(console)]
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
