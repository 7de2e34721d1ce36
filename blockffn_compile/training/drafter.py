"""Training of an EAGLE draft head on the features of its target.

EAGLE (arXiv 2401.15077) with the training-time test of HASS (arXiv 2408.15766) and EAGLE-3
(arXiv 2503.01840): the head is unrolled over its own predictions, as it will be when it drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from blockffn_compile.models.eagle import EagleHead, eagle_config, save_eagle
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.training.config import DrafterConfig
from blockffn_compile.training.run import Run


def frequency_map(tokens: np.ndarray, vocab_size: int, coverage: float) -> Tensor:
    """The most frequent tokens of a text (FR-Spec, arXiv 2502.14856).

    Args:
        tokens: [T] integers.
        coverage: at least this fraction of the text is among them.

    Returns:
        [D] int64, by falling frequency; as few as will do, rounded up to a multiple of 64.
    """
    counts = np.bincount(tokens, minlength=vocab_size)
    ranked = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[ranked])
    size = int(np.searchsorted(covered, coverage * len(tokens))) + 1
    return torch.from_numpy(ranked[: -(-size // 64) * 64])


class UnrolledKeys:
    """Keys and values of all steps of an unrolled head, one after another in time.

    Stands where a :class:`StaticCache` does, but is differentiable.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, layer: int, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, T, dim]; returns everything so far."""
        self.keys.append(key)
        self.values.append(value)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def unrolled_mask(length: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """What the queries of one unrolled step may look at.

    Step s of a text of n positions has the n - s positions s..n-1, and its keys follow those of
    the steps before. A draft s deep at position i has seen the target's features up to i - s
    (keys of step 0) and its own predictions at i - s + 1..i: the key of step m at i - s + m.

    Args:
        length: n.
        step: s, from 0.

    Returns:
        [n - s, n + (n - 1) + ... + (n - s)] bool, true where a query may look.
    """
    rows = length - step
    causal = torch.ones(rows, length, dtype=torch.bool, device=device).tril()
    own = [torch.eye(rows, length - m, dtype=torch.bool, device=device) for m in range(1, step + 1)]
    return torch.cat([causal, *own], 1)


def unroll(head: EagleHead, embeddings: Tensor, features: Tensor, depth: int) -> list[Tensor]:
    """Drafts ``depth`` deep at every position of a text, along the text.

    Args:
        embeddings: [batch, n, H], of the token after each feature.
        features: [batch, n, H], of the target.

    Returns:
        For s = 0..depth-1, [batch, n - s, H]: the features predicted for positions s+1..n, from
        the target's features s + 1 positions before and earlier.
    """
    length = features.shape[1]
    keys, predicted = UnrolledKeys(), []
    for step in range(depth):
        positions = torch.arange(step, length, device=features.device)
        mask = unrolled_mask(length, step, features.device)
        features = head(embeddings[:, step:], features, positions, keys, mask)
        predicted.append(features)
        features = features[:, :-1]
    return predicted


class DrafterTrainer(Run):
    """Trains an EAGLE head for a target, which stays as it is.

    ``loss = mean over draft steps of CE(softmax of the target, softmax of the head) +
    feature_weight * smooth_L1(predicted, feature)``.
    """

    config: DrafterConfig
    model: EagleHead

    def __init__(
        self,
        target: BlockFFNForCausalLM,
        tokenizer: Tokenizer,
        config: DrafterConfig,
        out: Path,
        device: str = "cpu",
    ) -> None:
        """Starts a run in ``out``, or resumes the one that is there.

        Args:
            target: in eval mode, without gradients.
            tokenizer: the target's.

        Raises:
            ValueError: ``out`` holds a run with other settings.
        """
        self.target, self._tokenizer = target.to(device), tokenizer
        super().__init__(config, target.config.to_dict(), out, device)

    def make_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def make_model(self) -> EagleHead:
        config = self.target.config
        token_map = frequency_map(self.train_tokens, config.vocab_size, self.config.coverage)
        return EagleHead(eagle_config(config), token_map)

    def save_checkpoint(self) -> None:
        save_eagle(self.model, self.out, dtype=torch.bfloat16)

    def _logits(self, features: Tensor) -> Tensor:
        return self.target.lm_head(features * self.target.logit_scale).float()

    def _unrolled(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The target's features [batch, n, H] that follow the first, and :func:`unroll`'s.

        Args:
            tokens: [batch, n + 1].
        """
        with self.autocast():
            with torch.no_grad():
                features = self.target.model(tokens)
                embeddings = self.target.model.embed_tokens(tokens[:, 1:])
                embeddings = embeddings * self.target.config.scale_emb
            predicted = unroll(self.model, embeddings, features[:, :-1], self.config.depth)
        return features[:, 1:], predicted

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and smooth L1 of [batch, context + 1] tokens."""
        features, predicted = self._unrolled(tokens)
        with torch.no_grad():
            wanted = self._logits(features).softmax(-1)
        cross_entropies, distances = [], []
        for step, prediction in enumerate(predicted):
            log_probs = self._logits(prediction).log_softmax(-1)
            cross_entropies.append(-(wanted[:, step:] * log_probs).sum(-1).mean())
            distances.append(F.smooth_l1_loss(prediction, features[:, step:]))
        return torch.stack(cross_entropies).mean(), torch.stack(distances).mean()

    def total(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        cross_entropy, distance = parts
        loss = cross_entropy + self.config.feature_weight * distance
        return loss, {"ce": cross_entropy, "feature": distance}

    @torch.no_grad()
    def evaluate(self, limit: int | None) -> dict[str, float]:
        """Held-out agreement: how often the head's best token is the target's, by draft step.

        ``agreement_d``, d = 1..depth, along the text: the last d - 1 features are the head's own.
        """
        depth, last = self.config.depth, self.config.depth - 1
        hits, count = [0] * depth, 0
        for window in self.held_out(limit).split(self.config.context + 1):
            if len(window) <= depth:
                continue  # too short for the deepest draft
            features, predicted = self._unrolled(window[None])
            # The same positions for each depth: those that the deepest draft has.
            best = self._logits(features[:, last:]).argmax(-1)
            for step, prediction in enumerate(predicted):
                drafted = self._logits(prediction[:, last - step :]).argmax(-1)
                hits[step] += int((drafted == best).sum())
            count += best.numel()
        return {f"agreement_{d + 1}": hits[d] / count for d in range(depth)}
