"""Sparsity of routing: TLS, CLS_n and the reuse ratio, per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockffn_compile.training.objectives import record_router_logits


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one layer on one text, all as fractions.

    Attributes:
        name: module path of the layer.
        cls: CLS_n by n: 1 - mean fraction of experts active in the union of n consecutive
            tokens, over disjoint chunks. ``cls[1]`` is TLS.
        reuse: of the experts active for a token, the fraction that was active for the token
            before, over all tokens together.
    """

    name: str
    cls: dict[int, float]
    reuse: float

    @property
    def tls(self) -> float:
        return self.cls[1]


def chunk_sparsity(active: Tensor, n: int) -> float:
    """CLS_n of ``active`` [T, E] bool; a last chunk shorter than n does not count.

    Raises:
        ValueError: fewer than n tokens.
    """
    chunks = active.shape[0] // n
    if chunks == 0:
        raise ValueError(f"CLS_{n} needs at least {n} tokens, got {active.shape[0]}")
    union = active[: chunks * n].view(chunks, n, -1).any(1)
    return 1 - union.float().mean().item()


def reuse_ratio(active: Tensor) -> float:
    """Fraction of active pairs whose expert was active for the previous token; NaN for none."""
    later, shared = active[1:], active[1:] & active[:-1]
    return (shared.sum() / later.sum()).item()


def layer_sparsity(name: str, active: Tensor, sizes: Iterable[int]) -> LayerSparsity:
    """Metrics of one layer from its activity mask [T, E] in text order."""
    cls = {n: chunk_sparsity(active, n) for n in (1, *sizes)}
    return LayerSparsity(name, cls, reuse_ratio(active))


@torch.no_grad()
def measure_sparsity(
    model: nn.Module, tokens: Tensor, sizes: Iterable[int] = (8,), context: int = 512
) -> list[LayerSparsity]:
    """Runs ``model`` over a text and measures every BlockFFN layer.

    Args:
        model: called as ``model(tokens)`` on [1, n] windows.
        tokens: [T] int64, the text.
        sizes: chunk sizes n for CLS_n.
        context: window length; windows follow each other without overlap.

    Returns:
        One record a layer, in model order; empty when the model has no BlockFFN layer.
    """
    active: dict[str, list[Tensor]] = defaultdict(list)
    with record_router_logits(model) as logits:
        for window in tokens.split(context):
            model(window[None])
            for name, value in logits.items():
                active[name].append(value.reshape(-1, value.shape[-1]) > 0)
    sizes = tuple(sizes)
    return [layer_sparsity(name, torch.cat(parts), sizes) for name, parts in active.items()]


def mean_cls(layers: list[LayerSparsity], n: int) -> float:
    """Mean CLS_n over layers; n = 1 gives TLS."""
    return sum(layer.cls[n] for layer in layers) / len(layers)
