"""Sparsity objectives of BlockFFN (arXiv 2507.08771, sections 3.2 and 3.3).

Both act on router logits A0, the inputs of the router's ReLU, given per layer as
[batch, T, E] tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockffn_compile.layer import BlockFFN

#: Keeps ln(1 - p) finite when one expert takes the whole score.
LOG_EPS = 1e-5


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the router logits of every BlockFFN layer during forward passes.

    Yields:
        A dict from layer name to [tokens, E]; each forward overwrites the last one's entries.
    """
    logits: dict[str, Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            logits[name] = output

        return record

    handles = [
        module.router_proj.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, BlockFFN)
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def activation_locality_loss(logits: Tensor, alpha: float = 100.0) -> Tensor:
    """Pulls the activation pattern of each token towards that of its right neighbour.

    ``BCE(sigmoid(alpha * A0), sigmoid(alpha * LeftShift(A0)))``, mean over pairs and experts.

    Args:
        logits: [batch, T, E], T >= 2.
        alpha: steepness; 100 in the paper.

    Returns:
        Scalar, fp32.
    """
    steep = logits.float() * alpha
    return F.binary_cross_entropy_with_logits(steep[:, :-1], steep[:, 1:].sigmoid())


def chunk_sparsification_loss(logits: Tensor, chunk: int = 64) -> Tensor:
    """Expected fraction of experts that a chunk of tokens activates.

    ``mean_i [1 - exp(sum_k ln(1 - p_ik))]`` with p = ReLU(A0) normalised over experts, where
    k runs over the tokens of a chunk.

    Args:
        logits: [batch, T, E]; T must be a multiple of ``chunk``.
        chunk: tokens per chunk; 64 in the published code.

    Returns:
        Scalar in [0, 1], fp32.
    """
    scores = F.relu(logits.float())
    p = scores / (scores.sum(-1, keepdim=True) + LOG_EPS)
    log_off = torch.log(1 - p + LOG_EPS).unflatten(1, (-1, chunk)).sum(2)
    return 1 - log_off.exp().mean()
