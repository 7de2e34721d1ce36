"""A resumable single-device trainer for BlockFFN models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from blockffn_compile.models.checkpoint import save_model
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.training import corpus
from blockffn_compile.training.config import AdaptiveFactor, TrainConfig
from blockffn_compile.training.metrics import mean_cls, measure_sparsity
from blockffn_compile.training.objectives import (
    activation_locality_loss,
    chunk_sparsification_loss,
    record_router_logits,
)
from blockffn_compile.training.run import Run


class Trainer(Run):
    """Trains a language model with the sparsity objectives.

    Attributes:
        factor: of the chunk sparsification loss.
    """

    config: TrainConfig
    model: BlockFFNForCausalLM

    def __init__(
        self,
        model_config: BlockFFNConfig,
        config: TrainConfig,
        out: Path,
        device: str = "cpu",
    ) -> None:
        """Starts a run in ``out``, or resumes the one that is there.

        Raises:
            ValueError: ``out`` holds a run with other settings.
        """
        self.model_config, self.factor = model_config, config.factor()
        super().__init__(config, model_config.to_dict(), out, device)

    def make_tokenizer(self) -> Tokenizer:
        return corpus.train_tokenizer(self.model_config.vocab_size)

    def make_model(self) -> BlockFFNForCausalLM:
        model = BlockFFNForCausalLM(self.model_config)
        model.init_weights()
        return model

    def state(self) -> dict[str, Any]:
        return super().state() | {"factor": dataclasses.asdict(self.factor)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.factor = AdaptiveFactor(**state["factor"])

    def save_checkpoint(self) -> None:
        save_model(self.model, self.out, dtype=torch.bfloat16)

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Language-model, locality and chunk sparsification losses of [batch, context + 1]."""
        with record_router_logits(self.model) as recorded, self.autocast():
            logits = self.model(tokens[:, :-1])
        lm = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        routers = [r.view(tokens.shape[0], -1, r.shape[-1]) for r in recorded.values()]
        if not routers:
            return lm, lm.new_zeros(()), lm.new_zeros(())
        locality = torch.stack([activation_locality_loss(r) for r in routers]).mean()
        sparsity = torch.stack(
            [chunk_sparsification_loss(r, self.config.chunk) for r in routers]
        ).mean()
        return lm, locality, sparsity

    def total(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        lm, locality, sparsity = parts
        loss = lm + self.config.lambda_al * locality + self.factor.value * sparsity
        return loss, {"lm": lm, "al": locality, "cs": sparsity}

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its losses and the factor for the next step."""
        losses = super().train_step()
        return losses | {"lambda_cs": self.factor.update(losses["cs"])}

    @torch.no_grad()
    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Held-out perplexity and sparsity on the first ``limit`` tokens, None for all."""
        tokens = self.held_out(limit)
        with self.autocast():
            result = {"perplexity": perplexity(self.model, tokens, self.config.context)}
            layers = measure_sparsity(self.model, tokens[: 1 << 16], (8,), self.config.context)
        if layers:
            result |= {
                "tls": mean_cls(layers, 1),
                "cls_8": mean_cls(layers, 8),
                "reuse": sum(layer.reuse for layer in layers) / len(layers),
            }
        return result


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: Tensor, context: int) -> float:
    """exp of the mean next-token loss over [T] tokens, in windows of ``context``."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(window[None, :-1])[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)
