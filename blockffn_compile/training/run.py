"""What every training run here has in common: data, optimiser, resumable state, log."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from blockffn_compile.training import corpus
from blockffn_compile.training.config import RunConfig


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to ``path`` once it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


class Run(ABC):
    """Trains a module on the standard library's sources, in a folder that can be resumed.

    The folder holds ``state.pt`` (module, optimiser and schedule), ``log.jsonl`` (one record a
    save) and, after every save, a loadable checkpoint.

    Attributes:
        model: the module in training.
        step: optimiser steps done.
    """

    def __init__(
        self, config: RunConfig, architecture: dict[str, Any], out: Path, device: str
    ) -> None:
        """Starts a run in ``out``, or resumes the one that is there.

        Args:
            architecture: what, next to ``config``, a resumed run must have been started with.

        Raises:
            ValueError: ``out`` holds a run with other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.config, self.out, self.device = config, out, torch.device(device)
        path = out / "tokenizer.json"
        if not path.exists():
            with whole(path) as temporary:
                self.make_tokenizer().save(str(temporary))
        self.tokenizer = Tokenizer.from_file(str(path))
        self.train_tokens = self._tokens("train", held_out=False)
        self.held_out_tokens = self._tokens("held_out", held_out=True)
        torch.manual_seed(config.seed)
        self.model = self.make_model().to(self.device)
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
        self.step = 0
        self._settings = {"model": architecture, "train": dataclasses.asdict(config)}
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=self.device, weights_only=True)
            if state["settings"] != self._settings:
                raise ValueError(f"{out} holds a run with other settings; choose another folder")
            self.load_state(state)
        self._compiled_loss = torch.compile(self._loss)

    @abstractmethod
    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer of a new run."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The module as it is before training; the random generator is seeded."""

    @abstractmethod
    def _loss(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Parts of the loss of [batch, context + 1] tokens, scalars; runs compiled."""

    @abstractmethod
    def total(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """What to descend, and the parts by name."""

    @abstractmethod
    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Figures on the first ``limit`` held-out tokens, None for all."""

    @abstractmethod
    def save_checkpoint(self) -> None:
        """Writes the loadable checkpoint into the folder."""

    def _tokens(self, name: str, held_out: bool) -> np.ndarray:
        path = self.out / f"{name}.npy"
        if not path.exists():
            with whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, corpus.encode(self.tokenizer, held_out))
        return np.load(path)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; tensors and plain values."""
        return {
            "settings": self._settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Writes state and checkpoint; an interrupted save leaves the previous ones whole."""
        with whole(self.out / "state.pt") as temporary:
            torch.save(self.state(), temporary)
        self.save_checkpoint()

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

    def held_out(self, limit: int | None) -> Tensor:
        """The first ``limit`` held-out tokens, [T] int64."""
        return torch.from_numpy(self.held_out_tokens[:limit].astype(np.int64)).to(self.device)

    def autocast(self) -> torch.autocast:
        """bf16 on GPUs; fp32 on CPUs, whose bf16 units are often the slower ones."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type != "cpu"
        )

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the parts of its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss, parts = self.total(self._compiled_loss(self.batch(self.step)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: part.item() for name, part in parts.items()}

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
                    **self.evaluate(None if final else 16384),
                }
                self.save()
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
        return record or self.evaluate(None)
