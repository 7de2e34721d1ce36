"""A resumable single-device trainer for BlockFFN models."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to ``path`` once it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


class Trainer:
    """Trains a model on the standard library's sources, in a folder that can be resumed.

    The folder holds ``state.pt`` (optimiser and schedule), ``log.jsonl`` (one record a save)
    and, after every save, a loadable model checkpoint.
    """

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
        out.mkdir(parents=True, exist_ok=True)
        self.config, self.out, self.device = config, out, torch.device(device)
        self.tokenizer = self._tokenizer(model_config.vocab_size)
        self.train_tokens = self._tokens("train", held_out=False)
        self.held_out_tokens = self._tokens("held_out", held_out=True)
        torch.manual_seed(config.seed)
        self.model = BlockFFNForCausalLM(model_config)
        self.model.init_weights()
        self.model.to(self.device)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.factor = config.factor()
        self.step = 0
        self._settings = {
            "model": model_config.to_dict(),
            "train": dataclasses.asdict(config),
        }
        if (out / "state.pt").exists():
            self._resume()
        self._compiled_loss = torch.compile(self._loss)

    def _tokenizer(self, vocab_size: int) -> Tokenizer:
        path = self.out / "tokenizer.json"
        if not path.exists():
            with _whole(path) as temporary:
                corpus.train_tokenizer(vocab_size).save(str(temporary))
        return Tokenizer.from_file(str(path))

    def _tokens(self, name: str, held_out: bool) -> np.ndarray:
        path = self.out / f"{name}.npy"
        if not path.exists():
            with _whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, corpus.encode(self.tokenizer, held_out))
        return np.load(path)

    def _resume(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        if state["settings"] != self._settings:
            raise ValueError(f"{self.out} holds a run with other settings; choose another folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.factor = AdaptiveFactor(**state["factor"])
        self.step = state["step"]

    def save(self) -> None:
        """Writes state, log and model; an interrupted save leaves the previous one whole."""
        state = {
            "settings": self._settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "factor": dataclasses.asdict(self.factor),
            "step": self.step,
        }
        with _whole(self.out / "state.pt") as temporary:
            torch.save(state, temporary)
        save_model(self.model, self.out, dtype=torch.bfloat16)

    def batch(self, step: int) -> Tensor:
        """Tokens of a step, [batch, context + 1] int64: windows in a shuffled order an epoch."""
        size, length = self.config.batch, self.config.context
        windows = (len(self.train_tokens) - 1) // length
        rows = []
        for index in range(step * size, (step + 1) * size):
            epoch, position = divmod(index, windows)
            order = np.random.default_rng((self.config.seed, epoch)).permutation(windows)
            start = int(order[position]) * length
            rows.append(self.train_tokens[start : start + length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Language-model, locality and chunk sparsification losses of [batch, context + 1]."""
        with (
            record_router_logits(self.model) as recorded,
            self._autocast(),
        ):
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

    def _autocast(self) -> torch.autocast:
        """bf16 on GPUs; fp32 on CPUs, whose bf16 units are often the slower ones."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type != "cpu"
        )

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        lm, locality, sparsity = self._compiled_loss(self.batch(self.step))
        loss = lm + self.config.lambda_al * locality + self.factor.value * sparsity
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        record = {"lm": lm.item(), "al": locality.item(), "cs": sparsity.item()}
        self.factor.update(record["cs"])
        return record

    def run(self, progress: Callable[[int, dict[str, float]], None]) -> dict[str, float]:
        """Trains to the end.

        Args:
            progress: called after each step with its number and its losses. Whatever it raises
                ends the run between two steps, where :meth:`save` keeps all that was done.

        Returns:
            The last evaluation.
        """
        record: dict[str, float] = {}
        while self.step < self.config.steps:
            losses = self.train_step()
            progress(self.step, losses)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                final = self.step == self.config.steps
                record = {
                    "step": self.step,
                    **losses,
                    "lambda_cs": self.factor.value,
                    **self.evaluate(None if final else 16384),
                }
                self.save()
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
        return record or self.evaluate(None)

    @torch.no_grad()
    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Held-out perplexity and sparsity on the first ``limit`` tokens, None for all."""
        tokens = torch.from_numpy(self.held_out_tokens[:limit].astype(np.int64)).to(self.device)
        with self._autocast():
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
