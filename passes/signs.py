"""Which sign the elements of a value have, where its operations and constants tell.

Some kernels take positive scores only.  A router whose norm has negative weights suits them, too,
once each expert's sign is moved into its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from blockffn_compile.passes.recognizer import Matrix
from blockffn_compile.passes.view import FLOATS, Value

_POSITIVE = frozenset({"relu", "exp", "sigmoid", "sqrt", "rsqrt", "abs", "softmax"})
#: Operations of which nothing is known but that equal signs in give the same sign out.
_MIXES = frozenset(
    {"add", "maximum", "minimum", "where", "sum", "mean", "amax", "slice", "gather", "cat",
     "scatter"}
)  # fmt: skip
#: Deeper chains than this are not routers.
_MAX_DEPTH = 64


def signs(value: Value, depth: int = _MAX_DEPTH) -> np.ndarray | None:
    """Signs of the elements of ``value``, of which any may be zero nevertheless.

    Returns:
        1, -1, or 0 where all elements are zero.  The array has the rank of ``value``; a dimension
        has its size, or size one where the sign does not depend on it.  None where signs depend on
        data, or cannot be told.
    """
    op, inputs, rank = value.op, value.inputs, len(value.shape)
    if _is_positive(value):
        return np.ones((1,) * rank)
    if value.scalar is not None:
        return np.full((1,) * rank, np.sign(value.scalar))
    if op == "constant":
        return np.sign(value.attrs["tensor"].numpy().astype(np.float64)).reshape(value.shape)
    operands = [signs(v, depth - 1) for v in inputs[op == "where" :]] if depth else []
    known = [s for s in operands if s is not None]
    if not known or len(known) < len(operands):
        positive = op == "maximum" and any((s >= 0).all() for s in known)
        return np.ones((1,) * rank) if positive else None
    if op in ("mul", "div", "rms_norm"):
        return np.asarray(np.prod(np.broadcast_arrays(*known), axis=0))
    if op in _MIXES:
        return _common(known, rank)
    if op == "cast":
        return known[0]
    if op == "permute":
        return known[0].transpose(value.attrs["perm"])
    if op in ("reshape", "expand"):
        return _moved(known[0], value)
    return None


def _is_positive(value: Value) -> bool:
    op, inputs, attrs = value.op, value.inputs, value.attrs
    return (
        op in _POSITIVE
        or value.dtype == "bool"
        or (op == "cast" and inputs[0].dtype not in FLOATS)
        or (op == "clamp" and attrs["min"] is not None and attrs["min"] >= 0)
        or (op == "pow" and attrs["exponent"] % 2 == 0)
        or (op == "mul" and inputs[0] is inputs[1])
    )


def _common(known: Iterable[np.ndarray], rank: int) -> np.ndarray | None:
    """The one sign that is among ``known``, but for zeros."""
    found = list({sign for array in known for sign in array.flat if sign != 0})
    return np.full((1,) * rank, found[0]) if len(found) == 1 else None


def _moved(known: np.ndarray, value: Value) -> np.ndarray | None:
    """The signs of a reshape, if the dimensions on which they depend are the last ones still."""
    if known.size == 1:
        return known.reshape((1,) * len(value.shape))
    first = next(i for i, size in enumerate(known.shape) if size != 1)
    tail = value.inputs[0].shape[first:]
    if value.shape[-len(tail) :] != tail:
        return None
    return known.reshape((1,) * (len(value.shape) - len(tail)) + known.shape[first:])


def column_signs(matrix: Matrix) -> np.ndarray | None:
    """Signs of the columns of ``matrix``, as above; None if they differ between rows."""
    known = signs(matrix.value)
    if known is None:
        return None
    known, sizes = known.transpose(matrix.perm), [matrix.value.shape[i] for i in matrix.perm]
    inner = list[int]()  # sizes of the dimensions that are columns
    while math.prod(inner) < matrix.shape[1]:
        size = sizes.pop()
        assert isinstance(size, int)
        inner.insert(0, size)
    varying = known.shape[len(sizes) :]
    if known.size != math.prod(varying):
        return None
    return np.broadcast_to(known.reshape(varying), inner).reshape(-1)
