"""``blockffn rewrite``: makes the BlockFFN layers of an ONNX file sparse."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blockffn_compile.cli.common import reporting, show_report
from blockffn_compile.cli.export import ExpertsQuantizeOption


class Flavour(StrEnum):
    portable = "portable"
    contrib = "contrib"


def rewrite(
    model: Annotated[Path, typer.Argument(help="ONNX file, of any exporter.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    flavour: Annotated[
        Flavour,
        typer.Option(
            help="To an operator that any runtime can run, or to ONNX Runtime's own, MoE and QMoE."
        ),
    ] = Flavour.portable,
    quantize: ExpertsQuantizeOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run both sides of every rewrite and compare.")
    ] = False,
) -> None:
    """Rewrite BlockFFN layers to an operator that runs only the experts that are on.

    The operator comes with a body in standard operators: the new file runs in any runtime.
    Operators of the flavour contrib run in ONNX Runtime alone.

    Examples:

    - `blockffn rewrite model.onnx -o sparse.onnx`

    - `blockffn rewrite model.onnx -o sparse.onnx --verify`

    - `blockffn rewrite model.onnx -o small.onnx --flavour contrib --quantize int8`
    """
    from rich.console import Console
    from rich.progress import Progress

    from blockffn_compile.onnx.rewrite import rewrite as rewrite_model
    from blockffn_compile.passes.verification import VerificationError

    with (
        reporting(ValueError, VerificationError),  # ModelError is a ValueError, too
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("rewriting", total=None)
        report = rewrite_model(
            model,
            out,
            flavour=flavour.value,
            quantize=quantize.value if quantize else None,
            verify=verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show_report(report)
