"""The BlockFFN layer in plain PyTorch: the definition that every other form must equal.

Shapes: T tokens, H hidden, E experts, S expert size.  The formulas are those of BlockFFN
(arXiv 2507.08771, section 3.1) as its released checkpoints use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layout = Literal["block", "block_linear"]
RouterNorm = Literal["none", "sum", "rms"]
Activation = Literal["silu", "relu", "gelu"]

#: Most tokens of a chunk: kernels take as many in one call.
CHUNK_TOKENS = 64

#: Added to the divisor of the ``sum`` router norm, as in the released models.
SUM_NORM_EPS = 1e-5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class BlockFFNSpec:
    """What one BlockFFN layer computes, without its weights.

    Attributes:
        hidden_size: H, width of the input and output of the layer.
        num_experts: E.
        expert_size: S, intermediate width of one expert.
        layout: ``block`` keeps up [E, S, H] and down [E, H, S]; ``block_linear`` keeps
            up [E*S, H] and down [H, E*S].
        norm: normalisation of the ReLU scores. ``none``; ``sum`` divides by
            ``sum * norm_scale + 1e-5``; ``rms`` is RMSNorm with a weight [E].
        act: activation inside the experts; ``gelu`` is the exact (erf) form.
        gated: ``act(x @ gate.T) * (x @ up.T)`` instead of ``act(x @ up.T)``.
        norm_scale: factor of the ``sum`` norm, positive.
        eps: epsilon of the ``rms`` norm, positive.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    hidden_size: int
    num_experts: int
    expert_size: int
    layout: Layout = "block"
    norm: RouterNorm = "rms"
    act: Activation = "silu"
    gated: bool = False
    norm_scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_experts", "expert_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockFFNSpec.{name} must be a positive integer, got {value!r}")
        for name, kind in (("layout", Layout), ("norm", RouterNorm), ("act", Activation)):
            value = getattr(self, name)
            if value not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"BlockFFNSpec.{name} must be one of {allowed}, got {value!r}")
        for name in ("norm_scale", "eps"):
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise ValueError(f"BlockFFNSpec.{name} must be positive, got {value!r}")

    def replace(self, **changes: object) -> BlockFFNSpec:
        """A copy with ``changes`` applied, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


#: Names of ways to quantise weights, by their integers.
Scheme = Literal["int8", "int4"]


class Quantisation(NamedTuple):
    """How weights are stored that are integers times a scale.

    Attributes:
        bits: 8 is int8, -127..127; 4 is two in a uint8, -8..7, the first in the lower bits.
        group: weights, neighbours along the summed axis, that share a scale; a multiple of 32.
    """

    bits: Literal[4, 8]
    group: int

    @property
    def per_byte(self) -> int:
        """Weights in one integer as it is stored."""
        return 8 // self.bits

    @property
    def dtype(self) -> str:
        """Name of the integers' type as they are stored."""
        return "int8" if self.bits == 8 else "uint8"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: variance in fp32, cast back to ``x.dtype``, then the weight."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """Module form of :func:`rms_norm`, weight [dim]."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def experts_reference(
    x: Tensor,
    scores: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: Activation,
    w_gate: Tensor | None = None,
) -> Tensor:
    """All experts for all tokens: ``y = sum_e (scores_e * mid_e) @ w_down_e.T``.

    Args:
        x: [T, H].
        scores: [T, E].
        w_up: [E, S, H].
        w_down: [E, H, S].
        act: activation of the experts.
        w_gate: [E, S, H] or None.

    Returns:
        [T, H] in ``x.dtype``.
    """
    up = torch.matmul(x, w_up.transpose(1, 2))
    if w_gate is None:
        mid = ACTIVATIONS[act](up)
    else:
        mid = ACTIVATIONS[act](torch.matmul(x, w_gate.transpose(1, 2))) * up
    return torch.einsum("esd,emd->sm", mid * scores.T.unsqueeze(-1), w_down)


class BlockFFN(nn.Module):
    """Router and experts of one layer.

    Parameters are named as in released checkpoints: ``router_proj.weight`` [E, H],
    ``router_norm.weight`` [E] (``rms`` only), ``up_proj``, ``down_proj`` and, when gated,
    ``gate_proj`` (laid out like ``up_proj``).
    """

    def __init__(self, spec: BlockFFNSpec) -> None:
        super().__init__()
        self.spec = spec
        h, e, s = spec.hidden_size, spec.num_experts, spec.expert_size
        up, down = ((e, s, h), (e, h, s)) if spec.layout == "block" else ((e * s, h), (h, e * s))
        self.router_proj = nn.Linear(h, e, bias=False)
        self.router_norm = RMSNorm(e, spec.eps) if spec.norm == "rms" else None
        self.up_proj = nn.Parameter(torch.empty(up))
        self.down_proj = nn.Parameter(torch.empty(down))
        self.gate_proj = nn.Parameter(torch.empty(up)) if spec.gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform initialisation with the bound of ``nn.Linear`` (1 / sqrt(fan in))."""
        h, s = self.spec.hidden_size, self.spec.expert_size
        with torch.no_grad():
            for weight, fan_in in ((self.up_proj, h), (self.gate_proj, h), (self.down_proj, s)):
                if weight is not None:
                    weight.uniform_(-(fan_in**-0.5), fan_in**-0.5)

    def scores(self, logits: Tensor) -> Tensor:
        """Routing scores [..., E] from router logits [..., E]; most of them are exactly zero."""
        scores = F.relu(logits)
        if self.spec.norm == "sum":
            total = scores.sum(-1, keepdim=True)
            scores = scores / (total * self.spec.norm_scale + SUM_NORM_EPS)
        elif self.router_norm is not None:
            scores = self.router_norm(scores)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        spec = self.spec
        tokens = x.reshape(-1, spec.hidden_size)
        scores = self.scores(self.router_proj(tokens))
        act = ACTIVATIONS[spec.act]
        if spec.layout == "block":
            y = experts_reference(
                tokens, scores, self.up_proj, self.down_proj, spec.act, self.gate_proj
            )
        else:
            up = F.linear(tokens, self.up_proj)
            gate = self.gate_proj
            mid = act(up) if gate is None else act(F.linear(tokens, gate)) * up
            mid = mid.view(-1, spec.num_experts, spec.expert_size) * scores.unsqueeze(-1)
            y = F.linear(mid.flatten(1), self.down_proj)
        return y.view(x.shape)
