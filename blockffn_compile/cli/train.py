"""``blockffn train``: train a model, resumable at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockffn_compile.cli.common import fail, reporting
from blockffn_compile.cli.progress import run_to_end
from blockffn_compile.cli.run_options import (
    BatchOption,
    DeviceOption,
    OutOption,
    SaveEveryOption,
    SeedOption,
    StepsOption,
    WeightDecayOption,
)
from blockffn_compile.training.config import TrainConfig


def train(
    out: OutOption,
    config: Annotated[
        Path | None,
        typer.Option(help="Architecture, as config.json; default: the bundled model's."),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Train the dense twin of equal size instead.")
    ] = False,
    steps: StepsOption = TrainConfig.steps,
    batch: BatchOption = TrainConfig.batch,
    context: Annotated[
        int, typer.Option(min=2, help="Tokens a sequence; a multiple of the chunk.")
    ] = TrainConfig.context,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = TrainConfig.learning_rate,
    weight_decay: WeightDecayOption = TrainConfig.weight_decay,
    lambda_al: Annotated[
        float, typer.Option(min=0, help="Factor of the activation locality loss.")
    ] = TrainConfig.lambda_al,
    lambda_cs: Annotated[
        float, typer.Option(min=0, help="First factor of the chunk sparsification loss.")
    ] = TrainConfig.lambda_cs,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens a chunk of that loss.")
    ] = TrainConfig.chunk,
    seed: SeedOption = TrainConfig.seed,
    save_every: SaveEveryOption = TrainConfig.save_every,
    device: DeviceOption = None,
) -> None:
    """Train a BlockFFN model on the sources of Python's standard library.

    Ctrl-C saves and stops; the same command then goes on where it stopped.

    Examples:

    - `blockffn train --out runs/sparse --steps 1500 --lambda-cs 0.1`

    - `blockffn train --out runs/dense --steps 1500 --dense`

    - `blockffn train --out runs/mine --config model.json --context 1024`
    """
    import torch

    from blockffn_compile.models.config import BlockFFNConfig, CheckpointError
    from blockffn_compile.training import presets
    from blockffn_compile.training.trainer import Trainer

    with reporting(CheckpointError):
        model_config = presets.BUNDLED if config is None else BlockFFNConfig.from_file(config)
    if dense:
        model_config = presets.dense_twin(model_config)
    with reporting(ValueError, OSError):
        trainer = Trainer(
            model_config,
            TrainConfig(
                steps=steps,
                batch=batch,
                context=context,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                lambda_al=lambda_al,
                lambda_cs=lambda_cs,
                chunk=chunk,
                seed=seed,
                save_every=save_every,
            ),
            out,
            device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
    if context > model_config.max_position_embeddings:
        fail(f"--context {context} exceeds the model's {model_config.max_position_embeddings}")
    run_to_end(
        trainer,
        lambda losses: (
            f"loss {losses['lm']:.3f}  locality {losses['al']:.2f}  chunk {losses['cs']:.3f}  "
            f"lambda {losses['lambda_cs']:.3g}"
        ),
    )
