"""Which routing scores are provably, exactly zero; and which router norm they went through.

Zeros are born in a ReLU or a mask and survive whatever maps zero to zero: scaling, division,
casts, RMSNorm without a bias, and every move of elements.  They die where something is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from blockffn_compile.layer import SUM_NORM_EPS, RouterNorm
from blockffn_compile.passes.view import (
    TRANSPARENT,
    Axis,
    Dims,
    Value,
    align,
    backward,
    plus_scalar,
    product,
    strip,
    trace,
)

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


def zeros(
    value: Value,
    dims: Dims | None = None,
    over: frozenset[Axis] = frozenset(),
    depth: int = _MAX_DEPTH,
) -> Zeros:
    """Whether ``value`` has exact zeros, and not only along axes other than ``over``.

    Args:
        dims: axes of ``value``, if they are known.
        over: the axes of the experts.  A token that is masked as a whole has zeros, too, but they
            switch off no expert.
        depth: operations to look back at most.
    """
    return _Analysis(over).zeros(value, dims, depth)


class _Analysis:
    """One run; remembers what it found, because operands are shared."""

    def __init__(self, over: frozenset[Axis]) -> None:
        self.over = over
        self.known: dict[Value, Zeros] = {}

    def zeros(self, value: Value, dims: Dims | None, depth: int) -> Zeros:
        if value not in self.known:
            found = self.find(value, dims, depth - 1)
            if found.proved and not self.varies(value, dims):
                found = Zeros(False, "zeros among the scores are those of tokens, not of experts")
            self.known[value] = found
        return self.known[value]

    def varies(self, value: Value, dims: Dims | None) -> bool:
        """Whether ``value`` depends on ``over``, as far as one can tell."""
        return dims is None or not self.over or bool(trace(value, dims).axes & self.over)

    def find(self, value: Value, dims: Dims | None, depth: int) -> Zeros:
        op, inputs, attrs = value.op, value.inputs, value.attrs
        if op == "relu" or (op == "clamp" and attrs["min"] == 0):
            return Zeros(True, "relu")
        if op == "maximum" and any(v.scalar == 0 for v in inputs):
            return Zeros(True, "relu")
        if op == "where" and self.masks(value, dims, 0.0):
            return Zeros(True, "mask")
        if op == "scatter" and any(v.scalar == 0 for v in inputs):
            return Zeros(True, "top-k")
        if value.dtype == "bool" or (op == "cast" and inputs[0].dtype == "bool"):
            return Zeros(True, "mask")
        if op in ("softmax", "exp"):
            return self.exponential(value, dims)
        if op == "sigmoid":
            return Zeros(False, "scores come from a sigmoid, which has no exact zeros")
        if op == "matmul":
            text = "scores are raw router logits: no ReLU or mask makes any exactly zero"
            return Zeros(False, text)
        if op in ("input", "constant"):
            text = "scores enter the graph as data, where nothing proves exact zeros"
            return Zeros(False, text)
        if depth < 0:
            return Zeros(False, "scores come from a computation too long to follow")
        if op in ("layer_norm", "sub") and _subtracts_mean(value):
            before = self.operand(value, 0, dims, depth)
            text = "a mean is subtracted after the ReLU, so off experts are not exactly zero"
            return Zeros(False, text) if before.proved else before
        if op in ("add", "sub", "where", "cat", "maximum", "minimum"):
            return self.everywhere(value, dims, depth)
        if op == "mul":
            order = sorted(range(len(inputs)), key=lambda i: inputs[i].op == "scalar")
            found = [self.operand(value, i, dims, depth) for i in order]
            return next((z for z in found if z.proved), found[0])
        if (
            op in _KEEPS_ZERO
            or (op == "pow" and attrs["exponent"] > 0)
            or (op == "clamp" and (attrs["min"] or 0) <= 0 <= (attrs["max"] or 0))
        ):
            return self.operand(value, 0, dims, depth)
        name = value.name or value.op
        return Zeros(False, f"scores come from {name}, which is not known to keep exact zeros")

    def operand(self, value: Value, index: int, dims: Dims | None, depth: int) -> Zeros:
        operand = value.inputs[index]
        return self.zeros(operand, _operand_dims(value, operand, dims), depth)

    def everywhere(self, value: Value, dims: Dims | None, depth: int) -> Zeros:
        """Operations that are zero only where all their operands are."""
        first = 1 if value.op == "where" else 0
        operands = [i for i, v in enumerate(value.inputs) if i >= first and v.scalar != 0]
        found = [self.operand(value, i, dims, depth) for i in operands]
        refused = [z for z in found if not z.proved]
        if not refused:
            return next(iter(found), Zeros(False, "scores are constant"))
        if value.op in ("add", "sub") and len(refused) < len(found):
            text = "a bias is added after the ReLU, so off experts are not exactly zero"
            return Zeros(False, text)
        return refused[0]

    def masks(self, value: Value, dims: Dims | None, number: float) -> bool:
        """Whether ``where`` puts ``number`` in the place of single experts."""
        condition, *choices = value.inputs
        return any(v.scalar == number for v in choices) and self.varies(
            condition, _operand_dims(value, condition, dims)
        )

    def exponential(self, value: Value, dims: Dims | None) -> Zeros:
        """exp and softmax have exact zeros only where a mask put minus infinity."""
        softmax = value.op == "softmax"
        source, dims = value.inputs[0], _operand_dims(value, value.inputs[0], dims)
        while source.op in TRANSPARENT or source.op == "sub":
            softmax |= source.op == "sub" and strip(source.inputs[1]).op == "amax"
            source, dims = source.inputs[0], _operand_dims(source, source.inputs[0], dims)
        if source.op == "where" and self.masks(source, dims, -inf):
            return Zeros(True, "masked softmax")
        name = "softmax" if softmax else "an exponential"
        return Zeros(False, f"scores come from {name}, which has no exact zeros")


def _operand_dims(value: Value, operand: Value, dims: Dims | None) -> Dims | None:
    """Axes of an operand of ``value``; None where they cannot be told."""
    if dims is None or value.op in ("slice", "gather", "cat"):
        return None
    if value.op in TRANSPARENT:
        return backward(value, dims)
    return align(dims, operand.shape)


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
    if zeros(scores, depth=0).proved:  # they are the ReLU's or the mask's own result
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
