"""``blockffn generate``: continue a prompt, streaming."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer

from blockffn_compile.cli.common import (
    Backend,
    CheckpointArgument,
    DType,
    DTypeOption,
    NewTokensOption,
    PromptOption,
    encode_prompt,
    load_model,
    load_tokenizer,
    stream,
)


def generate(
    prompt: PromptOption,
    checkpoint: CheckpointArgument = None,
    max_new_tokens: NewTokensOption = 128,
    backend: Annotated[Backend, typer.Option(help="Compiler backend.")] = Backend.blockffn,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k best.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: DTypeOption = DType.stored,
) -> None:
    """Continue a prompt; the text streams as tokens come.

    Examples:

    - `blockffn generate --prompt "import "`

    - `blockffn generate -p "class Stack:" -n 64 --temperature 0.8 --top-k 40 --seed 1`

    - `blockffn generate path/to/checkpoint -p "def main(" --backend inductor`
    """
    from rich.console import Console

    from blockffn_compile.generation import generate as generate_tokens

    status = Console(stderr=True)
    model, tokenizer = load_model(checkpoint, dtype), load_tokenizer(checkpoint)
    tokens = encode_prompt(tokenizer, model, prompt)
    new = generate_tokens(
        model,
        tokens,
        max_new_tokens,
        backend=backend,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    print(prompt, end="", flush=True)
    arrivals: list[float] = []

    def timed() -> Iterator[int]:
        for token in new:
            arrivals.append(time.perf_counter())
            yield token

    for piece in stream(tokenizer, timed()):
        print(piece, end="", flush=True)
    print()
    # The first steps compile; the second half of a run is steady.
    steady = arrivals[len(arrivals) // 2 :]
    if len(steady) > 1:
        speed = (len(steady) - 1) / (steady[-1] - steady[0])
        status.print(f"{len(arrivals)} tokens, {speed:.1f} tokens/s", style="dim")
