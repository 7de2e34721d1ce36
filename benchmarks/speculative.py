"""Speculative decoding of the bundled model on real prompts.

Run: ``python -m benchmarks.speculative bundled`` (or ``hf``) [--json FILE].  Every speculative run
of the first must give the tokens of plain decoding, or there is no number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from blockffn_compile.generation import compile_step, new_cache
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.models.eagle import load_eagle
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative.generator import Generator
from blockffn_compile.speculative.loop import Step
from blockffn_compile.speculative.policy import Choice, TreePolicy
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import DraftTree
from blockffn_compile.training import corpus

PROMPT, NEW, PROMPTS, ROUNDS = 96, 160, 12, 3


def record(
    work: str, subject: str, peer: str, ms: float, peer_ms: float, gate: bool = True
) -> dict[str, Any]:
    ratio = peer_ms / ms
    return {"work": work, "subject": subject, "peer": peer, "subject_ms": ms, "peer_ms": peer_ms,
            "ratio": ratio, "gate": gate}  # fmt: skip


# --- The bundled model ----------------------------------------------------------------------------


def prompts(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Code to complete, from held-out files; and tokens without any sense."""
    held_out = corpus.encode(tokenizer, True)
    stride = len(held_out) // PROMPTS
    code = [held_out[i * stride : i * stride + PROMPT].tolist() for i in range(PROMPTS)]
    generator = torch.Generator().manual_seed(0)
    size = tokenizer.get_vocab_size()
    noise = torch.randint(1, size, (PROMPTS, PROMPT), generator=generator).tolist()
    return {
        "code, greedy": code,
        "code, temperature 1": code,
        "random tokens, temperature 1": noise,
    }


class Always(TreePolicy):
    """Verifies the most probable nodes of every draft, as many as it is told."""

    def __init__(self, nodes: int) -> None:
        super().__init__({1: 1.0, 64: 1.0}, [0.0])
        self._nodes = nodes

    def choose(self) -> Choice:
        return Choice(0, self._nodes, False)

    def trim(self, choice: Choice, tree: DraftTree) -> DraftTree:
        return tree


def write(
    generators: Mapping[str, Generator], text: list[int], sampler: Sampler
) -> dict[str, tuple[list[Step], float]]:
    """All steps of each generator, and the milliseconds of those after the first.

    They take their steps in turn, so that whatever else the machine does falls on all alike.
    """
    running = {name: g([text], NEW, sampler=sampler) for name, g in generators.items()}
    steps = {name: [next(running[name])] for name in running}
    ms = dict.fromkeys(running, 0.0)
    while running:
        for name, going in list(running.items()):
            start = time.perf_counter()
            step = next(going, None)
            ms[name] += (time.perf_counter() - start) * 1e3
            if step is None:
                del running[name]
            else:
                steps[name].append(step)
    return {name: (steps[name], ms[name]) for name in steps}


def interval(peer_ms: list[float], ms: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of means; element i of both is of one prompt."""
    pairs = np.array([peer_ms, ms])
    draws = np.random.default_rng(0).integers(len(ms), size=(2000, len(ms)))
    peer, own = pairs[:, draws].mean(-1)
    low, high = np.percentile(peer / own, [2.5, 97.5])
    return float(low), float(high)


def plain_inductor(model: BlockFFNForCausalLM, text: list[int]) -> float:
    """Milliseconds a token of greedy decoding under stock Inductor."""
    step, cache = compile_step(model, "inductor"), new_cache(model, PROMPT + NEW)
    token = step(torch.tensor(text), torch.arange(PROMPT), cache).argmax()
    start = time.perf_counter()
    for position in range(PROMPT, PROMPT + NEW):
        token = step(token.view(1), torch.tensor([position]), cache).argmax()
    return (time.perf_counter() - start) * 1e3 / NEW


def bundled(drafter: Path, console: Console) -> list[dict[str, Any]]:
    model = load_model(bundled_path(), dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    head = load_eagle(drafter, model) if drafter.is_dir() else None
    subjects = {}
    for speculate in ("off", "ngram", *(("eagle", "auto") if head else ())):
        with console.status(f"compiling for speculate={speculate}"):
            subjects[speculate] = Generator(
                model, speculate, head=head, max_length=PROMPT + NEW + 64
            )
    records = []
    for work, texts in prompts(tokenizer).items():
        sampler = Sampler(0.0 if "greedy" in work else 1.0, seed=0)
        ms: dict[str, list[float]] = {name: [] for name in ["inductor", *subjects]}
        steps: dict[str, list[Step]] = {name: [] for name in subjects}
        for text in texts * ROUNDS:
            expected = None
            for name, (done, taken) in write(subjects, text, sampler).items():
                tokens = [token for step in done for token in step.tokens]
                expected = expected or tokens
                if tokens != expected:
                    raise SystemExit(f"{work}: {name} writes other tokens than plain decoding")
                ms[name].append(taken / max(1, len(tokens) - len(done[0].tokens)))
                steps[name] += done[1:]
            with torch.no_grad():
                ms["inductor"].append(plain_inductor(model, text))
        table = Table(title=f"bundled model, bf16: {work}")
        for column in ("", "tokens/s", "over plain (95 %)", "over Inductor", "tokens a step"):
            table.add_column(column)
        table.add_column("nodes")
        ms = {
            name: [statistics.median(values[i::PROMPTS]) for i in range(PROMPTS)]
            for name, values in ms.items()
        }
        mean = {name: statistics.mean(values) for name, values in ms.items()}
        for name, value in mean.items():
            done = steps.get(name, [])
            low, high = interval(ms["off"], ms[name])
            ratio = f"{mean['off'] / value:.2f}x ({low:.2f} to {high:.2f})"
            row = [f"{1e3 / value:.0f}", ratio]
            row.append(f"{mean['inductor'] / value:.2f}x")
            if done:
                row.append(f"{sum(len(s.tokens) for s in done) / len(done):.2f}")
                row.append(f"{statistics.mean(s.nodes for s in done):.1f}")
            table.add_row(f"speculate={name}" if done else name, *row)
            if name not in ("off", "inductor"):
                records.append(record(work, f"speculate={name}", "off", value, mean["off"]))
                records.append(
                    record(work, f"speculate={name}", "inductor", value, mean["inductor"])
                )
        console.print(table)
    if head:
        subjects["eagle"]._policies[1] = Always(16)
        for work, texts in prompts(tokenizer).items():
            sampler = Sampler(0.0 if "greedy" in work else 1.0, seed=0)
            eagle = {"eagle": subjects["eagle"]}
            done = [step for text in texts for step in write(eagle, text, sampler)["eagle"][0][1:]]
            length = sum(len(step.tokens) for step in done) / len(done)
            console.print(f"EAGLE, 16 nodes in every step, {work}: {length:.2f} tokens a step")
    return records


# --- Hugging Face ---------------------------------------------------------------------------------


def hugging_face(console: Console) -> list[dict[str, Any]]:
    """Their prompt lookup and assisted generation against ours, through the same ``generate``."""
    from transformers import AutoModelForCausalLM

    from blockffn_compile.models import hf

    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    texts = [torch.tensor([text]) for text in prompts(tokenizer)["code, greedy"]]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    ways: dict[str, dict[str, Any]] = {
        "blockffn": {"custom_generate": hf.speculative_generate, "speculate": "ngram"},
        "transformers": {},
        "transformers, prompt lookup": {"prompt_lookup_num_tokens": 8},
        "transformers, assisted by itself": {"assistant_model": model},
    }
    ms: dict[str, float] = {}
    outputs: dict[str, list[list[int]]] = {}
    for name, extra in ways.items():
        model.generate(texts[0], **options, **extra)
        start = time.perf_counter()
        outputs[name] = [model.generate(text, **options, **extra)[0].tolist() for text in texts]
        ms[name] = (time.perf_counter() - start) * 1e3 / (NEW * len(texts))
    table = Table("", "ms a token", "blockffn is faster by", "texts that are the same",
                  title="model.generate, bundled model, fp32, greedy, held-out code")  # fmt: skip
    for name, value in ms.items():
        same = sum(a == b for a, b in zip(outputs[name], outputs["blockffn"], strict=True))
        ratio = f"{value / ms['blockffn']:.2f}x"
        table.add_row(name, f"{value:.2f}", ratio, f"{same} of {len(texts)}")
    console.print(table)
    return [
        record(
            "code, greedy, fp32",
            "blockffn",
            name,
            ms["blockffn"],
            value,
            outputs[name] == outputs["blockffn"],
        )
        for name, value in ms.items()
        if name != "blockffn"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("bundled", "hf"))
    parser.add_argument("--drafter", type=Path, default=bundled_path() / "drafter")
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    if options.work == "bundled":
        records = bundled(options.drafter, console)
    else:
        records = hugging_face(console)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
