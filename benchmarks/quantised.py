"""Quantised weights: the layer and decoding at the 2.8B shape, and what rounding costs.

Run: ``python -m benchmarks.quantised [layer] [decode] [quality]`` [--json FILE], 16 GB of memory;
2, 10 and 3 minutes.  The peer is bfloat16 with the same kernels.  Layers are checked against the
fp64 result of their own weights first; a decoding step is not, which its records say.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

import blockffn_compile.ops  # noqa: F401  registers the operator
from benchmarks.first_light import medians, relative_error, routing
from benchmarks.scale import CONTEXT, PAIRS, SHAPE, median_ms, random_model, union
from benchmarks.speculative import record
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.layer import experts_reference
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.quantisation import quantize
from blockffn_compile.schedules.quantisation import as_quantisation, dequantised, quantised
from blockffn_compile.speculative.tree import DraftTree
from blockffn_compile.training import corpus
from blockffn_compile.training.trainer import perplexity

SCHEMES = ("bfloat16", "int8", "int4")
LAYERS, TOKENS, SIZES = 6, (1, 4, 8, 32), (1, 8)
#: Tokens that the bundled model was trained to see.
WINDOW = 512


class Weights:
    """Up and down projections of one layer, and what they stand for."""

    def __init__(self, scheme: str, generator: torch.Generator) -> None:
        e, s, h = SHAPE.num_experts, SHAPE.expert_size, SHAPE.hidden_size
        up, down = (
            torch.randn(size, generator=generator).mul_(size[2] ** -0.5).bfloat16()
            for size in ((e, s, h), (e, h, s))
        )
        if scheme == "bfloat16":
            self.stored: dict[str, Tensor] = {"w_up": up, "w_down": down}
        else:
            way = as_quantisation(scheme, 32)  # type: ignore[arg-type]
            (up, up_scales), (down, down_scales) = quantised(up, way), quantised(down, way)
            self.stored = {"w_up": up, "w_down": down}
            self.stored |= {"up_scales": up_scales, "down_scales": down_scales}

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        y: Tensor = torch.ops.blockffn.chunk_sparse_ffn(x, scores, act="silu", **self.stored)
        return y

    def dense(self, x: Tensor, scores: Tensor) -> Tensor:
        up, down = self.stored["w_up"].to(x.dtype), self.stored["w_down"].to(x.dtype)
        if "up_scales" in self.stored:
            up = dequantised(self.stored["w_up"], self.stored["up_scales"], x.dtype)
            down = dequantised(self.stored["w_down"], self.stored["down_scales"], x.dtype)
        return experts_reference(x, scores, up, down, "silu")


def run(layers: list[Weights], x: Tensor, scores: list[Tensor]) -> list[Tensor]:
    return [each(x, s) for each, s in zip(layers, scores, strict=True)]


def layer(console: Console) -> list[dict[str, Any]]:
    """One FFN layer of several with different weights, milliseconds."""
    generator = torch.Generator().manual_seed(0)
    with console.status("quantising"):
        forms = {name: [Weights(name, generator) for _ in range(LAYERS)] for name in SCHEMES}
    table = Table("tokens", *(f"{name}, ms" for name in SCHEMES), title="FFN layer, 2.8B shape")
    records = []
    for tokens in TOKENS:
        x = torch.randn(tokens, SHAPE.hidden_size, generator=generator).bfloat16()
        scores = [routing(tokens, union(tokens), PAIRS, generator) for _ in range(LAYERS)]

        for name, layers in forms.items():
            first, routed = layers[0], scores[0]
            want = first.dense(x.double(), routed.double())
            ours, eager = (
                relative_error([y], [want]) for y in (first(x, routed), first.dense(x, routed))
            )
            if not ours <= 1.5 * eager:
                raise SystemExit(f"error: {name}, {tokens} tokens: error {ours}, eager's {eager}")
        subjects: dict[str, Callable[[], object]] = {
            name: functools.partial(run, layers, x, scores) for name, layers in forms.items()
        }
        medians(subjects, 2, console)
        ms = {name: value / LAYERS for name, value in medians(subjects, 15, console).items()}
        cells = (f"{ms[n]:.3f} ({ms['bfloat16'] / ms[n]:.2f}x)" for n in SCHEMES)
        table.add_row(str(tokens), *cells)
        work = f"FFN layer, {tokens} tokens"
        records += [record(work, n, "bfloat16", ms[n], ms["bfloat16"]) for n in SCHEMES[1:]]
    console.print(table)
    return records


@torch.no_grad()
def step(scheme: Any, layers: int) -> dict[str, float]:
    """Milliseconds of a decoding step by its number of tokens, and bytes of the weights."""
    model = random_model(dataclasses.replace(SHAPE, num_hidden_layers=layers))
    if scheme != "bfloat16":
        quantize(model, scheme)
    engine = TorchEngine(model, max_length=CONTEXT + 64)

    def verify(tokens: int) -> None:
        engine._texts.lengths[0] = CONTEXT  # what is in the cache costs the same whatever it says
        engine.verify({0: DraftTree.chain(0, range(1, tokens), [0.0] * (tokens - 1))})

    list(engine.warm_up(SIZES))
    stored = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    return {str(n): median_ms(lambda n=n: verify(n)) for n in SIZES} | {"GB": stored / 1e9}  # type: ignore


def decode(console: Console, layers: int) -> list[dict[str, Any]]:
    """Plain decoding, each form in a process that has room for it alone."""
    found: dict[str, dict[str, float]] = {}
    for scheme in SCHEMES:
        with console.status(f"2.8B shape, {scheme}"):
            command = [sys.executable, "-m", "benchmarks.quantised", "--step", scheme]
            command += ["--layers", str(layers)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[scheme] = json.loads(run.stdout.splitlines()[-1])
    title = f"decoding, 2.8B shape, {layers} layers, {CONTEXT} tokens of context, routing replayed"
    columns = [f"{n} tokens, ms" for n in SIZES]
    table = Table("", "weights without embedding, GB", *columns, title=title)
    records, peer = [], found["bfloat16"]
    for scheme, ms in found.items():
        cells = (f"{ms[str(n)]:.1f} ({peer[str(n)] / ms[str(n)]:.2f}x)" for n in SIZES)
        table.add_row(scheme, f"{ms['GB']:.2f}", *cells)
        if scheme != "bfloat16":
            records += [
                record(f"step of {n} tokens", scheme, "bfloat16", ms[str(n)], peer[str(n)], False)
                for n in SIZES
            ]
    console.print(table)
    return records


def quality(console: Console) -> None:
    """Perplexity of the bundled model on text that it has not seen."""
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    tokens = torch.from_numpy(corpus.encode(tokenizer, True).astype("int64"))
    table = Table("weights", "group", "perplexity", title="bundled model, held-out text")
    ways: list[tuple[Any, int]] = [
        ("float32", 0),
        ("int8", 32),
        ("int4", 32),
        ("int4", 64),
    ]
    for scheme, group in ways:
        with console.status(scheme):
            model = load_model(bundled_path(), dtype=torch.float32)
            if group:
                quantize(model, scheme, group)
            value = perplexity(model, tokens, WINDOW)
        table.add_row(scheme, str(group or ""), f"{value:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="*", help="layer, decode, quality; default: all")
    parser.add_argument("--layers", type=int, default=SHAPE.num_hidden_layers, help="of decode")
    parser.add_argument("--step", choices=SCHEMES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.layers)))
        return
    works = options.work or ["layer", "decode", "quality"]
    if unknown := set(works) - {"layer", "decode", "quality"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose layer, decode or quality")
    console = Console(width=110)
    console.print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    records: list[dict[str, Any]] = []
    if "layer" in works:
        records += layer(console)
    if "decode" in works:
        records += decode(console, options.layers)
    if "quality" in works:
        quality(console)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
