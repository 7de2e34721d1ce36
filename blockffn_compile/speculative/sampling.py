"""Choosing a token from logits, each draw tied to its place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; the defaults are greedy decoding.

    The filters are those of Hugging Face transformers, in its order: repetition penalty,
    temperature, top-k, top-p, min-p. The random number behind a token depends only on the seed and
    the token's position, not on how many tokens are decoded at a time.

    Attributes:
        temperature: divides the logits; 0 always takes the best token.
        top_k: keep the k best tokens (and those equal to the k-th); None keeps all.
        top_p: keep the fewest tokens with at least this probability together, in (0, 1].
        min_p: keep tokens of at least this times the best token's probability, in [0, 1].
        repetition_penalty: of tokens already in the text, positive logits are divided by this and
            others multiplied (CTRL, arXiv 1909.05858); 1 changes nothing.
        seed: within 0..2^64-1; None draws one from PyTorch's global generator.

    Raises:
        ValueError: a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be within 0..1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be finite and > 0, got {self.repetition_penalty}"
            )
        if self.seed is None:
            object.__setattr__(self, "seed", int(torch.randint(2**63 - 1, ())))
        elif not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be within 0..2^64-1, got {self.seed}")

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the argmax of the raw logits, whatever the text."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def distribution(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        """The probability of each token to be chosen.

        Args:
            logits: [V], of any floating dtype.
            history: the text so far; needed for the repetition penalty only.

        Returns:
            [V], float64 for float64 logits, else float32.
        """
        logits = self._penalised(logits, history)
        if self.temperature == 0:
            return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p < 1:
            probs = _top_p(probs, self.top_p)
        if self.min_p > 0:
            probs = probs.masked_fill(probs < self.min_p * probs.max(), 0)
        return probs / probs.sum()

    def choose(self, logits: Tensor, history: Sequence[int], position: int) -> int:
        """The next token.

        Args:
            logits, history: as for :meth:`distribution`.
            position: index of the new token in its text.

        Raises:
            ValueError: sampling from logits that are NaN, or all -inf.
        """
        if self.is_argmax:
            return best_tokens(logits[None])[0]
        if self.temperature == 0:
            return best_tokens(self._penalised(logits, history)[None])[0]
        cumulative = self.distribution(logits, history).cumsum(0, dtype=torch.float64)
        total = float(cumulative[-1])
        if not total > 0:
            raise ValueError("the logits are NaN or all -inf: there is nothing to sample from")
        # The number is below 1, so the product stays below the last sum; and a token of
        # probability 0 has the sum of the token before it, which `right` skips.
        level = self._uniform(position) * total
        return int(torch.searchsorted(cumulative, level, right=True))

    def _uniform(self, position: int) -> float:
        """A number in [0, 1): Philox is a function of (key, counter), with no state to carry."""
        return np.random.Generator(np.random.Philox(key=self.seed, counter=position)).random()

    def _penalised(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.repetition_penalty == 1 or not history:
            return logits
        seen = torch.tensor(list(set(history)), device=logits.device)
        scores = logits[seen]
        penalty = self.repetition_penalty
        return logits.index_copy(
            0, seen, torch.where(scores > 0, scores / penalty, scores * penalty)
        )


def best_tokens(logits: Tensor) -> list[int]:
    """The argmax of each row of logits [N, V], the first one where several are equal."""
    if logits.is_cpu:  # PyTorch's argmax takes ten to thirty times as long there as NumPy's
        logits = logits.detach()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.numpy().argmax(-1).tolist()
    return logits.argmax(-1).tolist()


def _top_p(probs: Tensor, top_p: float) -> Tensor:
    """``probs`` [V] without the least probable tokens of together at most 1 - top_p."""
    rest = 1 - top_p
    # All tokens below rest / V together stay below rest, so they go without being sorted: sorting
    # a whole vocabulary takes longer than everything else here.
    large = (probs >= rest / len(probs)).nonzero().squeeze(1)
    ordered, order = probs[large].sort(stable=True)
    dropped = probs.sum() - ordered.sum() + ordered.cumsum(0) <= rest
    dropped[-1] = False
    return torch.zeros_like(probs).index_copy(0, large[order], ordered.masked_fill(dropped, 0))
