"""Which routing scores are provably, exactly zero; and which router norm they went through.

Zeros are born in a ReLU or a mask and survive whatever maps zero to zero: scaling, division,
casts, RMSNorm without a bias, and every move of elements.  They die where something is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from blockffn_compile.layer import SUM_NORM_EPS, RouterNorm
from blockffn_compile.passes.view import TRANSPARENT, Value, plus_scalar, product, strip

#: f(0) == 0 for every element, so the first operand decides.
_KEEPS_ZERO = TRANSPARENT | {
    "neg", "abs", "sqrt", "tanh", "erf", "silu", "gelu", "gelu_tanh", "div", "rms_norm", "slice",
    "gather",
}  # fmt: skip

#: Deeper chains than this are not routers.
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Zeros:
    """Outcome of the analysis.

    Attributes:
        proved: there are exact zeros.
        text: what makes them; or, as a clause about "scores", why nothing does.
    """

    proved: bool
    text: str


def zeros(value: Value, depth: int = _MAX_DEPTH) -> Zeros:
    """Whether ``value`` is exactly zero for the experts that are off."""
    inputs = value.inputs
    if depth == 0:
        return Zeros(False, "scores come from a computation too long to follow")
    if value.op == "relu" or (value.op == "clamp" and value.attrs["min"] == 0):
        return Zeros(True, "relu")
    if value.op == "maximum" and any(v.scalar == 0 for v in inputs):
        return Zeros(True, "relu")
    if value.op == "where" and any(v.scalar == 0 for v in inputs[1:]):
        return Zeros(True, "mask")
    if value.op == "scatter" and any(v.scalar == 0 for v in inputs):
        return Zeros(True, "top-k")
    if value.dtype == "bool" or (value.op == "cast" and inputs[0].dtype == "bool"):
        return Zeros(True, "mask")
    if value.op in ("softmax", "exp"):
        return _exponential(value, depth)
    if value.op == "sigmoid":
        return Zeros(False, "scores come from a sigmoid, which has no exact zeros")
    if value.op in ("layer_norm", "sub") and _subtracts_mean(value):
        if zeros(inputs[0], depth - 1).proved:
            text = "a mean is subtracted after the ReLU, so off experts are not exactly zero"
            return Zeros(False, text)
        return zeros(inputs[0], depth - 1)
    if value.op in ("add", "sub", "where", "cat", "maximum", "minimum"):
        return _all(value, depth)
    if value.op == "mul":
        found = [zeros(v, depth - 1) for v in inputs if v.op != "scalar"]
        return next((z for z in found if z.proved), found[0] if found else Zeros(False, "scalar"))
    if (
        value.op in _KEEPS_ZERO
        or (value.op == "pow" and value.attrs["exponent"] > 0)
        or (value.op == "clamp" and (value.attrs["min"] or 0) <= 0 <= (value.attrs["max"] or 0))
    ):
        return zeros(inputs[0], depth - 1)
    if value.op == "matmul":
        return Zeros(False, "scores are raw router logits: no ReLU or mask makes any exactly zero")
    if value.op in ("input", "constant"):
        return Zeros(False, "scores enter the graph as data, where nothing proves exact zeros")
    return Zeros(False, f"scores come from {value.name}, which is not known to keep exact zeros")


def _all(value: Value, depth: int) -> Zeros:
    """Operations that are zero only where all their operands are."""
    operands = value.inputs[1:] if value.op == "where" else value.inputs
    found = [zeros(v, depth - 1) for v in operands]
    refused = [z for z in found if not z.proved]
    if not refused:
        return found[0]
    if value.op in ("add", "sub") and len(refused) < len(found):
        return Zeros(False, "a bias is added after the ReLU, so off experts are not exactly zero")
    return refused[0]


def _exponential(value: Value, depth: int) -> Zeros:
    """exp and softmax have exact zeros only where a mask put minus infinity."""
    source = value.inputs[0]
    softmax = value.op == "softmax"
    while source.op in TRANSPARENT or source.op == "sub":
        softmax |= source.op == "sub" and strip(source.inputs[1]).op == "amax"
        source = source.inputs[0]
    if source.op == "where" and any(v.scalar == -float("inf") for v in source.inputs[1:]):
        return Zeros(True, "masked softmax")
    name = "softmax" if softmax else "an exponential"
    return Zeros(False, f"scores come from {name}, which has no exact zeros")


def _subtracts_mean(value: Value) -> bool:
    if value.op == "layer_norm":
        return True
    x, mean = (strip(v) for v in value.inputs)
    return mean.op == "mean" and strip(mean.inputs[0]) is x


@dataclass(frozen=True)
class Router:
    """The published normalisation that scores went through, as far as it can be told."""

    norm: RouterNorm = "none"
    norm_scale: float = 1.0
    eps: float = 1e-6


def router(scores: Value) -> Router | None:
    """Identifies the norm of ``scores``; None when it is none of the published ones."""
    scores = strip(scores)
    if zeros(scores, 1).proved:
        return Router()
    if scores.op == "rms_norm":
        return Router("rms", eps=scores.attrs["eps"])
    if scores.op == "div":
        return _sum_norm(*scores.inputs) or _rms_norm(scores)
    return _rms_norm(scores)


def _over_last(reduction: Value) -> bool:
    return reduction.attrs["axes"] == (len(reduction.inputs[0].shape) - 1,)


def _sum_norm(numerator: Value, divisor: Value) -> Router | None:
    """x / (sum(x) * norm_scale + eps)."""
    shifted = plus_scalar(divisor)
    if shifted is None or shifted[1] != SUM_NORM_EPS:
        return None
    factors, scale = product(shifted[0])
    if len(factors) != 1 or factors[0].op != "sum" or not _over_last(factors[0]) or scale <= 0:
        return None
    if strip(factors[0].inputs[0]) is not strip(numerator):
        return None
    return Router("sum", norm_scale=scale)


def _rms_norm(value: Value) -> Router | None:
    """x * rsqrt(mean(x * x) + eps) * weight, or x / sqrt(mean(x * x) + eps) * weight."""
    if value.op == "div":
        root = strip(value.inputs[1])
        factors = [*product(value.inputs[0])[0], root]
        wanted = "sqrt"
    else:
        factors, _ = product(value)
        wanted = "rsqrt"
        inverse = [v for v in factors if v.op == "div"]
        if inverse:  # the weight was multiplied after x / sqrt(...)
            return _rms_norm(inverse[0])
    for root in (v for v in factors if v.op == wanted):
        shifted = plus_scalar(root.inputs[0])
        if shifted is None or shifted[0].op != "mean" or shifted[1] <= 0:
            continue
        if not _over_last(shifted[0]):
            continue
        squares = strip(shifted[0].inputs[0])
        power = squares.op == "pow" and squares.attrs["exponent"] == 2
        if power or (squares.op == "mul" and squares.inputs[0] is squares.inputs[1]):
            squared = strip(squares.inputs[0])
            if any(v is squared for v in factors):
                return Router("rms", eps=shifted[1])
    return None
