"""Decoding at the published 2.8B shape: random weights, routing and acceptance replayed.

Run: ``python -m benchmarks.scale`` [--json FILE], 16 GB of memory, 21 minutes.  Routing has the
published densities.  Acceptance is that of ``eagle_trace.json``: every tree that the bundled
model's draft head proposed at 64 nodes for held-out code, and the path that was right, at a
temperature where trees of 32 nodes yield the published 2.66 tokens a step.  (``trace`` records it.)
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from benchmarks.first_light import PEERS, routing
from benchmarks.speculative import Always, prompts, record, write
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.layer import BlockFFN
from blockffn_compile.models import bundled_path
from blockffn_compile.models.cache import StaticCache
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.eagle import EagleHead, eagle_config, load_eagle
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative import cost
from blockffn_compile.speculative.eagle import DEPTH, WIDTH, EagleDrafter, EagleModel
from blockffn_compile.speculative.generator import Generator
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.policy import Choice, TreePolicy
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import BEST_CHILD, DraftTree, best_nodes

SHAPE = BlockFFNConfig(
    vocab_size=122753,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    ffn_type="block_linear",
    num_experts=128,
    expert_size=128,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
#: The 1.2B shape, where the loop's overhead is measured.
SMALLER = BlockFFNConfig(
    vocab_size=122753,
    hidden_size=1792,
    num_hidden_layers=35,
    num_attention_heads=16,
    num_key_value_heads=16,
    attention_type="mla",
    q_lora_rank=768,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_type="block_linear",
    num_experts=56,
    expert_size=128,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
#: Published for the 2.8B model: experts of one token and in the union of 32; tokens a step.
PAIRS, UNION, ACCEPTED = 0.1245, 0.3086, 2.66
CONTEXT, DRAFT_VOCABULARY, DRAFT_WIDTH = 256, 32768, 6144
STEPS, LEARNING = 436, 20
LAYERS = SHAPE.num_hidden_layers
TRACE = Path(__file__).with_name("eagle_trace.json")


# --- The trace ------------------------------------------------------------------------------------


class Recorder(Always):
    """Notes every tree of 64 nodes and its accepted path."""

    def __init__(self) -> None:
        super().__init__(64)
        self.steps: list[dict[str, Any]] = []

    def update(self, choice: Choice, tree: DraftTree, path: Sequence[int], *ms: Any) -> None:
        if len(tree) == 64:
            log_probs = [round(value, 2) for value in tree.log_probs.tolist()]
            self.steps.append(
                {"parents": tree.parents.tolist(), "log_probs": log_probs, "path": list(path)}
            )


def record_trace(temperature: float, console: Console) -> None:
    model = load_model(bundled_path(), dtype=torch.bfloat16)
    head = load_eagle(bundled_path() / "drafter", model)
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    generator = Generator(model, "eagle", head=head, max_length=400)
    recorder = Recorder()
    generator._policies[1] = recorder
    for text in prompts(tokenizer)["code, greedy"]:
        write({"eagle": generator}, text, Sampler(temperature, seed=0))
    lines = ",\n".join(json.dumps(step, separators=(",", ":")) for step in recorder.steps)
    TRACE.write_text(f"[\n{lines}\n]\n")
    mean = statistics.mean(len(accepted(best_nodes(tree, 32))) for tree in trace())
    console.print(f"{len(recorder.steps)} steps, {mean:.2f} tokens a step with 32 nodes")


def trace() -> Iterator[DraftTree]:
    """The trees; a node's token is 0 off the accepted path, and else its depth on it."""
    for step in json.loads(TRACE.read_text()):
        tokens = list(range(1000, 1064))
        for depth, node in enumerate(step["path"]):
            tokens[node] = depth
        yield DraftTree(
            np.array(tokens), np.array(step["parents"]), np.array(step["log_probs"], np.float32)
        )


def accepted(tree: DraftTree) -> list[int]:
    """The nodes of a (part of a) recorded tree that are right, root included."""
    path = [0]
    while (node := tree.children(path[-1]).get(len(path))) is not None:
        path.append(node)
    return path


# --- The model ------------------------------------------------------------------------------------


def union(tokens: int) -> float:
    """Experts in the union of so many tokens: between the published two, as their logarithm."""
    return PAIRS + (UNION - PAIRS) * math.log2(tokens) / math.log2(32)


class ReplayedRouter(nn.Module):
    """The router's product, with the zeros of a recorded trace instead of its own."""

    def __init__(self, weight: nn.Parameter, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = weight
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            scores = routing(tokens, union(tokens), PAIRS, generator, len(weight))
            self.register_buffer(f"trace{tokens}", scores)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).abs() * getattr(self, f"trace{len(x)}")


def random_model(config: BlockFFNConfig) -> BlockFFNForCausalLM:
    """Random weights, each in memory of its own, and replayed routing."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 22, generator=generator).mul_(0.02).to(torch.bfloat16)
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1)
        else:
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)])
    model.model.rotary.reset_tables(torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, BlockFFN):
            module.router_proj = ReplayedRouter(module.router_proj.weight, generator)  # type: ignore
    return model.eval().requires_grad_(False)


@torch.no_grad()
def check(device: str = "cpu") -> dict[str, float]:
    """Error of the engine's logits against fp64, by that of the eager model's: two layers.

    Raises:
        SystemExit: it is above 1.5, so that no figure would mean anything.
    """
    model = random_model(dataclasses.replace(SHAPE, num_hidden_layers=2)).to(device)
    exact, engine = copy.deepcopy(model).double(), TorchEngine(model, max_length=CONTEXT)
    ratios = []
    for nodes in (1, 32):
        text = list(range(nodes + 1))
        logits = []
        for plain in (exact, model):
            cache = StaticCache(model.config, 1, CONTEXT, plain.lm_head.weight.dtype, device)
            # In two calls, as the engine has them: the routing replayed is that of so many tokens.
            for part in (slice(1), slice(1, None)):
                tokens = torch.tensor([text[part]], device=device)
                positions = torch.arange(len(text), device=device)[part]
                y = plain(tokens, positions, cache)[0]
            logits.append(y.double())
        engine.prefill(0, text[:1])
        tree = DraftTree.chain(text[1], text[2:], [0.0] * (nodes - 1))
        ours = engine.verify({0: tree})[0].logits.double()
        want, eager = logits
        ratios.append(((ours - want).norm() / (eager - want).norm()).item())
    if not all(ratio <= 1.5 for ratio in ratios):
        raise SystemExit(f"error: logits are {ratios} times as far from fp64 as eager ones")
    return {"error": max(ratios)}


def median_ms(call: Callable[[], object], calls: int = 9) -> float:
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


# --- Subjects, each in a process that has room for it alone ---------------------------------------


@torch.no_grad()
def dense(name: str, layers: int) -> dict[str, float]:
    config = dataclasses.replace(SHAPE, num_hidden_layers=layers)
    model, options = random_model(config), PEERS[name]
    step = torch.compile(
        lambda tokens, positions, cache: model(tokens[None], positions, cache)[0, -1],
        backend="inductor", options=options or None, fullgraph=True,
    )  # fmt: skip
    cache = StaticCache(config, 1, CONTEXT + 64, torch.bfloat16)
    tokens, positions = torch.zeros(1, dtype=torch.long), torch.tensor([CONTEXT])
    with inductor_config.patch(options):
        step(tokens, positions, cache)
    return {"plain": median_ms(lambda: step(tokens, positions, cache))}


class Replay:
    """Does a draft head's work, and proposes the trees of the trace."""

    def __init__(self, eagle: EagleModel) -> None:
        self.eagle, self.drafter, self.trees = eagle, EagleDrafter(eagle), cycle(trace())

    def propose(self, nodes: int, rate: float) -> DraftTree:
        tree = next(self.trees)
        level, probs = 1, np.exp(tree.log_probs)
        drafter = self.drafter
        while level < min(DEPTH, nodes - 1):
            if BEST_CHILD * probs[tree.depths == level].max() < rate * self.eagle.level_ms:
                break
            places = [[0] * WIDTH, [CONTEXT] * WIDTH, [CONTEXT] * WIDTH]
            slots = [CONTEXT + WIDTH * level + i for i in range(WIDTH)]
            features = self.eagle.unembedding.new_zeros(WIDTH, SHAPE.hidden_size)
            self.eagle.guess([*places, slots, [1] * WIDTH], features, drafter._cache)
            level += 1
        shallow = tree.subtree([int(i) for i in np.flatnonzero(tree.depths <= level)])
        return best_nodes(shallow, nodes)


@torch.no_grad()
def ours() -> dict[str, float]:
    """Plain and speculative decoding in real time; the policy decides, only tokens are replayed."""
    model = random_model(SHAPE)
    engine = TorchEngine(model, max_length=CONTEXT + 64)

    def verify(tree: DraftTree) -> Any:
        engine._texts.lengths[0] = CONTEXT  # what is in the cache costs the same whatever it says
        return engine.verify({0: tree})[0].features

    list(engine.warm_up((1, 2, 4, 8, 16, 32)))
    chains = {n: DraftTree.chain(0, range(1, n), [0.0] * (n - 1)) for n in (1, 2, 4, 8, 16, 32)}
    costs = {n: cost.fastest_ms(lambda n=n: verify(chains[n])) for n in chains}  # type: ignore
    head = EagleHead(eagle_config(SHAPE, DRAFT_WIDTH), torch.arange(DRAFT_VOCABULARY))
    eagle = EagleModel(model, head.to(torch.bfloat16).eval().requires_grad_(False), CONTEXT + 64)
    list(eagle.warm_up())
    replay, policy = Replay(eagle), TreePolicy(costs, [eagle.level_ms * 3])
    start, tokens, sizes, used = 0.0, 0, list[int](), 0
    features, kept = verify(chains[1]), [0]
    for step in range(LEARNING + STEPS):
        if step == LEARNING:
            start, tokens, sizes, used = time.perf_counter(), 0, list[int](), 0
        choice, tree, draft_ms = policy.choose(), chains[1], 0.0
        if choice.drafter is not None:
            begin = time.perf_counter()
            # What the head takes in of the last step, as EagleDrafter.observe and propose do.
            drafter = replay.drafter
            drafter._length, drafter._tokens, drafter._features = CONTEXT - 8, kept, [features]
            drafter._extend(kept)
            tree = replay.propose(choice.nodes, choice.rate)
            draft_ms = (time.perf_counter() - begin) * 1e3
            tree = policy.trim(choice, tree)
            used += 1
        begin = time.perf_counter()
        features = verify(tree)
        verify_ms = (time.perf_counter() - begin) * 1e3
        path = accepted(tree)
        engine.commit(0, path)
        features, kept = features[path], [0] * len(path)
        policy.update(choice, tree, path, draft_ms, verify_ms)
        tokens += len(path)
        sizes.append(len(tree))
    ms = (time.perf_counter() - start) * 1e3
    return {
        **{f"verify {n}": value for n, value in costs.items()},
        "plain": median_ms(lambda: verify(chains[1])),
        "level": eagle.level_ms,
        "speculative": ms / tokens,
        "nodes": statistics.mean(sizes),
        "accepted": tokens / STEPS,
        "drafted": used / STEPS,
    }


def overhead() -> dict[str, float]:
    """Share of the loop's time outside the engine and proposals, plain and with n-grams."""
    engine = TorchEngine(random_model(SMALLER), max_length=2 * CONTEXT)
    list(engine.warm_up((1, 2)))
    result = {}
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "n-grams": {
            "drafters": lambda: [NGramDrafter()],
            "policy": Always(2),
        },
    }
    for name, options in ways.items():
        steps = decode(engine, [[0]], 100, **options)
        next(steps)
        inside, start = 0.0, time.perf_counter()
        for step in steps:
            inside += step.verify_ms + step.draft_ms
        result[name] = 1 - inside / ((time.perf_counter() - start) * 1e3)
        result[f"{name}, ms"] = inside / 99
    return result


# --- All of them ----------------------------------------------------------------------------------


def measure(subject: str, console: Console, layers: int = LAYERS) -> dict[str, float]:
    with console.status(f"2.8B shape: {subject}, {layers} layers"):
        command = [sys.executable, "-m", "benchmarks.scale", "subject", "--name", subject]
        command += ["--layers", str(layers)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def peer(name: str, console: Console) -> float:
    """Milliseconds a token of a dense form.

    Compiling with max-autotune takes over four times the memory of the weights, more than 24 GB:
    what a layer costs is the difference between two numbers of layers.  Both are small, to the
    peer's advantage: with twelve layers each of them takes a third longer.
    """
    if "max-autotune" not in name:
        return measure(name, console)["plain"]
    few, some = (measure(name, console, layers)["plain"] for layers in (2, 6))
    return some + (some - few) / 4 * (LAYERS - 6)


def report(console: Console) -> list[dict[str, Any]]:
    error = measure("check", console, 2)["error"]
    console.print(f"error of the logits: {error:.2f} times that of eager mode")
    peers = {name: peer(name, console) for name in PEERS}
    best = min(peers, key=peers.__getitem__)
    peer_ms = peers[best]
    mine, loop = measure("blockffn", console), measure("overhead", console)
    table = Table(title=f"2.8B shape, bf16, {CONTEXT} tokens of context; random weights, routing "
                        "and acceptance replayed")  # fmt: skip
    for column in ("", "ms a token", "faster than the best dense", "bar"):
        table.add_column(column)
    for name, ms in peers.items():
        extrapolated = ", from 2 and 6 layers" if "max-autotune" in name else ""
        table.add_row(f"dense, {name}{extrapolated}", f"{ms:.1f}", f"{peer_ms / ms:.2f}x")
    table.add_row("blockffn, plain", f"{mine['plain']:.1f}", f"{peer_ms / mine['plain']:.2f}x",
                  "2.9x")  # fmt: skip
    table.add_row(
        f"blockffn, EAGLE in {mine['drafted']:.0%} of the steps, {mine['nodes']:.1f} nodes, "
        f"{mine['accepted']:.2f} tokens a step",
        f"{mine['speculative']:.1f}", f"{peer_ms / mine['speculative']:.2f}x", "3.67x",
    )  # fmt: skip
    fixed = (mine["level"] * DEPTH + mine["verify 32"]) / ACCEPTED
    table.add_row(f"blockffn, 32 nodes always, {ACCEPTED} tokens a step as published",
                  f"{fixed:.1f}", f"{peer_ms / fixed:.2f}x", "")  # fmt: skip
    console.print(table)
    costs = ", ".join(f"{key[7:]}: {ms:.0f}" for key, ms in mine.items() if key.startswith("v"))
    console.print(f"verification by nodes, ms: {costs}; a level of the head: {mine['level']:.1f}")
    console.print("1.2B shape, time outside engine and proposals: " + "; ".join(
        f"{name} {loop[name]:.2%} of {loop[name + ', ms']:.1f} ms" for name in ("plain", "n-grams")
    ))  # fmt: skip
    return [
        record("2.8B shape, replayed", name, best, mine[name], peer_ms)
        for name in ("plain", "speculative")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", choices=("report", "trace", "subject"), default="report")
    parser.add_argument("--temperature", type=float, default=0.77, help="of the trace")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=LAYERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    options = parser.parse_args()
    console = Console(width=110)
    if options.work == "trace":
        record_trace(options.temperature, console)
        return
    if options.work == "subject":
        subjects: dict[str, Callable[[], dict[str, float]]] = {
            "check": check, "blockffn": ours, "overhead": overhead
        }  # fmt: skip
        call = subjects.get(options.name) or (lambda: dense(options.name, options.layers))
        print(json.dumps(call()))
        return
    console.print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    records = report(console)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
