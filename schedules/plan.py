"""What a schedule is asked for: the problem, and the regime that its token count falls in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from blockffn_compile.layer import CHUNK_TOKENS, Activation, Quantisation

Regime = Literal["decode", "chunk", "prefill"]


@dataclass(frozen=True)
class Problem:
    """A chunk-sparse FFN without its weights and tokens.

    Attributes:
        hidden_size: H.
        num_experts: E.
        expert_size: S.
        act: activation of the experts.
        gated: whether the experts have a gate.
        dtype: of inputs, result and, unless they are quantised, weights.
        device: ``torch.device.type``.
        quantisation: of all weights, or None.
    """

    hidden_size: int
    num_experts: int
    expert_size: int
    act: Activation
    gated: bool
    dtype: torch.dtype
    device: str
    quantisation: Quantisation | None = None


def regime(tokens: int) -> Regime:
    """Regime of a token count: decode is one token, chunk up to 64, prefill the rest."""
    if tokens == 1:
        return "decode"
    return "chunk" if tokens <= CHUNK_TOKENS else "prefill"
