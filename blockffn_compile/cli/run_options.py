"""Options of every training command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutOption = Annotated[Path, typer.Option(help="Folder of the run; an unfinished one is resumed.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences a step.")]
WeightDecayOption = Annotated[float, typer.Option(min=0, help="Of the matrices.")]
SeedOption = Annotated[int, typer.Option(help="Of weights and data order.")]
SaveEveryOption = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
]
