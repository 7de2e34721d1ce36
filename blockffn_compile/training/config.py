"""Settings of a training run and the schedules that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AdaptiveFactor:
    """The adaptive scheduler of the chunk sparsification factor.

    Constant for ``constant_steps``; then, every ``interval`` steps, multiplied by
    gamma = mean loss of the interval / mean loss of the one before, and by
    max(``min_growth``, gamma) when gamma > 1.

    Attributes:
        value: the factor now.
    """

    value: float = 5e-2
    constant_steps: int = 1000
    interval: int = 100
    min_growth: float = 1.025
    step: int = 0
    previous_mean: float | None = None
    losses: list[float] = field(default_factory=list)

    def update(self, loss: float) -> float:
        """Takes the loss of one step, returns the factor for the next."""
        self.step += 1
        self.losses.append(loss)
        if self.step % self.interval == 0:
            mean = sum(self.losses) / len(self.losses)
            if self.step > self.constant_steps and self.previous_mean:
                gamma = mean / self.previous_mean
                self.value *= max(self.min_growth, gamma) if gamma > 1 else gamma
            self.previous_mean, self.losses = mean, []
        return self.value


@dataclass(frozen=True)
class RunConfig:
    """What every training run sets.

    Attributes:
        steps: optimiser steps.
        batch: sequences per step.
        context: tokens per sequence.
        learning_rate: peak of AdamW's rate; linear warm-up over 5 % of the steps, then linear
            decay to zero.
        weight_decay: AdamW's, on matrices only.
        seed: of initialisation and data order.
        save_every: steps between checkpoints.
    """

    steps: int = 2000
    batch: int = 8
    context: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    save_every: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warmup = max(1, self.steps // 20)
        rise = (step + 1) / warmup
        fall = (self.steps - step) / max(1, self.steps - warmup)
        return self.learning_rate * min(1.0, rise, fall)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Training of a language model; ``context`` is a multiple of ``chunk``.

    Attributes:
        lambda_al: factor of the activation locality loss.
        lambda_cs: first value of the chunk sparsification factor. Its scheduler is constant
            for the first 10 % of the steps and adjusts every 2 %.
        chunk: tokens per chunk of the chunk sparsification loss.
    """

    lambda_al: float = 2e-3
    lambda_cs: float = 5e-2
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.context % self.chunk:
            raise ValueError(f"context {self.context} is not a multiple of chunk {self.chunk}")

    def factor(self) -> AdaptiveFactor:
        interval = max(1, self.steps // 50)
        return AdaptiveFactor(self.lambda_cs, constant_steps=self.steps // 10, interval=interval)


@dataclass(frozen=True)
class DrafterConfig(RunConfig):
    """Training of an EAGLE head.

    Attributes:
        depth: draft steps that are unrolled in training; ``context`` is longer.
        feature_weight: of the features' smooth L1 loss; the cross-entropy's is 1.
        coverage: fraction of the text that the reduced vocabulary covers.
    """

    steps: int = 1500
    learning_rate: float = 2e-3
    save_every: int = 40
    depth: int = 3
    feature_weight: float = 0.1
    coverage: float = 0.95

    def __post_init__(self) -> None:
        if not 1 <= self.depth < self.context:
            raise ValueError(f"depth {self.depth} is not within 1..context - 1")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage {self.coverage} is not within 0..1")
