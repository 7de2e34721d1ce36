"""What several commands share: arguments, loading, and errors that a person can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from blockffn_compile.models.eagle import EagleHead
    from blockffn_compile.models.modeling import BlockFFNForCausalLM
    from blockffn_compile.report import Report
    from blockffn_compile.speculative.generator import Generator


class Backend(StrEnum):
    blockffn = "blockffn"
    inductor = "inductor"
    eager = "eager"


class DType(StrEnum):
    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"


CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CKPT", help="Checkpoint directory; default: the bundled model."),
]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
]
DrafterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="EAGLE draft head; default: CKPT/drafter, if it is there."),
]


class Quantize(StrEnum):
    int8 = "int8"
    int4 = "int4"


QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(help="Store linear layers and experts so; routers and embeddings stay."),
]
GroupOption = Annotated[
    int, typer.Option(min=32, help="Weights to a scale where they are quantised, a multiple of 32.")
]
DTypeOption = Annotated[DType, typer.Option(help="Of the weights and the computation.")]


def fail(message: object) -> NoReturn:
    """Ends the command with one line for the user and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


@contextmanager
def reporting(*errors: type[Exception]) -> Iterator[None]:
    """Turns errors whose message is meant for the user into :func:`fail`."""
    try:
        yield
    except errors as error:
        fail(error)


def checkpoint_path(checkpoint: Path | None) -> Path:
    from blockffn_compile.models import bundled_path

    path = checkpoint or bundled_path()
    if not path.is_dir():
        fail(f"{path}: no such directory; give a checkpoint directory with config.json")
    return path


def load_model(
    checkpoint: Path | None,
    dtype: DType = DType.stored,
    quantize: Quantize | None = None,
    group: int = 32,
) -> BlockFFNForCausalLM:
    import torch

    from blockffn_compile import quantisation
    from blockffn_compile.models.checkpoint import load_model

    with reporting(ValueError):  # CheckpointError is one
        wanted = None if dtype is DType.stored else getattr(torch, dtype)
        model = load_model(checkpoint_path(checkpoint), dtype=wanted)
        return quantisation.quantize(model, quantize.value, group) if quantize else model


def load_tokenizer(checkpoint: Path | None) -> Tokenizer:
    from tokenizers import Tokenizer

    path = checkpoint_path(checkpoint) / "tokenizer.json"
    if not path.is_file():
        fail(f"{path}: no such file; copy the model's tokenizer.json there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        fail(f"{path}: not a tokenizer: {error}")


def load_head(
    checkpoint: Path | None, drafter: Path | None, model: BlockFFNForCausalLM
) -> EagleHead | None:
    """The draft head in ``drafter``, or beside the model if there is one."""
    from blockffn_compile.models.config import CheckpointError
    from blockffn_compile.models.eagle import load_eagle

    path = drafter or checkpoint_path(checkpoint) / "drafter"
    if drafter is None and not path.is_dir():
        return None
    with reporting(CheckpointError):
        return load_eagle(path, model)


def make_generator(
    model: BlockFFNForCausalLM, speculate: str, head: EagleHead | None, max_length: int
) -> Generator:
    """A generator; a progress bar shows on stderr while it compiles."""
    from rich.console import Console
    from rich.progress import Progress

    from blockffn_compile.speculative.generator import Generator

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        return Generator(
            model,
            speculate,  # type: ignore[arg-type]
            head=head,
            max_length=max_length,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def encode_prompt(tokenizer: Tokenizer, longest: int, prompt: str) -> list[int]:
    """Tokens of a prompt, at most ``longest``."""
    tokens = tokenizer.encode(prompt).ids
    if not tokens:
        fail("the prompt is empty; give some text with --prompt")
    if len(tokens) > longest:
        fail(f"the prompt has {len(tokens)} tokens, the model takes at most {longest}; shorten it")
    return tokens


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come, held back only inside a multi-byte character."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=False)
    for token in tokens:
        piece = decoder.step(tokenizer, token)
        if piece:
            yield piece


def show_report(report: Report) -> None:
    """Prints a table of layers."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "status", "what, or why not")
    for layer in report.layers:
        style = "green" if layer.status == "rewritten" else "yellow"
        table.add_row(layer.name, f"[{style}]{layer.status}[/]", layer.description)
    console = Console()
    console.print(table)
    rewritten = sum(layer.status == "rewritten" for layer in report.layers)
    console.print(f"{rewritten} of {len(report.layers)} layers rewritten")
