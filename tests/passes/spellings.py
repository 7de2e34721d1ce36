"""One layer written in many ways: every spelling must be rewritten.

A spelling is a function of parameters ``p`` and an input ``x``.  Sizes are all different, so that
no axis can be taken for another unless a spelling makes them equal on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, H, E, S = 5, 16, 4, 8
SIZES = {"h": H, "e": E, "s": S}

Forward = Callable[..., Any]


class Parameters(nn.Module):
    """``router`` [E, H], ``norm`` [E], and ``up``, ``gate``, ``down`` stored as their axes say."""

    def __init__(self, up: str, down: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int, fan_in: int = 1) -> nn.Parameter:
            values = torch.randn(shape, generator=generator) * fan_in**-0.5
            return nn.Parameter(values.to(dtype), requires_grad=False)

        def stored(axes: str, fan_in: int) -> nn.Parameter:
            shape = (prod(SIZES[letter] for letter in dim) for dim in axes.split(","))
            return parameter(*shape, fan_in=fan_in)

        self.router = parameter(E, H, fan_in=H)
        self.norm = parameter(E)
        self.expert_bias, self.wide_bias, self.out_bias = map(parameter, (E, E * S, H))
        self.up, self.gate = stored(up, fan_in=H), stored(up, fan_in=H)
        self.down = stored(down, fan_in=S)


class Layer(nn.Module):
    """A spelling as a module."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.p = Parameters(spelling.up, spelling.down, spelling.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = self.spelling.forward(self.p, x)
        return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Spelling:
    """One way to write a layer.

    Attributes:
        name: test id.
        forward: parameters and input to output.
        up: axes of the stored up and gate weights.
        down: axes of the stored down weight.
        dtype: of parameters and input.
        shape: of the input.
        expect: attributes of the match or of its spec; for a near miss, a part of the reason.
    """

    name: str
    forward: Forward
    up: str = "e,s,h"
    down: str = "e,h,s"
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (T, H)
    expect: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, Tensor]:
        """The module and an example input."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(1))
        return Layer(self).eval(), x.to(self.dtype)


MATCHES: list[Spelling] = []


def match(
    name: str,
    up: str = "e,s,h",
    down: str = "e,h,s",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (T, H),
    **expect: Any,
) -> Callable[[Forward], Forward]:
    """Registers a spelling that must be rewritten."""

    def register(forward: Forward) -> Forward:
        expected = {"up_axes": up, "down_axes": down, **expect}
        MATCHES.append(Spelling(name, forward, up, down, dtype, shape, expected))
        return forward

    return register


# --- Parts that spellings share -------------------------------------------------------------------


def scores_of(p: Any, x: Tensor) -> Tensor:
    return F.relu(x @ p.router.t())


def up_of(p: Any, x: Tensor) -> Tensor:
    """[E, T, S] from a weight [E, S, H]."""
    return torch.matmul(x, p.up.transpose(1, 2))


def down_of(p: Any, mid: Tensor) -> Tensor:
    """[T, H] from [E, T, S] and a weight [E, H, S]."""
    return torch.einsum("ets,ehs->th", mid, p.down)


def over_experts(scores: Tensor) -> Tensor:
    """[E, T, 1] from [T, E]."""
    return scores.t().unsqueeze(-1)


def layer(p: Any, x: Tensor, scores: Tensor) -> Tensor:
    return down_of(p, F.silu(up_of(p, x)) * over_experts(scores))


def with_act(act: Callable[[Tensor], Tensor]) -> Forward:
    return lambda p, x: down_of(p, act(up_of(p, x)) * over_experts(scores_of(p, x)))


def with_router(router: Callable[[Any, Tensor], Tensor]) -> Forward:
    """``router`` makes scores of logits, both [T, E]."""
    return lambda p, x: layer(p, x, router(p, x @ p.router.t()))


# --- Projections ----------------------------------------------------------------------------------


@match("einsum_both", act="silu", norm="none", layout="block", gated=False)
def _(p, x):
    mid = F.silu(torch.einsum("th,esh->tes", x, p.up)) * scores_of(p, x)[:, :, None]
    return torch.einsum("tes,ehs->th", mid, p.down)


@match("einsum_expert_major")
def _(p, x):
    mid = F.silu(torch.einsum("th,esh->ets", x, p.up)) * scores_of(p, x).t()[..., None]
    return torch.einsum("ets,ehs->th", mid, p.down)


@match("einsum_as_published")
def _(p, x):
    mid = F.silu(torch.matmul(x, p.up.transpose(1, 2))) * scores_of(p, x).T.unsqueeze(-1)
    return torch.einsum("esd,emd->sm", mid, p.down)


@match("einsum_of_three")
def _(p, x):
    mid = F.silu(torch.einsum("th,esh->tes", x, p.up))
    return torch.einsum("te,tes,ehs->th", scores_of(p, x), mid, p.down)


@match("bmm_chain")
def _(p, x):
    mid = F.silu(torch.bmm(x.expand(E, -1, -1), p.up.mT)) * over_experts(scores_of(p, x))
    return torch.bmm(mid, p.down.mT).sum(0)


@match("bmm_weight_first")
def _(p, x):
    mid = F.silu(torch.bmm(p.up, x.t().expand(E, H, -1))) * scores_of(p, x).t().unsqueeze(1)
    return torch.bmm(p.down, mid).sum(dim=0).t()


@match("matmul_of_repeated_input")
def _(p, x):
    mid = F.silu(x.repeat(E, 1, 1) @ p.up.mT) * over_experts(scores_of(p, x))
    return (mid @ p.down.mT).sum(0)


@match("linear_functional", up="es,h", down="h,es", layout="block_linear")
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).view(-1, E, S) * scores_of(p, x).unsqueeze(-1)
    return F.linear(mid.flatten(1), p.down)


@match("linear_at_operator", up="es,h", down="h,es", layout="block_linear")
def _(p, x):
    mid = F.silu(x @ p.up.T).unflatten(1, (E, S)) * scores_of(p, x)[..., None]
    return mid.reshape(x.shape[0], E * S) @ p.down.T


@match("linear_up_bmm_down", up="es,h", down="e,h,s")
def _(p, x):
    mid = F.silu(x @ p.up.T).view(-1, E, S) * scores_of(p, x)[..., None]
    return torch.bmm(mid.transpose(0, 1), p.down.mT).sum(0)


@match("bmm_up_linear_down", up="e,s,h", down="h,es")
def _(p, x):
    mid = F.silu(up_of(p, x)) * over_experts(scores_of(p, x))
    return F.linear(mid.permute(1, 0, 2).reshape(-1, E * S), p.down)


@match("weights_reshaped_to_linear")
def _(p, x):
    mid = F.silu(x @ p.up.reshape(E * S, H).t()).view(-1, E, S) * scores_of(p, x)[..., None]
    return mid.flatten(1) @ p.down.permute(0, 2, 1).reshape(E * S, H)


@match("tokens_last", up="es,h", down="h,es")
def _(p, x):
    mid = F.silu(p.up @ x.t()).view(E, S, -1) * F.relu(p.router @ x.t()).unsqueeze(1)
    return (p.down @ mid.flatten(0, 1)).t()


@match("product_and_sum")
def _(p, x):
    mid = F.silu((x[:, None, None, :] * p.up).sum(-1)) * scores_of(p, x)[..., None]
    return (mid.unsqueeze(2) * p.down).sum(dim=(1, 3))


@match("matvec_as_inductor_decomposes_it", shape=(1, H))
def _(p, x):
    u = (x.expand(E, 1, H).unsqueeze(-1) * p.up.mT.unsqueeze(1)).sum(dim=2)
    mid = F.silu(u) * over_experts(scores_of(p, x))
    return (mid.unsqueeze(-1) * p.down.mT.unsqueeze(1)).sum(dim=2).sum(0)


# --- Where the scores are multiplied --------------------------------------------------------------


@match("scores_after_down")
def _(p, x):
    each = torch.bmm(F.silu(up_of(p, x)), p.down.mT)
    return (each * over_experts(scores_of(p, x))).sum(0)


@match("scores_after_down_by_einsum")
def _(p, x):
    each = torch.einsum("ets,ehs->eth", F.silu(up_of(p, x)), p.down)
    return torch.einsum("te,eth->th", scores_of(p, x), each)


@match("scores_after_down_by_matmul")
def _(p, x):
    each = torch.einsum("ets,ehs->teh", F.silu(up_of(p, x)), p.down)
    return (scores_of(p, x).unsqueeze(1) @ each).squeeze(1)


@match("scores_viewed", up="es,h", down="h,es")
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).view(-1, E, S) * scores_of(p, x).view(-1, E, 1)
    return F.linear(mid.flatten(1), p.down)


@match("scores_expanded", up="es,h", down="h,es")
def _(p, x):
    each = scores_of(p, x).unsqueeze(-1).expand(-1, E, S).reshape(-1, E * S)
    return F.linear(F.silu(F.linear(x, p.up)) * each, p.down)


@match("scores_repeat_interleaved", up="es,h", down="h,es")
def _(p, x):
    each = scores_of(p, x).repeat_interleave(S, dim=1)
    return F.linear(each * F.silu(F.linear(x, p.up)), p.down)


@match("scores_and_token_weights")
def _(p, x):
    mid = F.silu(up_of(p, x)) * over_experts(scores_of(p, x))
    return down_of(p, mid * x.norm(dim=-1)[None, :, None])


@match("scores_and_expert_weights")
def _(p, x):
    mid = F.silu(up_of(p, x)) * p.norm[:, None, None]
    return down_of(p, mid * over_experts(scores_of(p, x)))


@match("scaled_between", scale=0.25)
def _(p, x):
    return down_of(p, F.silu(up_of(p, x)) * 0.5 * over_experts(scores_of(p, x)) / 2)


# --- Layouts of the stored weights ----------------------------------------------------------------


@match("stored_e_h_s", up="e,h,s", down="e,s,h")
def _(p, x):
    mid = F.silu(torch.matmul(x, p.up)) * over_experts(scores_of(p, x))
    return torch.bmm(mid, p.down).sum(0)


@match("stored_h_es", up="h,es", down="es,h", layout="block_linear")
def _(p, x):
    mid = F.silu(x @ p.up).view(-1, E, S) * scores_of(p, x).unsqueeze(-1)
    return mid.flatten(1) @ p.down


@match("stored_h_e_s", up="h,e,s", down="h,e,s")
def _(p, x):
    mid = F.silu(torch.einsum("th,hes->tes", x, p.up)) * scores_of(p, x)[..., None]
    return torch.einsum("tes,hes->th", mid, p.down)


@match("stored_s_e_h", up="s,e,h", down="s,h,e")
def _(p, x):
    mid = F.silu(torch.einsum("th,seh->tse", x, p.up)) * scores_of(p, x)[:, None, :]
    return torch.einsum("tse,she->th", mid, p.down)


@match("stored_se_h", up="se,h", down="h,se")
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).view(-1, S, E) * scores_of(p, x).unsqueeze(1)
    return F.linear(mid.flatten(1), p.down)


# --- Activations ----------------------------------------------------------------------------------

match("act_relu", act="relu")(with_act(F.relu))
match("act_relu_by_clamp", act="relu")(with_act(lambda u: u.clamp(min=0)))
match("act_relu_by_maximum", act="relu")(with_act(lambda u: torch.maximum(u, torch.zeros_like(u))))
match("act_gelu", act="gelu")(with_act(F.gelu))
match("act_gelu_bfloat16", act="gelu", dtype=torch.bfloat16)(with_act(F.gelu))
match("act_gelu_by_erf", act="gelu")(with_act(lambda u: 0.5 * u * (1 + torch.erf(u / sqrt(2)))))
match("act_silu_by_sigmoid", act="silu")(with_act(lambda u: u * torch.sigmoid(u)))
match("act_silu_sigmoid_first", act="silu")(with_act(lambda u: torch.sigmoid(u) * u))
match("act_silu_by_division", act="silu")(with_act(lambda u: u / (1 + torch.exp(-u))))
match("act_silu_by_reciprocal", act="silu")(with_act(lambda u: u * (1 / (1 + torch.exp(-u)))))


# --- Gated experts --------------------------------------------------------------------------------


@match("gated", gated=True)
def _(p, x):
    mid = F.silu(torch.matmul(x, p.gate.mT)) * torch.matmul(x, p.up.mT)
    return down_of(p, mid * over_experts(scores_of(p, x)))


@match("gated_linear", up="es,h", down="h,es", gated=True, act="relu")
def _(p, x):
    mid = F.linear(x, p.up) * F.relu(F.linear(x, p.gate))
    return F.linear((mid.view(-1, E, S) * scores_of(p, x)[..., None]).flatten(1), p.down)


@match("gated_scores_on_up", gated=True)
def _(p, x):
    scaled = torch.matmul(x, p.up.mT) * over_experts(scores_of(p, x))
    return down_of(p, F.silu(torch.matmul(x, p.gate.mT)) * scaled)


@match("gated_silu_by_sigmoid", gated=True, dtype=torch.bfloat16)
def _(p, x):
    gate = torch.matmul(x, p.gate.mT)
    mid = gate * torch.sigmoid(gate) * torch.matmul(x, p.up.mT)
    return down_of(p, mid * over_experts(scores_of(p, x)))


# --- Routers --------------------------------------------------------------------------------------


def rms(scores: Tensor, eps: float = 1e-6) -> Tensor:
    return scores * torch.rsqrt(scores.pow(2).mean(-1, keepdim=True) + eps)


def top_k(p: Any, logits: Tensor) -> Tensor:
    values, indices = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values)


def softmax_top_k(p: Any, logits: Tensor) -> Tensor:
    values, indices = torch.softmax(logits, -1).topk(2, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, indices, values)


def masked_softmax(p: Any, logits: Tensor) -> Tensor:
    kept = logits >= logits.topk(2, dim=-1).values[:, -1:]
    return torch.softmax(logits.masked_fill(~kept, float("-inf")), dim=-1)


match("norm_sum", norm="sum", norm_scale=2.0, router="relu, sum norm")(
    with_router(lambda p, r: (s := F.relu(r)) / (s.sum(-1, keepdim=True) * 2.0 + 1e-5))
)
match("norm_rms_functional", norm="rms")(
    with_router(lambda p, r: F.rms_norm(F.relu(r), (E,), p.norm, 1e-6))
)
match("norm_rms_functional_bfloat16", norm="rms", dtype=torch.bfloat16)(
    with_router(lambda p, r: F.rms_norm(F.relu(r), (E,), p.norm, 1e-6))
)
match("norm_rms_without_weight", norm="rms")(
    with_router(lambda p, r: F.rms_norm(F.relu(r), (E,), eps=1e-6))
)
match("norm_rms_handwritten", norm="rms", eps=1e-6, router="relu, rms norm")(
    with_router(lambda p, r: rms(F.relu(r)) * p.norm)
)
match("norm_rms_handwritten_float16", norm="rms", dtype=torch.float16)(
    with_router(lambda p, r: p.norm * rms(F.relu(r).float()).to(r.dtype))
)
match("norm_rms_by_square_root", norm="rms", eps=1e-5)(
    with_router(lambda p, r: (s := F.relu(r)) / ((s * s).mean(-1, True) + 1e-5).sqrt() * p.norm)
)
match("norm_l1", norm="none", router="relu, another norm")(
    with_router(lambda p, r: F.normalize(F.relu(r), p=1.0, dim=-1))
)
match("router_bias_before_relu")(with_router(lambda p, r: F.relu(r + p.expert_bias)))
match("router_clamp")(with_router(lambda p, r: r.clamp(min=0)))
match("router_relu6")(with_router(lambda p, r: F.relu6(r)))
match("router_maximum")(with_router(lambda p, r: torch.maximum(r, torch.zeros_like(r))))
match("router_threshold", router="mask")(with_router(lambda p, r: F.threshold(r, 0.1, 0.0)))
match("router_where", router="mask")(with_router(lambda p, r: torch.where(r > 0.1, r, 0.0)))
match("router_masked_fill", router="mask")(with_router(lambda p, r: r.masked_fill(r < 0, 0.0)))
match("router_times_mask")(with_router(lambda p, r: torch.sigmoid(r) * (r > 0)))
match("router_squared")(with_router(lambda p, r: F.relu(r) ** 2))
match("router_scaled")(with_router(lambda p, r: F.relu(r) * p.norm * 3))
match("router_top_k")(with_router(top_k))
match("router_softmax_top_k")(with_router(softmax_top_k))
match("router_masked_softmax")(with_router(masked_softmax))


match("router_relu_and_token_mask")(
    with_router(lambda p, r: F.relu(r).masked_fill(r[:, :1] < 0, 0.0))
)


@match("router_in_float32", dtype=torch.bfloat16)
def _(p, x):
    scores = F.relu(F.linear(x.float(), p.router.float()))
    return layer(p, x, scores.to(x.dtype))


@match("scores_in_float32", dtype=torch.bfloat16)
def _(p, x):
    scores = F.relu(F.linear(x.float(), p.router.float()))
    return down_of(p, (F.silu(up_of(p, x)) * over_experts(scores)).to(x.dtype))


# --- Inputs and outputs ---------------------------------------------------------------------------


@match("input_3d", shape=(2, T, H))
def _(p, x):
    tokens = x.reshape(-1, H)
    return layer(p, tokens, scores_of(p, tokens)).view(x.shape)


@match("input_3d_linear", up="es,h", down="h,es", shape=(2, T, H))
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).unflatten(-1, (E, S)) * scores_of(p, x).unsqueeze(-1)
    return F.linear(mid.flatten(-2), p.down)


@match("input_3d_einsum", shape=(2, T, H))
def _(p, x):
    mid = F.silu(torch.einsum("bth,esh->btes", x, p.up)) * scores_of(p, x)[..., None]
    return torch.einsum("btes,ehs->bth", mid, p.down)


@match("input_3d_bmm", shape=(2, T, H))
def _(p, x):
    mid = F.silu(x.unsqueeze(1) @ p.up.mT) * scores_of(p, x).transpose(1, 2).unsqueeze(-1)
    return (mid @ p.down.mT).sum(1)


@match("input_of_one_token", shape=(1, H))
def _(p, x):
    return layer(p, x, scores_of(p, x))


@match("input_of_one_token_3d", up="es,h", down="h,es", shape=(1, 1, H))
def _(p, x):
    mid = F.silu(F.linear(x, p.up)).view(1, 1, E, S) * scores_of(p, x)[..., None]
    return F.linear(mid.flatten(-2), p.down)


@match("input_as_many_tokens_as_experts", shape=(E, H))
def _(p, x):
    return layer(p, x, scores_of(p, x))


@match("input_as_many_tokens_as_hidden", shape=(H, H))
def _(p, x):
    return layer(p, x, scores_of(p, x))


@match("scores_returned_too")
def _(p, x):
    scores = scores_of(p, x)
    return layer(p, x, scores), scores


@match("output_used_twice")
def _(p, x):
    y = layer(p, x, scores_of(p, x))
    return x + y * 0.5, y.sum()


@match("bias_added_to_output")
def _(p, x):
    return layer(p, x, scores_of(p, x)) + p.out_bias
