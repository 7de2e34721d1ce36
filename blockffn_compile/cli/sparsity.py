"""``blockffn sparsity``: TLS and CLS_n of every layer on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockffn_compile.cli.common import fail, load_model, load_tokenizer

if TYPE_CHECKING:
    from blockffn_compile.training.metrics import LayerSparsity

SIZES = (1, 2, 4, 8, 16, 32, 64)


def sparsity(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CKPT] TEXTFILE",
            help="Checkpoint directory (default: the bundled model) and a text file.",
        ),
    ],
    plot: Annotated[Path | None, typer.Option(help="Draw it into this PNG file.")] = None,
) -> None:
    """Measure how sparse the routing is: TLS, and CLS of n tokens for n = 1 to 64, per layer.

    CLS of n is the fraction of experts that n consecutive tokens leave unused; TLS is CLS of 1.

    Examples:

    - `blockffn sparsity setup.py`

    - `blockffn sparsity path/to/checkpoint book.txt --plot sparsity.png`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from blockffn_compile.training.metrics import mean_cls, measure_sparsity

    if len(paths) > 2:
        fail(f"expected [CKPT] TEXTFILE, got {len(paths)} paths")
    checkpoint, text_file = paths[0] if len(paths) == 2 else None, paths[-1]
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fail(f"{text_file}: {reason}; give a text file to measure on")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    tokens = torch.tensor(tokenizer.encode(text).ids, dtype=torch.long)
    sizes = [n for n in SIZES if n <= len(tokens)]
    if not sizes:
        fail(f"{text_file}: is empty; give a text file to measure on")
    layers = measure_sparsity(
        model, tokens, sizes, context=min(512, model.config.max_position_embeddings)
    )
    if not layers:
        fail("the model has no BlockFFN layer; its FFNs are dense")

    table = Table("layer", *(f"CLS_{n}" if n > 1 else "TLS" for n in sizes), "reuse")
    for layer in layers:
        values = [*(layer.cls[n] for n in sizes), layer.reuse]
        table.add_row(layer.name, *(f"{100 * value:.1f}" for value in values))
    table.add_section()
    reuse = sum(layer.reuse for layer in layers) / len(layers)
    means = [*(mean_cls(layers, n) for n in sizes), reuse]
    table.add_row("mean", *(f"{100 * value:.1f}" for value in means))
    console = Console()
    console.print(table)
    console.print(f"percent, over {len(tokens)} tokens of {text_file}", style="dim")
    if plot is not None:
        draw(layers, sizes, plot)
        console.print(f"plot written to {plot}")


def draw(layers: list[LayerSparsity], sizes: list[int], path: Path) -> None:
    """Plots CLS_n over n, one line a layer and their mean."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("--plot needs matplotlib; pip install 'blockffn-compile[plots]'")
    from blockffn_compile.training.metrics import mean_cls

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="consecutive tokens n", ylabel="experts unused by all n tokens (CLS_n), %"
    )
    for layer in layers:
        axes.plot(sizes, [100 * layer.cls[n] for n in sizes], color="0.75", linewidth=1)
    axes.plot([], [], color="0.75", linewidth=1, label="each layer")
    means = [100 * mean_cls(layers, n) for n in sizes]
    axes.plot(sizes, means, color="C0", marker="o", label="mean")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=map(str, sizes))
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"{path}: {error.strerror}; choose another file for --plot")
