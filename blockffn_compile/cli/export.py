"""``blockffn export``: a checkpoint as an ONNX model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blockffn_compile.cli.common import (
    CheckpointArgument,
    Quantize,
    load_model,
    reporting,
    show_report,
)


class Flavour(StrEnum):
    portable = "portable"
    contrib = "contrib"
    dense = "dense"


ExpertsQuantizeOption = Annotated[
    Quantize | None,
    typer.Option(help="Type of the experts' weights, for contrib; the table says what it costs."),
]


class ExportDType(StrEnum):
    float32 = "float32"
    float16 = "float16"


def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    checkpoint: CheckpointArgument = None,
    flavour: Annotated[
        Flavour,
        typer.Option(
            help="Sparse layers that any runtime can run, ONNX Runtime's own operators for them, "
            "or standard operators alone."
        ),
    ] = Flavour.portable,
    quantize: ExpertsQuantizeOption = None,
    dtype: Annotated[
        ExportDType, typer.Option(help="Of the weights and the computation.")
    ] = ExportDType.float32,
    with_past: Annotated[
        bool, typer.Option("--with-past/--no-past", help="With a key-value cache.")
    ] = True,
) -> None:
    """Write a model as ONNX, with its key-value cache, positions and mask as inputs.

    Examples:

    - `blockffn export -o model.onnx`

    - `blockffn export path/to/checkpoint -o model.onnx --dtype float16`

    - `blockffn export -o model.onnx --flavour contrib --quantize int8`
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from blockffn_compile.onnx.export import export as export_model

    model = load_model(checkpoint)
    with (
        reporting(ValueError),  # ModelError is one, too
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("exporting", total=None)
        report = export_model(
            model,
            out,
            flavour=flavour.value,
            quantize=quantize.value if quantize else None,
            dtype=getattr(torch, dtype),
            with_past=with_past,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if flavour is not Flavour.dense:
        show_report(report)
