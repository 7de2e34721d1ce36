"""``blockffn train-drafter``: train an EAGLE draft head for a model, resumable at any time."""

from __future__ import annotations

from typing import Annotated

import typer

from blockffn_compile.cli.common import (
    CheckpointArgument,
    DType,
    fail,
    load_model,
    load_tokenizer,
    reporting,
)
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
from blockffn_compile.training.config import DrafterConfig


def train_drafter(
    out: OutOption,
    checkpoint: CheckpointArgument = None,
    steps: StepsOption = DrafterConfig.steps,
    batch: BatchOption = DrafterConfig.batch,
    context: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = DrafterConfig.context,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak learning rate.")
    ] = DrafterConfig.learning_rate,
    weight_decay: WeightDecayOption = DrafterConfig.weight_decay,
    depth: Annotated[
        int, typer.Option(min=1, help="Draft steps to unroll in training.")
    ] = DrafterConfig.depth,
    feature_weight: Annotated[
        float, typer.Option(min=0, help="Of the features' loss; the cross-entropy's is 1.")
    ] = DrafterConfig.feature_weight,
    coverage: Annotated[
        float, typer.Option(help="Fraction of the text in the reduced vocabulary.")
    ] = DrafterConfig.coverage,
    seed: SeedOption = DrafterConfig.seed,
    save_every: SaveEveryOption = DrafterConfig.save_every,
    device: DeviceOption = None,
) -> None:
    """Train a draft head for speculative decoding, on the sources of Python's standard library.

    Ctrl-C saves and stops; the same command then goes on where it stopped.

    Examples:

    - `blockffn train-drafter --out runs/eagle`

    - `blockffn train-drafter path/to/checkpoint --out runs/eagle --steps 3000 --lr 1e-3`
    """
    import torch

    from blockffn_compile.training.drafter import DrafterTrainer

    target, tokenizer = load_model(checkpoint, DType.float32), load_tokenizer(checkpoint)
    # One token more than the context: the last feature to predict is that of the token after.
    if context >= target.config.max_position_embeddings:
        fail(
            f"--context {context} is not below the model's {target.config.max_position_embeddings}"
        )
    with reporting(ValueError, OSError):
        trainer = DrafterTrainer(
            target,
            tokenizer,
            DrafterConfig(
                steps=steps,
                batch=batch,
                context=context,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                depth=depth,
                feature_weight=feature_weight,
                coverage=coverage,
                seed=seed,
                save_every=save_every,
            ),
            out,
            device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
    run_to_end(trainer, lambda losses: f"loss {losses['ce']:.3f}  feature {losses['feature']:.3f}")
