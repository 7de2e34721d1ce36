"""``blockffn run``: continue a prompt with a bundle, without PyTorch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from blockffn_compile.cli.common import (
    NewTokensOption,
    PromptOption,
    encode_prompt,
    load_tokenizer,
    reporting,
    stream,
)


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Made by blockffn compile.")],
    prompt: PromptOption,
    max_new_tokens: NewTokensOption = 128,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the weights even if the file has not changed.")
    ] = False,
) -> None:
    """Continue a prompt greedily; the text streams as tokens come.

    A bundle contains native code, which this executes: run only bundles of people whose programs
    you would run.

    Examples:

    - `blockffn run bundle --prompt "class Queue:"`

    - `TVM_NUM_THREADS=2 blockffn run bundle -p "import " -n 400`
    """
    if "torch" not in sys.modules:
        # TVM imports PyTorch where it can, and its own compiler: seconds, for what no bundle needs.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    from rich.console import Console

    from blockffn_compile.aot.bundle import load
    from blockffn_compile.aot.manifest import BundleError
    from blockffn_compile.aot.session import Session, greedy

    with reporting(BundleError):
        loaded = load(bundle, verify=verify)
    manifest = loaded.manifest
    tokenizer = load_tokenizer(bundle)
    tokens = encode_prompt(tokenizer, manifest.max_length - 1, prompt)
    session = Session(loaded, max_length=min(len(tokens) + max_new_tokens, manifest.max_length))
    arrivals: list[float] = []

    def arriving() -> Iterator[int]:
        for token in greedy(session, tokens, manifest.stop_tokens):
            arrivals.append(time.perf_counter())
            yield token

    print(prompt, end="", flush=True)
    for piece in stream(tokenizer, arriving()):
        print(piece, end="", flush=True)
    print()
    took = arrivals[-1] - arrivals[0] if arrivals else 0.0
    speed = (len(arrivals) - 1) / took if took else 0.0
    Console(stderr=True).print(f"{len(arrivals)} tokens, {speed:.1f} tokens/s", style="dim")
