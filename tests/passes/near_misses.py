"""Layers that look like BlockFFN but must stay as they are, and networks that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.spellings import (
    E,
    Forward,
    S,
    Spelling,
    down_of,
    layer,
    over_experts,
    scores_of,
    up_of,
    with_act,
    with_router,
)

NEAR_MISSES: list[Spelling] = []


def near_miss(
    name: str,
    reason: str,
    up: str = "e,s,h",
    down: str = "e,h,s",
    dtype: torch.dtype = torch.float32,
) -> Callable[[Forward], Forward]:
    """Registers a layer that must be declined for ``reason``."""

    def register(forward: Forward) -> Forward:
        NEAR_MISSES.append(Spelling(name, forward, up, down, dtype, expect={"reason": reason}))
        return forward

    return register


# --- Scores without provable zeros ----------------------------------------------------------------

BIAS = "a bias is added after the ReLU, so off experts are not exactly zero"
MEAN = "a mean is subtracted after the ReLU, so off experts are not exactly zero"
RAW = "scores are raw router logits: no ReLU or mask makes any exactly zero"
SOFTMAX = "scores come from softmax, which has no exact zeros"

near_miss("softmax", SOFTMAX)(with_router(lambda p, r: torch.softmax(r, -1)))
near_miss("softmax_of_relu", SOFTMAX)(with_router(lambda p, r: torch.softmax(F.relu(r), -1)))
near_miss("sigmoid", "scores come from a sigmoid, which has no exact zeros")(
    with_router(lambda p, r: torch.sigmoid(r))
)
near_miss("exponential", "scores come from an exponential, which has no exact zeros")(
    with_router(lambda p, r: torch.exp(r))
)
near_miss("cosine", "scores come from aten.cos, which is not known to keep exact zeros")(
    with_router(lambda p, r: torch.cos(F.relu(r)))
)
near_miss("bias_after_relu", BIAS)(with_router(lambda p, r: F.relu(r) + p.expert_bias))
near_miss("floor_after_relu", BIAS)(with_router(lambda p, r: F.relu(r) + 1e-3))
near_miss("bias_after_norm", BIAS)(
    with_router(lambda p, r: F.rms_norm(F.relu(r), (E,), p.norm, 1e-6) + p.expert_bias)
)
near_miss("layer_norm", MEAN)(with_router(lambda p, r: F.layer_norm(F.relu(r), (E,))))
near_miss("mean_subtracted", MEAN)(
    with_router(lambda p, r: (s := F.relu(r)) - s.mean(-1, keepdim=True))
)
near_miss("raw_logits", RAW)(with_router(lambda p, r: r))

TOKENS = "zeros among the scores are those of tokens, not of experts"

near_miss("softmax_of_masked_tokens", SOFTMAX)(
    with_router(lambda p, r: torch.softmax(r, -1).masked_fill(r[:, :1] < 0, 0.0))
)
near_miss("softmax_times_token_gate", SOFTMAX)(
    with_router(lambda p, r: torch.softmax(r, -1) * F.relu(r[:, :1]))
)
near_miss("softmax_over_masked_tokens", SOFTMAX)(
    with_router(lambda p, r: torch.softmax(r.masked_fill(r[:, :1] < 0, float("-inf")), -1))
)
near_miss("token_gate_alone", TOKENS)(
    with_router(lambda p, r: F.relu(r[:, :1]) * torch.ones_like(r))
)


@near_miss("softmax_and_separate_token_gate", SOFTMAX)
def _(p, x):
    logits = x @ p.router.t()
    mid = F.silu(up_of(p, x)) * over_experts(torch.softmax(logits, -1))
    return down_of(p, mid * F.relu(logits[:, 0])[None, :, None])


@near_miss("scores_are_an_input", "scores enter the graph as data")
def _(p, x):
    return layer(p, x, p.wide_bias[: x.shape[0] * E].view(-1, E).contiguous())


@near_miss("scores_of_experts_alone", "no factor of the scores depends on both token and expert")
def _(p, x):
    return down_of(p, F.silu(up_of(p, x)) * F.relu(p.norm)[:, None, None])


# --- Activations and what stands around them ------------------------------------------------------

near_miss("tanh_gelu", "the activation is the tanh approximation of GELU, not one of silu")(
    with_act(lambda u: F.gelu(u, approximate="tanh"))
)
near_miss("tanh", "the activation is tanh, not one of silu")(with_act(torch.tanh))
near_miss("sigmoid_activation", "the activation is sigmoid, not one of silu")(
    with_act(torch.sigmoid)
)
near_miss("squared_relu", "aten.pow is applied after the activation")(
    with_act(lambda u: F.relu(u).pow(2))
)
near_miss("quick_gelu", "the argument of the activation is scaled")(
    with_act(lambda u: u * torch.sigmoid(1.702 * u))
)


@near_miss("scores_before_activation", "scores are multiplied before the activation, not after it")
def _(p, x):
    return down_of(p, F.silu(up_of(p, x) * over_experts(scores_of(p, x))))


@near_miss("activation_after_scores", "aten.tanh is applied after the scores")
def _(p, x):
    return down_of(p, torch.tanh(F.silu(up_of(p, x)) * over_experts(scores_of(p, x))))


@near_miss("shifted", "something is added between the activation and the down projection")
def _(p, x):
    return down_of(p, (F.silu(up_of(p, x)) + 0.1) * over_experts(scores_of(p, x)))


@near_miss("up_bias", "the up projection has a bias", up="es,h", down="h,es")
def _(p, x):
    mid = F.silu(F.linear(x, p.up, p.wide_bias)).view(-1, E, S) * scores_of(p, x).unsqueeze(-1)
    return F.linear(mid.flatten(1), p.down)


@near_miss("down_bias", "the down projection has a bias", up="es,h", down="h,es")
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).view(-1, E, S) * scores_of(p, x).unsqueeze(-1)
    return F.linear(mid.flatten(1), p.down, p.out_bias)


# --- Experts and weights --------------------------------------------------------------------------


@near_miss("unequal_experts", "experts have unequal sizes (6, 10)", up="es,h", down="h,es")
def _(p, x):
    scores, y, start = scores_of(p, x), torch.zeros_like(x), 0
    for e, size in enumerate((6, 10, 6, 10)):
        part = slice(start, start + size)
        mid = F.silu(F.linear(x, p.up[part])) * scores[:, e : e + 1]
        y, start = y + F.linear(mid, p.down[:, part]), start + size
    return y


@near_miss("unequal_experts_gathered", "experts have unequal sizes", up="es,h", down="h,es")
def _(p, x):
    of_column = torch.tensor([0] * 6 + [1] * 10 + [2] * 6 + [3] * 10)
    each = scores_of(p, x)[:, of_column]
    return F.linear(F.silu(F.linear(x, p.up)) * each, p.down)


@near_miss("experts_one_by_one", "experts are computed one at a time; stack their weights")
def _(p, x):
    scores = scores_of(p, x)
    each = (F.linear(F.silu(F.linear(x, p.up[e])), p.down[e]) for e in range(E))
    return sum(scores[:, e, None] * y for e, y in enumerate(each))


@near_miss("weights_cast", "weights are computed in the graph (up projection: a cast)")
def _(p, x):
    x = x.to(torch.bfloat16)
    scores = F.relu(x @ p.router.t().to(x.dtype))
    mid = F.silu(torch.matmul(x, p.up.mT.to(x.dtype))) * over_experts(scores)
    return torch.einsum("ets,ehs->th", mid, p.down.to(x.dtype))


@near_miss("weights_scaled", "weights are computed in the graph (down projection: aten.mul)")
def _(p, x):
    mid = F.silu(up_of(p, x)) * over_experts(scores_of(p, x))
    return torch.einsum("ets,ehs->th", mid, p.down * p.norm[:, None, None])


@near_miss("float64", "the input and the weights are float64", dtype=torch.float64)
def _(p, x):
    return layer(p, x, scores_of(p, x))


@near_miss("gate_reads_another_input", "gate and up projections read different inputs")
def _(p, x):
    mid = F.silu(torch.matmul(x, p.gate.mT)) * torch.matmul(x.flip(0), p.up.mT)
    return down_of(p, mid * over_experts(scores_of(p, x)))


@near_miss("gate_stored_otherwise", "gate and up projections are stored in different layouts")
def _(p, x):
    gate = torch.matmul(x, p.down)  # [E, H, S]
    return down_of(p, F.silu(gate) * up_of(p, x) * over_experts(scores_of(p, x)))


@near_miss("narrow_output", "the output is not as wide as the input", down="e,s,s")
def _(p, x):
    return down_of(p, F.silu(up_of(p, x)) * over_experts(scores_of(p, x)))


# --- Second users ---------------------------------------------------------------------------------

SECOND_USER = "the intermediate activations have a second user"


@near_miss("intermediate_returned", SECOND_USER)
def _(p, x):
    mid = F.silu(up_of(p, x)) * over_experts(scores_of(p, x))
    return down_of(p, mid), mid


@near_miss("projection_used_twice", SECOND_USER)
def _(p, x):
    up = up_of(p, x)
    return down_of(p, F.silu(up) * over_experts(scores_of(p, x))), up.amax()


# --- Networks of which there is nothing to say ----------------------------------------------------


def dense_ffn(p: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, p.up)), p.down)


def dense_gated_ffn(p: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, p.gate)) * F.linear(x, p.up), p.down)


def attention(p: Any, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(-1, E, S).transpose(0, 1) for w in (p.up, p.gate, p.up))
    y = torch.softmax(q @ k.mT, -1) @ v
    return F.linear(y.transpose(0, 1).flatten(1), p.down)


def squeeze_excite(p: Any, x: Tensor) -> Tensor:
    return x * F.relu(F.relu(x @ p.router.t()) @ p.router)


def shared_down(p: Any, x: Tensor) -> Tensor:
    """One down weight for all experts: another formula."""
    mid = F.silu(F.linear(x, p.up)).view(-1, E, S) * scores_of(p, x).unsqueeze(-1)
    return mid.sum(1) @ p.down[:, :S].t()


def scores_along_another_axis(p: Any, x: Tensor) -> Tensor:
    """As many tokens as experts, and the scores of the wrong axis."""
    x = x[:E]
    mid = F.silu(F.linear(x, p.up)).view(-1, E, S) * scores_of(p, x).sum(0)[:, None, None]
    return F.linear(mid.flatten(1), p.down)


OTHERS = [
    Spelling(forward.__name__, forward, up="es,h", down="h,es")
    for forward in (
        dense_ffn,
        dense_gated_ffn,
        attention,
        squeeze_excite,
        shared_down,
        scores_along_another_axis,
    )
]
