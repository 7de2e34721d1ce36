"""``blockffn demo``: the main job on the bundled model, with its figures."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from blockffn_compile.cli.common import (
    Backend,
    CheckpointArgument,
    DType,
    DTypeOption,
    NewTokensOption,
    PromptOption,
    encode_prompt,
    fail,
    load_model,
    load_tokenizer,
    stream,
)

if TYPE_CHECKING:
    from torch import Tensor

    from blockffn_compile.models.modeling import BlockFFNForCausalLM

PROMPT = "def read_config(path):"


def demo(
    checkpoint: CheckpointArgument = None,
    prompt: PromptOption = PROMPT,
    max_new_tokens: NewTokensOption = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each backend.")] = 5,
    dtype: DTypeOption = DType.float32,
) -> None:
    """Complete a prompt through the backend, then compare it with eager and Inductor.

    Examples:

    - `blockffn demo`

    - `blockffn demo --prompt "class Queue:" --max-new-tokens 200`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from blockffn_compile.explain import explain
    from blockffn_compile.generation import generate
    from blockffn_compile.training.metrics import mean_cls, measure_sparsity

    console = Console()
    model, tokenizer = load_model(checkpoint, dtype), load_tokenizer(checkpoint)
    tokens = encode_prompt(tokenizer, model.config.max_position_embeddings - 1, prompt)
    start = len(tokens)
    new = generate(model, tokens, max_new_tokens)
    with console.status("compiling with backend blockffn"):
        first = next(new, None)
    if first is None:
        fail("the model ends the text at once; try another --prompt")
    tokens.append(first)
    console.rule("completion")
    print(prompt, end="", flush=True)

    def keep() -> Iterator[int]:
        yield tokens[-1]
        for token in new:
            tokens.append(token)
            yield token

    for piece in stream(tokenizer, keep()):
        print(piece, end="", flush=True)
    print()

    text = torch.tensor(tokens)
    with console.status("comparing with eager and inductor"):
        report = explain(model, text[None])
        layers = measure_sparsity(model, text)
        speeds, choices = compare(model, text, start, repeats)
    same = [len(set(column)) == 1 for column in zip(*choices.values(), strict=True)]
    rewritten = sum(layer.status == "rewritten" for layer in report.layers)

    table = Table("measured on this text", "", show_header=False)
    table.add_row("layers rewritten", f"{rewritten} of {len(report.layers)}")
    table.add_row("experts off for a token (TLS)", f"{100 * mean_cls(layers, 1):.1f} %")
    table.add_row("experts off for 8 tokens (CLS_8)", f"{100 * mean_cls(layers, 8):.1f} %")
    table.add_section()
    for backend, speed in speeds.items():
        ratio = speed / speeds[Backend.eager]
        table.add_row(f"{backend}, tokens/s", f"{speed:.0f}  ({ratio:.2f}x eager)")
    agreement = f"{'yes' if all(same) else 'no'}, {sum(same)} of {len(same)}"
    if not all(same):
        agreement += f"; the others lie within {disagreement(model, text, start, choices):.2g}"
    table.add_row("all three choose the same tokens", agreement)
    console.rule("figures")
    console.print(table)


def disagreement(
    model: BlockFFNForCausalLM, text: Tensor, start: int, choices: dict[Backend, list[int]]
) -> float:
    """Largest distance, as fp64 logits, between the tokens chosen for one place in the text."""
    exact = copy.deepcopy(model).double()(text[None])[0, start:]
    chosen = exact.gather(1, exact.new_tensor(list(choices.values())).long().T)
    return float((chosen.amax(1) - chosen.amin(1)).max())


def compare(
    model: BlockFFNForCausalLM, text: Tensor, start: int, repeats: int
) -> tuple[dict[Backend, float], dict[Backend, list[int]]]:
    """Replays a text from position ``start`` through each backend, taking turns.

    Returns:
        Median tokens/s of single-token steps, and the token that each step would have chosen.
    """
    times: dict[Backend, list[float]] = {backend: [] for backend in reversed(Backend)}
    choices: dict[Backend, list[int]] = {}
    for repeat in range(repeats + 1):
        for backend, taken in times.items():
            choices[backend], seconds = replay(model, text, start, backend)
            if repeat:  # the first run compiles
                taken.append(seconds)
    steps = len(text) - start
    return {b: steps / statistics.median(taken) for b, taken in times.items()}, choices


def replay(
    model: BlockFFNForCausalLM, text: Tensor, start: int, backend: str
) -> tuple[list[int], float]:
    """The greedy choice after every token from ``start`` on, and the seconds it took."""
    import torch

    from blockffn_compile.generation import compile_step, new_cache

    step, cache = compile_step(model, backend), new_cache(model, len(text))
    positions = torch.arange(len(text))
    with torch.no_grad():
        step(text[:start].clone(), positions[:start].clone(), cache)
        began = time.perf_counter()
        choices = [
            int(step(text[i : i + 1], positions[i : i + 1], cache).argmax())
            for i in range(start, len(text))
        ]
    return choices, time.perf_counter() - began
