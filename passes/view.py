"""The graph-neutral view that the recogniser reads, and axes that keep their identity through it.

An adapter turns every node of its graph into a :class:`Value`.  Operations are named by a small
vocabulary; what it lacks is ``other``:

============= ====================================================================================
leaves        ``input``, ``constant`` (tensors), ``scalar`` (``attrs["value"]``, any shape)
axes only     ``reshape``, ``permute`` (``attrs["perm"]``), ``expand``
contraction   ``matmul`` (NumPy semantics, operands of rank 2 or more), ``sum`` (``attrs["axes"]``)
two operands  ``mul``, ``div``, ``add``, ``sub``, ``maximum``, ``minimum``
one operand   ``cast`` (to a floating-point type), ``relu``, ``silu``, ``gelu``, ``gelu_tanh``,
              ``sigmoid``, ``tanh``, ``exp``, ``erf``, ``neg``, ``abs``, ``sqrt``, ``rsqrt``,
              ``reciprocal``, ``pow`` (``attrs["exponent"]``), ``clamp`` (``attrs["min"]``,
              ``attrs["max"]``)
rows          ``mean``, ``amax`` (``attrs["axes"]``), ``softmax``, ``layer_norm``, ``rms_norm``
              (``attrs["eps"]``; operands: x and, optionally, the weight)
selection     ``where`` (operands: condition, a, b), ``scatter`` (operands: base, source),
              ``slice`` (a contiguous part), ``gather`` (chosen positions), ``cat``
graph         ``output`` (operands: whatever leaves the graph), ``other``
============= ====================================================================================

Sizes are integers or, where they are symbolic, any hashable token that is equal for equal sizes.

An :class:`Axis` is one logical axis of a computation.  A dimension of a value carries a row-major
sequence of axes: one in the plain case, several after a flatten, none when its size is one (such
a dimension says nothing).  Reshapes refine axes: where a dimension of E*S is viewed as [E, S], the
axis that it carried becomes two, everywhere at once.  So two values agree on an axis when they
hold the same object, however differently both were spelled.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Size = Hashable

#: Operations that move elements but do not compute.
AXES_ONLY = frozenset({"reshape", "permute", "expand"})
#: The same, and changes of the floating-point type.
TRANSPARENT = AXES_ONLY | {"cast"}
#: Elementwise operations of one operand.
UNARY = frozenset(
    {
        "relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "exp", "erf", "neg", "abs",
        "sqrt", "rsqrt", "reciprocal", "pow", "clamp",
    }
)  # fmt: skip
FLOATS = frozenset({"float32", "bfloat16", "float16", "float64"})


@dataclass(eq=False, repr=False)
class Value:
    """One tensor of the graph and the operation that makes it.

    Attributes:
        op: name from the vocabulary of this module.
        inputs: tensor operands, in the order that the vocabulary gives.
        shape: sizes, integers or tokens.
        dtype: ``"float32"``, ``"bfloat16"``, ``"bool"``, ...
        attrs: the non-tensor operands that the vocabulary names.
        source: the adapter's own handle; None for a value that exists only in the view.
        name: what a person would call it: the parameter's name, or the graph's own operation.
        scope: paths of the enclosing modules, outermost first.
        users: values that read this one, filled in by their construction.
    """

    op: str
    inputs: tuple[Value, ...]
    shape: tuple[Size, ...]
    dtype: str
    attrs: dict[str, Any] = field(default_factory=dict)
    source: Any = None
    name: str = ""
    scope: tuple[str, ...] = ()
    users: list[Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        for value in dict.fromkeys(self.inputs):
            value.users.append(self)

    def __repr__(self) -> str:
        """Without operands: a graph printed through them is exponentially long."""
        return f"<{self.op} {self.name} {self.dtype} {list(self.shape)}>"

    @property
    def scalar(self) -> float | None:
        """The number that this value holds everywhere, if it is one."""
        return self.attrs["value"] if self.op == "scalar" else None


class Axis:
    """One logical axis; ``parts`` are the axes that it was found to consist of, row-major."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] = ()

    def split(self, sizes: Iterable[Size]) -> tuple[Axis, ...]:
        self.parts = tuple(Axis(size) for size in sizes)
        return self.parts


#: Axes of every dimension of a value.
Dims = tuple[tuple[Axis, ...], ...]


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """``axes`` with every refined axis replaced by its parts."""
    out: list[Axis] = []
    for axis in axes:
        out.extend(leaves(axis.parts) if axis.parts else (axis,))
    return tuple(out)


def flat(dims: Dims) -> tuple[Axis, ...]:
    """All leaves of ``dims``, row-major."""
    return leaves(axis for dim in dims for axis in dim)


def fresh(shape: Iterable[Size]) -> Dims:
    """New axes for every dimension of ``shape``."""
    return tuple(() if size == 1 else (Axis(size),) for size in shape)


def regroup(dims: Dims, shape: Sequence[Size]) -> Dims | None:
    """Axes of the dimensions after a reshape to ``shape``; None when they cannot be told.

    Axes are split where a boundary of ``shape`` falls inside them.
    """
    stack = list(flat(dims))
    todo = [i for i, size in enumerate(shape) if size != 1]
    groups: list[tuple[Axis, ...]] = [() for _ in shape]
    # Equal sizes from the left first: what then remains needs no arithmetic with symbolic sizes
    # in the usual case, one run of dimensions flattened or unflattened.
    while stack and todo and stack[0].size == shape[todo[0]]:
        groups[todo.pop(0)] = (stack.pop(0),)
    while todo:
        index = todo.pop()
        if not todo:  # the products of both sides are equal, so the last one takes what is left
            groups[index], stack = tuple(stack), []
            break
        need: Size = shape[index]
        group: list[Axis] = []
        while need != 1:
            if not stack:
                return None
            axis = stack.pop()
            if axis.size == need:
                group.insert(0, axis)
                need = 1
            elif not stack:  # one axis is left for all dimensions that remain
                *outer, inner = axis.split([*(shape[i] for i in todo), need])
                for i, part in zip(todo, outer, strict=True):
                    groups[i] = (part,)
                group.insert(0, inner)
                todo, need = [], 1
            elif not (isinstance(axis.size, int) and isinstance(need, int)):
                return None
            elif need % axis.size == 0:
                group.insert(0, axis)
                need //= axis.size
            elif axis.size % need == 0:
                outer_part, inner = axis.split([axis.size // need, need])
                stack.append(outer_part)
                group.insert(0, inner)
                need = 1
            else:
                return None
        groups[index] = tuple(group)
    return None if stack else tuple(groups)


def align(dims: Dims, shape: Sequence[Size]) -> Dims:
    """Axes of an operand of ``shape`` that was broadcast to a result with ``dims``."""
    offset = len(dims) - len(shape)
    return tuple(() if size == 1 else dims[offset + i] for i, size in enumerate(shape))


def broadcast(dims: Dims, shape: Sequence[Size], result: Sequence[Size]) -> Dims:
    """Axes of the result when an operand of ``shape`` with ``dims`` is broadcast to ``result``."""
    offset = len(result) - len(shape)
    new = fresh(result)
    return tuple(
        dims[i - offset] if i >= offset and shape[i - offset] != 1 else new[i]
        for i in range(len(result))
    )


def forward(value: Value, dims: Dims) -> Dims | None:
    """Axes of a ``TRANSPARENT`` value from those of its operand."""
    (operand, *_) = value.inputs
    if value.op == "reshape":
        return regroup(dims, value.shape)
    if value.op == "permute":
        return tuple(dims[i] for i in value.attrs["perm"])
    if value.op == "expand":
        return broadcast(dims, operand.shape, value.shape)
    return dims


def backward(value: Value, dims: Dims) -> Dims | None:
    """Axes of the operand of a ``TRANSPARENT`` value from those of the value."""
    (operand, *_) = value.inputs
    if value.op == "reshape":
        return regroup(dims, operand.shape)
    if value.op == "permute":
        order = value.attrs["perm"]
        return tuple(dims[order.index(i)] for i in range(len(order)))
    if value.op == "expand":
        return align(dims, operand.shape)
    return dims


@dataclass(frozen=True)
class Factor:
    """A value of known axes and the way back from it to where it was computed.

    Attributes:
        path: values from the nearest to the root, each with its axes.  They hold the same
            elements, repeated along axes that are not the root's.
    """

    path: tuple[tuple[Value, Dims], ...]

    @property
    def root(self) -> Value:
        return self.path[-1][0]

    @property
    def dims(self) -> Dims:
        return self.path[-1][1]

    @property
    def axes(self) -> frozenset[Axis]:
        """The axes on which the elements depend."""
        return frozenset(flat(self.dims))


def strip(value: Value, through: frozenset[str] = TRANSPARENT) -> Value:
    """Where ``value`` was computed, before the operations ``through``."""
    while value.op in through:
        value = value.inputs[0]
    return value


def product(
    value: Value, through: frozenset[str] = TRANSPARENT, limit: int = 8
) -> tuple[list[Value], float]:
    """Tensor factors, about ``limit`` at most, and the numeric factor of a chain of products."""
    factors: list[Value] = []
    scale, todo = 1.0, [value]
    while todo and len(factors) + len(todo) < limit:
        value = strip(todo.pop(), through)
        if value.scalar is not None:
            scale *= value.scalar
        elif value.op == "mul":
            todo.extend(value.inputs)
        elif value.op == "div" and value.inputs[1].scalar:
            scale /= value.inputs[1].scalar
            todo.append(value.inputs[0])
        else:
            factors.append(value)
    return factors + todo, scale


def plus_scalar(value: Value) -> tuple[Value, float] | None:
    """(a, c) when ``value`` is a + c for a number c."""
    value = strip(value)
    if value.op == "add":
        for a, b in (value.inputs, value.inputs[::-1]):
            if b.scalar is not None:
                return strip(a), b.scalar
    return None


def ancestors(value: Value, stop: frozenset[Value]) -> list[Value]:
    """``value`` and all that it is computed from, down to but without ``stop``; operands first."""
    order: dict[Value, None] = {}
    stack = [(value, False)]
    while stack:
        current, done = stack.pop()
        if done:
            order[current] = None
        elif current not in order and current not in stop:
            stack.append((current, True))
            stack.extend((v, False) for v in current.inputs)
    return list(order)


def trace(value: Value, dims: Dims, through: frozenset[str] = TRANSPARENT) -> Factor:
    """Follows ``value`` back through the operations ``through``."""
    path = [(value, dims)]
    while value.op in through:
        if value.op == "cast" and value.inputs[0].dtype not in FLOATS:
            break
        before = backward(value, dims)
        if before is None:
            break
        value, dims = value.inputs[0], before
        path.append((value, dims))
    return Factor(tuple(path))
