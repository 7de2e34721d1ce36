"""Values written as sums of products that start at the activation of a contraction.

Nothing here knows what a BlockFFN layer is: this is the algebra of ``einsum``, in which a matmul
is a product and a sum, and neither their order nor their spelling matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isclose, sqrt

from blockffn_compile.passes.view import (
    TRANSPARENT,
    UNARY,
    Axis,
    Dims,
    Factor,
    Value,
    align,
    ancestors,
    broadcast,
    flat,
    forward,
    fresh,
    leaves,
    plus_scalar,
    product,
    strip,
    trace,
)

_CASTS = frozenset({"cast"})

#: Relative rounding error of a number that a graph stores with the element type of its tensors.
_ROUNDING = {"float16": 2**-10, "bfloat16": 2**-7}


# --- Activations ----------------------------------------------------------------------------------


def _is_one_plus_exp(value: Value, u: Value) -> bool:
    """1 + exp(-u)."""
    shifted = plus_scalar(value)
    if shifted is None or shifted[1] != 1 or shifted[0].op != "exp":
        return False
    negated = strip(shifted[0].inputs[0], _CASTS)
    return negated.op == "neg" and strip(negated.inputs[0], _CASTS) is u


def _is_sigmoid(value: Value, u: Value) -> bool:
    """sigmoid(u) or 1 / (1 + exp(-u))."""
    if value.op == "sigmoid":
        return strip(value.inputs[0], _CASTS) is u
    inverse = value.op == "reciprocal" or (value.op == "div" and value.inputs[0].scalar == 1)
    return inverse and _is_one_plus_exp(value.inputs[-1], u)


def _is_function_of(value: Value, u: Value, depth: int = 10) -> bool:
    """Whether ``value`` is computed from ``u`` and numbers, by the operations of tanh GELU."""
    value = strip(value, _CASTS)
    if value is u or value.scalar is not None:
        return True
    return (
        depth > 0
        and value.op in ("mul", "add", "pow", "tanh")
        and all(_is_function_of(v, u, depth - 1) for v in value.inputs)
    )


def activation(value: Value) -> tuple[str, Value] | None:
    """(name, argument) if ``value`` is an activation, as one operation or spelled out.

    Inductor's decompositions spell SiLU as ``u / (1 + exp(-u))`` and GELU with ``erf``, both in
    fp32 between two casts.
    """
    if value.op == "maximum" and value.inputs[1].scalar == 0:
        return "relu", value.inputs[0]
    if value.op == "clamp" and value.attrs == {"min": 0, "max": None}:
        return "relu", value.inputs[0]
    if value.op in UNARY:
        return value.op, value.inputs[0]
    if value.op == "div":
        u = strip(value.inputs[0], _CASTS)
        return ("silu", u) if _is_one_plus_exp(value.inputs[1], u) else None
    if value.op != "mul":
        return None
    factors, scale = product(value, _CASTS)
    if len(factors) != 2:
        return None
    for u, other in (factors, factors[::-1]):
        if scale == 1 and _is_sigmoid(other, u):
            return "silu", u
        shifted = plus_scalar(other)
        if scale == 0.5 and shifted is not None and shifted[1] == 1:
            if shifted[0].op == "tanh" and _is_function_of(shifted[0], u):
                return "gelu_tanh", u
            argument, factor = product(shifted[0].inputs[0], _CASTS)
            rounding = _ROUNDING.get(u.dtype, 2**-22)
            if (
                shifted[0].op == "erf"
                and argument == [u]
                and isclose(factor, sqrt(0.5), rel_tol=rounding)
            ):
                return "gelu", u
    return None


# --- Contractions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contraction:
    """Two factors, multiplied and summed over the axes ``summed``."""

    value: Value
    factors: tuple[Factor, Factor]
    summed: tuple[Axis, ...]

    @property
    def inner(self) -> frozenset[Axis]:
        return frozenset(leaves(self.summed))


def _matmul_operands(value: Value, dims: Dims, summed: tuple[Axis, ...]) -> tuple[Dims, Dims]:
    """Axes of the operands of a matmul whose result has ``dims``."""
    a, b = value.inputs
    *batch, rows, columns = dims
    left, right = (align(tuple(batch), v.shape[:-2]) for v in (a, b))
    return (*left, rows, summed), (*right, summed, columns)


def _sum_operand(value: Value, dims: Dims) -> tuple[Dims, Dims]:
    """Axes of the operand of a sum whose result has ``dims``, and the dimensions it summed."""
    shape, axes = value.inputs[0].shape, value.attrs["axes"]
    keepdim = len(value.shape) == len(shape)
    summed = iter(new := fresh(shape[i] for i in axes))
    kept = iter([dim for i, dim in enumerate(dims) if not (keepdim and i in axes)])
    return tuple(next(summed if i in axes else kept) for i in range(len(shape))), new


def contraction(value: Value, dims: Dims) -> Contraction | None:
    """``value`` as a contraction: a matmul, or a product of two tensors and its sum."""
    if value.op == "matmul":
        (new,) = fresh(value.inputs[0].shape[-1:])
        operands = zip(value.inputs, _matmul_operands(value, dims, new), strict=True)
        left, right = (trace(v, d) for v, d in operands)
        return Contraction(value, (left, right), new)
    if value.op == "sum":
        inner, summed = _sum_operand(value, dims)
        terms = trace(value.inputs[0], inner, _CASTS).root
        if terms.op == "mul":
            left, right = (trace(v, align(inner, v.shape)) for v in terms.inputs)
            return Contraction(value, (left, right), flat(summed))
    return None


def _linear(value: Value, dims: Dims) -> Contraction | None:
    factor = trace(value, dims)
    return contraction(factor.root, factor.dims)


# --- Following a product --------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A value, written as a sum of products that starts at an activation.

    Attributes:
        value: where we are.
        dims: its axes.
        act: name of the activation.
        up: the contraction inside the activation.
        factors: what was multiplied since.
        summed: axes that were summed away since.
        scale: the numeric factor.
        problems: what is more than a sum of products, in words.  The way goes on so that a layer
            which would match without them can be told so.
    """

    value: Value
    dims: Dims
    act: str
    up: Contraction
    factors: tuple[Factor, ...] = ()
    summed: tuple[Axis, ...] = ()
    scale: float = 1.0
    problems: tuple[str, ...] = ()

    def weight(self) -> int | None:
        """Index in ``up`` of the factor whose own axes have all been summed away, while those of
        the other factor are all still there; None if there is none."""
        gone, here = frozenset(leaves(self.summed)), frozenset(flat(self.dims))
        for index in (1, 0):
            own, other = (self.up.factors[i].axes - self.up.inner for i in (index, 1 - index))
            if own and own <= gone and other <= here:
                return index
        return None

    def moved(self, value: Value, dims: Dims, **changes: object) -> Product:
        return dataclasses.replace(self, value=value, dims=dims, **changes)  # type: ignore[arg-type]


def starts(values: Sequence[Value]) -> Iterator[Product]:
    """The activations of contractions.  One that is spelled out counts once, as a whole."""
    found = {value: known for value in values if (known := activation(value)) is not None}
    inside = {
        part
        for value, (_, u) in found.items()
        if value.op in ("mul", "div")
        for part in ancestors(value, frozenset({u}))
        if part is not value
    }
    for value, (act, u) in found.items():
        if value in inside or u.shape != value.shape:
            continue
        dims = fresh(value.shape)
        root, root_dims = trace(u, dims).path[-1]
        up = contraction(root, root_dims)
        if up is not None:
            yield Product(value, dims, act, up)
        elif root.op in ("mul", "add"):
            for inner, other in (root.inputs, root.inputs[::-1]):
                up = _linear(inner, align(root_dims, inner.shape))
                if up is None:
                    continue
                factors: list[Factor] = []
                if root.op == "add":
                    problem = "the up projection has a bias"
                elif other.scalar is not None:
                    problem = "the argument of the activation is scaled"
                else:
                    problem = "scores are multiplied before the activation, not after it"
                    factors = _factors(other, align(root_dims, other.shape))
                yield Product(value, dims, act, up, tuple(factors), problems=(problem,))


def _factors(value: Value, dims: Dims, depth: int = 4) -> list[Factor]:
    """``value`` as one factor, or as several if there is a contraction among them."""
    factor = trace(value, dims)
    if factor.root.op == "mul" and depth > 0:
        parts = [
            part
            for operand in factor.root.inputs
            for part in _factors(operand, align(factor.dims, operand.shape), depth - 1)
        ]
        if any(contraction(part.root, part.dims) for part in parts):
            return parts
    return [factor]


def step(at: Product, user: Value) -> Product | None:
    """``at`` one operation further, or None if ``user`` leads out of the sum of products."""
    if user.op in TRANSPARENT:
        dims = forward(user, at.dims)
        return None if dims is None else at.moved(user, dims)
    if user.op in ("mul", "matmul", "div") and user.inputs[0] is user.inputs[1]:
        return None
    if user.op == "mul":
        other = user.inputs[1] if user.inputs[0] is at.value else user.inputs[0]
        dims = broadcast(at.dims, at.value.shape, user.shape)
        if other.scalar is not None:
            return at.moved(user, dims, scale=at.scale * other.scalar)
        return at.moved(
            user, dims, factors=(*at.factors, *_factors(other, align(dims, other.shape)))
        )
    if user.op == "div" and user.inputs[1].scalar:
        return at.moved(user, at.dims, scale=at.scale / user.inputs[1].scalar)
    if user.op == "matmul":
        index = user.inputs.index(at.value)
        batch = broadcast(at.dims[:-2], at.value.shape[:-2], user.shape[:-2])
        rows, columns = fresh(user.shape[-2:])
        if index == 0:
            dims, summed = (*batch, at.dims[-2], columns), at.dims[-1]
        else:
            dims, summed = (*batch, rows, at.dims[-1]), at.dims[-2]
        other, operand = user.inputs[1 - index], _matmul_operands(user, dims, summed)[1 - index]
        factors = (*at.factors, *_factors(other, operand))
        return at.moved(user, dims, factors=factors, summed=(*at.summed, *summed))
    if user.op == "sum":
        axes, keepdim = user.attrs["axes"], len(user.shape) == len(at.dims)
        dims = tuple(
            () if i in axes else dim for i, dim in enumerate(at.dims) if keepdim or i not in axes
        )
        summed = flat(tuple(at.dims[i] for i in axes))
        return at.moved(user, dims, summed=(*at.summed, *summed))
    if len(at.problems) < 2 and (user.op in UNARY or user.op in ("add", "sub")):
        if user.op in UNARY:
            after = "the activation" if not at.factors else "the scores"
            problem = f"{user.name or user.op} is applied after {after}"
        else:
            problem = "something is added between the activation and the down projection"
        dims = broadcast(at.dims, at.value.shape, user.shape)
        return at.moved(user, dims, problems=(*at.problems, problem))
    return None
