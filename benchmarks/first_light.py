"""FFN layer at the 2.8B shape: chunk-sparse against dense layers under Inductor.

Every subject runs the same stack of layers with different weights, deep enough that no cache
holds them, on the same inputs with the same replayed routing, in one process, rounds
interleaved.  Run: ``python -m benchmarks.first_light [--json FILE]``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from blockffn_compile.layer import experts_reference
from blockffn_compile.training.metrics import chunk_sparsity

HIDDEN, EXPERT_SIZE, EXPERTS = 2048, 128, 128
DTYPE = torch.bfloat16
#: (tokens, union density, pair density, bar over Inductor as it comes, bar over the best dense).
WORK = ((1, 0.1245, 0.1245, 10.0, 6.0), (32, 0.3086, 0.1245, 3.0, 2.5))
PEERS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "inductor freezing": {"freezing": True},
    "inductor freezing max-autotune": {"freezing": True, "max_autotune": True},
}


class Experts(nn.Module):
    """The experts of one BlockFFN layer in the published form, fed with replayed scores."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, EXPERT_SIZE, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, EXPERT_SIZE))
        nn.init.normal_(self.up_proj, std=HIDDEN**-0.5)
        nn.init.normal_(self.down_proj, std=EXPERT_SIZE**-0.5)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        # The ReLU leaves replayed scores as they are, and is what proves their zeros exact.
        return experts_reference(x, scores.relu(), self.up_proj, self.down_proj, "silu")


class LinearExperts(nn.Module):
    """The same layer as two matmuls (``block_linear``), the fastest dense form there is."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        up, down = experts.up_proj.detach(), experts.down_proj.detach()
        self.up_proj = nn.Parameter(up.flatten(0, 1))
        self.down_proj = nn.Parameter(down.transpose(0, 1).reshape(HIDDEN, -1))

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        mid = nn.functional.silu(nn.functional.linear(x, self.up_proj))
        mid = mid.unflatten(1, (EXPERTS, EXPERT_SIZE)) * scores.relu().unsqueeze(-1)
        return nn.functional.linear(mid.flatten(1), self.down_proj)


class Stack(nn.Module):
    """Layers one after the other, each on the same input so that errors do not compound."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, scores: Tensor) -> list[Tensor]:
        return [layer(x, scores[i]) for i, layer in enumerate(self.layers)]


def routing(
    tokens: int, union: float, pairs: float, generator: torch.Generator, experts: int = EXPERTS
) -> Tensor:
    """Scores [tokens, experts] with the given union and pair densities, otherwise random."""
    chosen = torch.randperm(experts, generator=generator)[: round(union * experts)]
    count = round(pairs * experts * tokens)
    # Every expert of the union once, so that the density is met exactly; the rest at random.
    first = torch.randint(tokens, (len(chosen),), generator=generator)
    taken = torch.zeros(tokens, len(chosen), dtype=torch.bool)
    taken[first, torch.arange(len(chosen))] = True
    free = (~taken).nonzero()
    more = free[torch.randperm(len(free), generator=generator)[: count - len(chosen)]]
    taken[more[:, 0], more[:, 1]] = True
    scores = torch.zeros(tokens, experts)
    scores[:, chosen] = taken * (0.1 + torch.rand(taken.shape, generator=generator))
    return scores.to(DTYPE)


def relative_error(results: list[Tensor], oracle: list[Tensor]) -> float:
    """Largest relative Frobenius error over layers."""
    return max(
        ((got.double() - want).norm() / want.norm()).item()
        for got, want in zip(results, oracle, strict=True)
    )


def times(
    subjects: dict[str, Callable[[], object]], rounds: int, console: Console
) -> dict[str, list[float]]:
    """Milliseconds of each call, subjects interleaved."""
    result: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in track(range(rounds), description="timing", console=console, transient=True):
        for name, call in subjects.items():
            start = time.perf_counter()
            call()
            result[name].append((time.perf_counter() - start) * 1e3)
    return result


def medians(
    subjects: dict[str, Callable[[], object]], rounds: int, console: Console
) -> dict[str, float]:
    """Median milliseconds a call, subjects interleaved."""
    return {k: statistics.median(v) for k, v in times(subjects, rounds, console).items()}


def ffn(layers: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """The layer benchmark; one record for each token count and peer."""
    records = []
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        experts = [Experts().to(DTYPE) for _ in range(layers)]
        stack = Stack(list(experts)).eval()
        linear = Stack([LinearExperts(layer) for layer in experts]).eval()
    # All subjects share one code object, and each is an entry of its compile cache.
    torch._dynamo.config.recompile_limit = 64
    for tokens, union, pairs, bar_default, bar_best in WORK:
        torch._dynamo.reset()
        x = torch.randn(tokens, HIDDEN, generator=generator).to(DTYPE)
        scores = torch.stack([routing(tokens, union, pairs, generator) for _ in range(layers)])
        union_density = 1 - statistics.mean(chunk_sparsity(s != 0, tokens) for s in scores)
        with torch.no_grad():
            oracle = [
                experts_reference(
                    x.double(), s.double(), e.up_proj.double(), e.down_proj.double(), "silu"
                )
                for s, e in zip(scores, experts, strict=True)
            ]
            eager_error = relative_error(stack(x, scores), oracle)
            subjects: dict[str, tuple[Stack, str, dict[str, Any]]] = {}
            subjects["blockffn"] = (stack, "blockffn", {})
            for name, options in PEERS.items():
                subjects[name] = (stack, "inductor", options)
                subjects[f"{name} linear"] = (linear, "inductor", options)
            calls: dict[str, Callable[[], object]] = {}
            errors = {}
            for name, (module, backend, options) in subjects.items():
                with console.status(f"{tokens} tokens: compiling {name}"):
                    call = torch.compile(
                        module, backend=backend, options=options or None, fullgraph=True
                    )
                    # Options keep the subjects apart; Dynamo reads freezing from the globals.
                    with inductor_config.patch(options):
                        errors[name] = relative_error(call(x, scores), oracle)
                        call(x, scores)
                calls[name] = functools.partial(call, x, scores)
            gate = errors["blockffn"] <= 1.5 * eager_error
            if not gate:
                raise SystemExit(
                    f"wrong result: error {errors['blockffn']:.2e}, eager {eager_error:.2e}"
                )
            ms = {k: v / layers for k, v in medians(calls, rounds, console).items()}
        best = min((v, k) for k, v in ms.items() if k != "blockffn")[1]
        bars = {"inductor": bar_default, best: bar_best}
        table = Table(title=f"FFN ({HIDDEN}, {EXPERT_SIZE}, {EXPERTS}) {DTYPE}, {tokens} tokens, "
                            f"{(scores != 0).float().mean():.2%} of pairs, "
                            f"{union_density:.2%} in the union")  # fmt: skip
        for column in ("form", "ms a layer", "blockffn is faster by", "bar", "error / eager's"):
            table.add_column(column, justify="left" if column == "form" else "right")
        for name, value in ms.items():
            ratio = value / ms["blockffn"]
            bar = f">= {bars[name]:g}x" if name in bars else ""
            label = f"{name} (best dense)" if name == best else name
            relative = errors[name] / eager_error
            table.add_row(label, f"{value:.3f}", f"{ratio:.2f}x", bar, f"{relative:.2f}")
            if name != "blockffn":
                records.append(
                    {
                        "work": "ffn",
                        "shape": [HIDDEN, EXPERT_SIZE, EXPERTS],
                        "tokens": tokens,
                        "dtype": str(DTYPE).removeprefix("torch."),
                        "pair_density": (scores != 0).float().mean().item(),
                        "union_density": union_density,
                        "subject": "blockffn",
                        "peer": name,
                        "subject_ms": ms["blockffn"],
                        "peer_ms": value,
                        "ratio": ratio,
                        "gate": gate,
                    }
                )
        console.print(table)
    return records


def process_seconds(code: str, runs: int) -> float:
    """Median seconds that a fresh process reports on its last line."""
    return statistics.median(
        float(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout.split()[-1]
        )
        for _ in range(runs)
    )


IMPORT = """
import torch, time
start = time.perf_counter()
import blockffn_compile
print(time.perf_counter() - start)
"""

COMPILE = """
import os, tempfile, time
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
import torch
import blockffn_compile as b
from blockffn_compile.models import bundled_path
model = b.load_model(bundled_path())
tokens = torch.zeros(1, 1, dtype=torch.int64)
torch.compile(torch.nn.Linear(2, 2), backend="{warm}")(torch.ones(1, 2))
with torch.no_grad():
    start = time.perf_counter()
    torch.compile(model, backend="{backend}")(tokens)
    print(time.perf_counter() - start)
"""


def overheads(console: Console) -> None:
    """Import time, and compile time of the bundled model against Inductor's."""
    with console.status("import and compile time, in fresh processes"):
        process_seconds(COMPILE.format(backend="blockffn", warm="inductor"), 1)  # fills the cache
        imported = process_seconds(IMPORT, 5)
        inductor, ours = [], []
        for _ in range(3):
            inductor.append(process_seconds(COMPILE.format(backend="inductor", warm="inductor"), 1))
            ours.append(process_seconds(COMPILE.format(backend="blockffn", warm="inductor"), 1))
    ratio = statistics.median(ours) / statistics.median(inductor)
    table = Table(title="overheads")
    for column in ("what", "measured", "bar"):
        table.add_column(column)
    table.add_row("import beyond torch", f"{imported:.2f} s", "< 1 s")
    table.add_row("compile time / Inductor's, bundled model", f"{ratio:.2f}", "< 1.20")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    parser.add_argument("--layers", type=int, default=6, help="layers in the stack (0.27 GB each)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--skip-overheads", action="store_true")
    options = parser.parse_args()
    console = Console()
    load = os.getloadavg()[0]
    note = " (the machine is busy: expect noise)" if load > 0.5 else ""
    console.print(f"{torch.get_num_threads()} threads, load {load:.2f}{note}")
    records = ffn(options.layers, options.rounds, console)
    if not options.skip_overheads:
        overheads(console)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
