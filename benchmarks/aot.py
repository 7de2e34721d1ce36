"""Bundles against ``torch.compile`` on the bundled model, and against TVM's stock pipeline.

``python -m benchmarks.aot bundled``: decoding with a bundle and with the compiled engine, in one
process, text by text: step by step, the waiting threads of one would take the other's cores.  In
fp32 both must write the same tokens.  In bf16 they round at different places, so that ties fall
differently.  Logits must be as near to fp64 as in eager mode.

``python -m benchmarks.aot stock [--layers N]``: one step of a model of the 1.2B shape with random
weights and replayed routing, built by TVM's default pipeline with and without our pass.  Attention
and cache writes are our kernels on both sides, for the stock importer has none; that favours the
peer.  Its matmuls are naive loops, so there is a second peer, the fair one: our kernels with every
expert on.  Layers are alike and the first peer takes half a second for each: two by default.

``python -m benchmarks.aot startup``: from ``blockffn run`` to the first token, files in the page
cache, and the most memory that ``blockffn compile`` takes, both of a model of the whole 1.2B shape
in bf16; 8 GB of disk.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tvm
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from tvm import relax

from benchmarks.first_light import medians, routing
from benchmarks.scale import SMALLER, random_model
from benchmarks.speculative import prompts, record
from blockffn_compile.aot.bundle import load
from blockffn_compile.aot.compiler import build, executable
from blockffn_compile.aot.export import STEP_INPUTS, export
from blockffn_compile.aot.kernels import CpuKernels, pack
from blockffn_compile.aot.targets import get_target
from blockffn_compile.engines.engine import Engine
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.engines.tvm_engine import TvmEngine
from blockffn_compile.layer import CHUNK_TOKENS, BlockFFN
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model, write_checkpoint
from blockffn_compile.passes.relax import rewrite
from blockffn_compile.passes.relax_emit import Panels
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.tree import DraftTree

NEW, ROUNDS = 200, 3
#: Active experts of one token of the published 1.2B model, and in the union of eight.
PAIRS, UNION = 1 - 0.818, 1 - 0.728
CONTEXT = 64
EVERY = "bundle's pass, every expert on"


# --- Against torch.compile ------------------------------------------------------------------------


def write(engine: Engine, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, and milliseconds a token after the first."""
    steps = decode(engine, [prompt], NEW)
    tokens = list(next(steps).tokens)
    start = time.perf_counter()
    tokens += [token for step in steps for token in step.tokens]
    return tokens, (time.perf_counter() - start) * 1e3 / (len(tokens) - 1)


def error(engine: Engine, text: list[int], exact: Tensor) -> float:
    """Of the logits of a text's last 64 tokens."""
    engine.prefill(0, text[:-64])
    chain = DraftTree.chain(text[-64], text[-63:], [0.0] * 63)
    return (engine.verify({0: chain})[0].logits.double() - exact[-64:]).norm().item()


def bundled(console: Console) -> list[dict[str, Any]]:
    records = []
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    texts = prompts(tokenizer)["code, greedy"]
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(bundled_path(), dtype=dtype)
        compiled = TorchEngine(model, max_length=512)
        list(compiled.warm_up((1, 64)))
        with tempfile.TemporaryDirectory() as folder:
            path = build(bundled_path(), "native", Path(folder) / "bundle", dtype=dtype)
            bundle = TvmEngine(load(path), max_length=512)
        engines: dict[str, Engine] = {"bundle": bundle, "torch.compile": compiled}
        times: dict[str, list[float]] = {name: [] for name in engines}
        same = 0
        for index in range(ROUNDS * len(texts)):
            written = {}
            for name, engine in engines.items():
                written[name], ms = write(engine, texts[index % len(texts)])
                times[name].append(ms)
            same += written["bundle"] == written["torch.compile"]
        with torch.no_grad():
            text = texts[0] + written["bundle"]
            exact = copy.deepcopy(model).double()(torch.tensor([text]))[0]
            eager = model(torch.tensor([text]))[0, -64:].double()
        gate = error(bundle, text, exact) <= 1.5 * (eager - exact[-64:]).norm().item()
        if dtype == torch.float32:
            gate &= same == ROUNDS * len(texts)
        name = (
            f"decoding the bundled model, {str(dtype).removeprefix('torch.')}; "
            f"the same text {same / ROUNDS / len(texts):.0%}"
        )
        ours, theirs = (statistics.median(times[name]) for name in engines)
        records.append(record(name, "bundle", "torch.compile", ours, theirs, gate))
    return records


# --- Against TVM's stock pipeline -----------------------------------------------------------------


class Replayed(nn.Module):
    """The router's product, with the zeros of a trace instead of its own.

    The first token's experts have the published density of one token, those of the first eight
    together that of eight.
    """

    trace: Tensor

    def __init__(self, weight: nn.Parameter, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = weight
        trace = routing(8, UNION, PAIRS, generator, len(weight))
        self.register_buffer("trace", trace.repeat(CHUNK_TOKENS // 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (
            nn.functional.linear(x, self.weight).abs()
            * self.trace[torch.arange(x.shape[0], device=x.device)]
        )


def machine(mod: tvm.IRModule) -> relax.VirtualMachine:
    return relax.VirtualMachine(executable(mod, get_target("native").tvm), tvm.cpu())


def stock(layers: int, console: Console) -> list[dict[str, Any]]:
    model = random_model(dataclasses.replace(SMALLER, num_hidden_layers=layers))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, BlockFFN):
            module.router_proj = Replayed(module.router_proj.weight, generator)  # type: ignore
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with console.status("exporting and compiling"):
        kernels = CpuKernels(get_target("native").registers)
        mod, names = export(model, kernels)
        ours, done = rewrite(mod, "trunk", kernels)
        machines = {"bundle's pass": machine(ours), "TVM's default pipeline": machine(mod)}

    def weights(module: tvm.IRModule, panels: dict[str, Panels]) -> list[Any]:
        params = list(module["trunk"].params)[len(STEP_INPUTS) + 2 * layers :]
        made = (
            pack(panels[p.name], [state[names[w.name]] for w in panels[p.name].weights])
            if p.name in panels
            else state[names[p.name]].contiguous()
            for p in params
        )
        return [tvm.runtime.from_dlpack(tensor.detach()) for tensor in made]

    held = {
        "bundle's pass": weights(ours, done.panels),
        "TVM's default pipeline": weights(mod, {}),
    }
    state |= {name: t.clamp(min=0.1) for name, t in state.items() if name.endswith("trace")}
    machines[EVERY] = machines["bundle's pass"]
    held[EVERY] = weights(ours, done.panels)
    heads, key_dim, value_dim = model.config.cache_sizes
    cache = [
        tvm.runtime.from_dlpack(torch.zeros(1, heads, CONTEXT + 8, dim, dtype=torch.bfloat16))
        for _ in range(layers)
        for dim in (key_dim, value_dim)
    ]
    records = []
    for tokens in (1, 8):
        places = torch.arange(tokens)
        columns = (places, places + CONTEXT, places * 0, places * 0 + CONTEXT, places + CONTEXT)
        ancestors = (2 << places) - 1
        inputs = [tvm.runtime.from_dlpack(t.contiguous()) for t in (*columns, ancestors)]
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(vm["trunk"], *inputs, *cache, *held[name])
            for name, vm in machines.items()
        }
        with torch.no_grad():
            results = [from_dlpack(call()).float() for call in calls.values()]
        gate = bool((results[0] - results[1]).norm() <= 0.02 * results[1].norm())
        times = medians(calls, 5, console)
        name = f"{layers} layers of the 1.2B shape, {tokens} tokens"
        subject, *peers = times
        records += [record(name, subject, p, times[subject], times[p], gate) for p in peers]
    return records


# --- Start-up -------------------------------------------------------------------------------------


def write_random(checkpoint: Path) -> None:
    """A checkpoint of the 1.2B shape."""
    state = {n: t for n, t in random_model(SMALLER).state_dict().items() if ".trace" not in n}
    del state["lm_head.weight"]  # tied
    write_checkpoint(checkpoint, SMALLER.to_dict(), state, None)
    shutil.copy(bundled_path() / "tokenizer.json", checkpoint)


def startup(console: Console) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        # In a process of its own: Linux counts the most memory of a command from that of the
        # process that starts it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_random, checkpoint).result()
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        with console.status("blockffn compile"):
            _, peak = command("compile", str(checkpoint), "--out", str(bundle))
        start = ["run", str(bundle), "--prompt", "class Queue:", "--max-new-tokens", "1"]
        seconds = [command(*start)[0] for _ in range(ROUNDS)]
    console.print(f"blockffn compile: {peak / size:.2f} times the checkpoint's {size / 1e9:.2f} GB")
    first, *warm = seconds
    console.print(f"blockffn run, whole process with one token: {statistics.median(warm):.2f} s, "
                  f"{first:.2f} s the first time (hashes the weights)")  # fmt: skip
    return []


def command(*arguments: str) -> tuple[float, int]:
    """Seconds that a command of ``blockffn`` takes, and the most bytes in memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [Path(sys.executable).with_name("blockffn"), *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"blockffn {arguments[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("part", choices=("bundled", "stock", "startup"))
    parser.add_argument("--layers", type=int, default=2, help="of the stock part")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TVM_NUM_THREADS", str(torch.get_num_threads()))
    console = Console()
    parts = {"bundled": bundled, "stock": lambda c: stock(options.layers, c), "startup": startup}
    records = parts[options.part](console)
    table = Table("work", "subject", "ms", "peer", "ms", "ratio", "gate")
    for r in records:
        numbers = (f"{r['subject_ms']:.3f}", r["peer"], f"{r['peer_ms']:.3f}", f"{r['ratio']:.2f}")
        table.add_row(r["work"], r["subject"], *numbers, "passed" if r["gate"] else "FAILED")
    if records:
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
