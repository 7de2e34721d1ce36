"""``blockffn generate``: continue a prompt, streaming."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from blockffn_compile.cli.common import (
    Backend,
    CheckpointArgument,
    DrafterOption,
    DType,
    DTypeOption,
    GroupOption,
    NewTokensOption,
    PromptOption,
    QuantizeOption,
    encode_prompt,
    fail,
    load_head,
    load_model,
    load_tokenizer,
    make_generator,
    reporting,
    stream,
)

if TYPE_CHECKING:
    from blockffn_compile.models.modeling import BlockFFNForCausalLM
    from blockffn_compile.speculative.loop import Step


class Speculate(StrEnum):
    auto = "auto"
    eagle = "eagle"
    ngram = "ngram"
    off = "off"


def generate(
    prompt: PromptOption,
    checkpoint: CheckpointArgument = None,
    max_new_tokens: NewTokensOption = 128,
    speculate: Annotated[
        Speculate, typer.Option(help="Who drafts tokens ahead; the text stays the same.")
    ] = Speculate.off,
    drafter: DrafterOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text with this.")] = None,
    backend: Annotated[
        Backend, typer.Option(help="Compiler backend; the others decode plainly.")
    ] = Backend.blockffn,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k best.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: DTypeOption = DType.stored,
    quantize: QuantizeOption = None,
    group: GroupOption = 32,
) -> None:
    """Continue a prompt; the text streams as tokens come.

    With `--speculate`, accepted draft tokens are coloured and a summary follows. Its first run on a
    machine compiles for a minute, later ones start in seconds.

    Examples:

    - `blockffn generate --prompt "import "`

    - `blockffn generate --speculate auto -p "class Stack:" -n 400 --stop "class "`

    - `blockffn generate -p "class Stack:" -n 64 --temperature 0.8 --top-k 40 --seed 1`

    - `blockffn generate path/to/checkpoint -p "def main(" --backend inductor`

    - `blockffn generate path/to/checkpoint -p "def main(" --quantize int8`
    """
    from rich.console import Console

    status = Console(stderr=True)
    if backend is not Backend.blockffn and (speculate is not Speculate.off or stop):
        fail("--speculate and --stop need --backend blockffn")
    model, tokenizer = load_model(checkpoint, dtype, quantize, group), load_tokenizer(checkpoint)
    tokens = encode_prompt(tokenizer, model.config.max_position_embeddings - 1, prompt)
    if backend is Backend.blockffn:
        from blockffn_compile.speculative.generator import stop_at
        from blockffn_compile.speculative.sampling import Sampler

        with reporting(ValueError):
            sampler = Sampler(temperature, top_k, seed=seed)
            ends = stop_at(tokenizer, stop) if stop else None
        head = None
        if speculate in (Speculate.auto, Speculate.eagle):
            head = load_head(checkpoint, drafter, model)
            if head is None and speculate is Speculate.eagle:
                fail("no draft head; name one with --drafter, or train it: blockffn train-drafter")
        length = min(len(tokens) + max_new_tokens, model.config.max_position_embeddings)
        writer = make_generator(model, speculate, head, length)
        steps = writer(
            [tokens],
            max_new_tokens,
            sampler=sampler,
            stop_tokens=model.config.stop_tokens,
            stop=ends,
        )
    else:
        steps = plain_steps(model, tokens, max_new_tokens, backend, temperature, top_k, seed)

    print(prompt, end="", flush=True)
    done: list[Step] = []
    arrivals: list[float] = []
    drafted: list[bool] = []

    def arriving() -> Iterator[int]:
        for step in steps:
            done.append(step)
            arrivals.extend([time.perf_counter()] * len(step.tokens))
            for i, token in enumerate(step.tokens):
                drafted.append(i < step.drafted)
                yield token

    for piece in stream(tokenizer, arriving()):
        typer.secho(piece, nl=False, fg="green" if drafted[-1] else None)
    print()
    # The first steps may compile; the second half of a run is steady.
    steady = arrivals[len(arrivals) // 2 :]
    speed = (len(steady) - 1) / (steady[-1] - steady[0]) if steady[1:] > steady[:1] else 0.0
    line = f"{len(arrivals)} tokens, {speed:.1f} tokens/s"
    if speculate is not Speculate.off and len(done) > 1:
        text = [*tokens, *(token for step in done for token in step.tokens)]
        line += f", {summary(done[1:])}; {sparsity(model, text)}"
    status.print(line, style="dim")


def summary(steps: list[Step]) -> str:
    """How the steps after the prompt's fared, in words."""
    length = sum(len(step.tokens) for step in steps) / len(steps)
    sizes = Counter(step.nodes for step in steps).most_common(3)
    common = ", ".join(f"{nodes} ({count / len(steps):.0%})" for nodes, count in sizes)
    return f"{length:.2f} tokens a step, trees of {common} nodes"


def sparsity(model: BlockFFNForCausalLM, text: list[int]) -> str:
    """TLS and CLS_8 of a text, in words."""
    import torch

    from blockffn_compile.training.metrics import mean_cls, measure_sparsity

    layers = measure_sparsity(model, torch.tensor(text))
    if not layers:
        return "no experts"
    one, eight = mean_cls(layers, 1), mean_cls(layers, 8)
    return f"experts off for a token {one:.1%}, for 8 together {eight:.1%}"


def plain_steps(
    model: BlockFFNForCausalLM,
    tokens: list[int],
    max_new_tokens: int,
    backend: Backend,
    temperature: float,
    top_k: int | None,
    seed: int | None,
) -> Iterator[Step]:
    """Plain decoding under another backend, a token a step."""
    from blockffn_compile.generation import generate as generate_tokens
    from blockffn_compile.speculative.loop import Step

    for token in generate_tokens(
        model,
        tokens,
        max_new_tokens,
        backend=backend,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    ):
        yield Step(0, [token], 0, 1, None, 0.0, 0.0, False)
