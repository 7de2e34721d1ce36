"""Operators of a decoding step: linear layers of few tokens, and attention over a static cache.

On CPUs both run kernels whose sums for one token do not depend on the other tokens of the call, so
a token's logits are bit-identical however many are verified with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockffn_compile.layer import CHUNK_TOKENS
from blockffn_compile.schedules import tir, triton
from blockffn_compile.schedules.packing import PANELS
from blockffn_compile.schedules.quantisation import dequantised, quantisation_of

torch.library.define(
    "blockffn::linear", "(Tensor x, Tensor[] weights, Tensor[]? scales=None) -> Tensor"
)
torch.library.define(
    "blockffn::cached_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor rows, Tensor context, "
    "Tensor ancestors) -> Tensor",
)

# The identity; compiled code stores its argument, rounded, instead of fusing past it.
torch.library.define("blockffn::materialize", "(Tensor x) -> Tensor")


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Products with several matrices at once: ``x @ cat(weights).T``.

    Args:
        x: [T, K].
        weights: matrices [Ni, K]; each counts as constant until it is written to.
        scales: of quantised weights, all of one kind; see ``schedules/quantisation.py``.
        out: [T, sum(Ni)] contiguous, for the result.

    Returns:
        [T, sum(Ni)].
    """
    tokens, inputs = x.shape
    outputs = sum(w.shape[0] for w in weights)
    if out is None:
        out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    kernel = None
    if x.device.type == "cpu" and tokens and (scales or tokens <= CHUNK_TOKENS):
        quantisation = quantisation_of(weights[0], scales[0]) if scales else None
        kernel = tir.linear_kernel(inputs, outputs, x.dtype, quantisation)
    if kernel is None:
        if scales:
            pairs = zip(weights, scales, strict=True)
            weights = [dequantised(w, s, x.dtype) for w, s in pairs]
        return torch.cat([x @ w.T for w in weights], dim=1, out=out)
    function, panel = kernel
    panels = [PANELS.rows(tensors, panel) for tensors in (weights, scales) if tensors]
    for part, result in zip(x.split(CHUNK_TOKENS), out.split(CHUNK_TOKENS), strict=True):
        function(tir.aligned(part), *panels, result)
    return out


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    context: Tensor,
    ancestors: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Attention where each token sees a context in the cache, and its ancestors behind that.

    Args:
        q: [T, Q, D], T at most 64.
        keys: [B, G, L, D], the cache, the keys of these tokens included; G divides Q.
        values: [B, G, L, V].
        rows: [T] int64, sequence of each token: index into B.
        context: [T] int64, how many leading slots of its sequence a token sees.
        ancestors: [T] int64 bit mask: bit j is set where the token sees slot ``context + j``.
        out: [T, Q, V] contiguous, for the result.

    Returns:
        [T, Q, V]; scores are scaled by D**-0.5.
    """
    tokens, heads, key_dim = q.shape
    if out is None:
        out = q.new_empty(tokens, heads, values.shape[3])
    kernel = None
    if q.device.type == "cpu":
        kernel = tir.attention_kernel(heads, keys.shape[1], key_dim, values.shape[3], q.dtype)
        q = tir.aligned(q)
    elif q.device.type == "cuda":
        kernel = triton.attention_kernel(q.dtype, q.device.index)
    if kernel is None:
        return out.copy_(_plain_attention(q, keys, values, rows, context, ancestors))
    kernel(q, keys, values, rows, context, ancestors, out)
    return out


def _plain_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    context: Tensor,
    ancestors: Tensor,
) -> Tensor:
    slots = torch.arange(keys.shape[2], device=q.device)
    node = slots - context[:, None]
    seen = (ancestors[:, None] >> node.clamp(0, 63)) & 1 == 1
    visible = (node < 0) | ((node < 64) & seen)
    # A mask alone multiplies what is hidden by zero, which a NaN survives.
    hidden = ~visible[:, None, :, None]
    keys, values = (stored[rows].masked_fill(hidden, 0) for stored in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], keys, values, visible[:, None, None], enable_gqa=True
    )[:, :, 0]


def _fake_linear(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None
) -> Tensor:
    torch._check(x.dim() == 2, lambda: "x must be [T, K]")
    for pair in zip(weights, scales or (), strict=bool(scales)):
        torch._check(
            quantisation_of(*pair) == quantisation_of(weights[0], scales[0]),  # type: ignore[index]
            lambda: "weights must be quantised in one way",
        )
    for weight in weights:
        columns = weight.shape[-1] * (2 if scales and weight.dtype == torch.uint8 else 1)
        torch._check(
            weight.dim() == 2
            and columns == x.shape[1]
            and (bool(scales) or weight.dtype == x.dtype),
            lambda: "weights must be [N, K] of the dtype of x",
        )
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))


def _fake_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    context: Tensor,
    ancestors: Tensor,
) -> Tensor:
    torch._check(q.dim() == 3 and q.shape[0] <= CHUNK_TOKENS, lambda: "q must be [T <= 64, Q, D]")
    torch._check(
        q.shape[1] % keys.shape[1] == 0 and keys.shape[3] == q.shape[2],
        lambda: "keys must be [B, G, L, D] with G a divisor of Q",
    )
    return q.new_empty(q.shape[0], q.shape[1], values.shape[3])


torch.library.register_fake("blockffn::linear", _fake_linear)
torch.library.register_fake("blockffn::cached_attention", _fake_attention)
torch.library.impl("blockffn::linear", "CompositeExplicitAutograd", linear)
torch.library.impl("blockffn::cached_attention", "CompositeExplicitAutograd", cached_attention)
torch.library.register_fake("blockffn::materialize", torch.empty_like)
torch.library.impl("blockffn::materialize", "CompositeExplicitAutograd", torch.clone)
