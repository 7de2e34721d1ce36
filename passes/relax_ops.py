"""Relax functions in the recogniser's view: one rule per kind of operation, nothing about BlockFFN.

Rules know what the importers of PyTorch programs and of ONNX models emit, and the operators of
``tvm.relax.op.nn`` that stand for the same things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tvm import ir, relax, tirx
from tvm.sym import Analyzer

from blockffn_compile.passes.view import AXES_ONLY, FLOATS, Size, Value

Rule = Callable[["_Lowering", relax.Call], "Recipe | None"]
#: (operation of the view, operands, attributes).
Recipe = tuple[str, Sequence[Value], dict[str, Any]]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update({f"relax.{name}": rule for name in names})
        return rule

    return register


def lower(function: relax.Function) -> list[Value]:
    """The view of ``function``; a value's ``source`` is its variable, or the constant itself.

    Args:
        function: in A-normal form, with the types that the block builder infers.  Dead bindings
            are left out; a binding without a tensor's type is opaque.
    """
    lowering = _Lowering()
    for param in function.params:
        lowering.bind(param, "input", (), {}, param.name)
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    for binding in _live(bindings, function.body.body):
        lowering.lower(binding)
    results = lowering.operands(*_fields(function.body.body))
    lowering.values.append(Value("output", results, (), "", name="output"))
    return lowering.values


def inputs_of(expr: relax.Expr) -> list[relax.Expr]:
    """The variables and constants that one bound expression reads."""
    if isinstance(expr, relax.Var | ir.GenericConst):
        return [expr]
    if isinstance(expr, relax.Call):
        return [leaf for arg in expr.args for leaf in inputs_of(arg)]
    if isinstance(expr, relax.Tuple):
        return [leaf for field in expr.fields for leaf in inputs_of(field)]
    if isinstance(expr, relax.TupleGetItem):
        return inputs_of(expr.tuple_value)
    return list(relax.analysis.free_vars(expr)) if isinstance(expr, relax.If) else []


def _fields(expr: relax.Expr) -> Sequence[relax.Expr]:
    return expr.fields if isinstance(expr, relax.Tuple) else [expr]


def _live(bindings: Sequence[relax.Binding], result: relax.Expr) -> list[relax.Binding]:
    """The bindings that the result depends on, and calls with effects."""
    wanted: set[relax.Expr] = {v for v in inputs_of(result) if isinstance(v, relax.Var)}
    live = []
    for binding in reversed(bindings):
        pure = not isinstance(binding, relax.VarBinding) or not _has_effect(binding.value)
        if binding.var in wanted or not pure:
            live.append(binding)
            wanted.update(v for v in inputs_of(binding.value) if isinstance(v, relax.Var))
    return live[::-1]


def _has_effect(expr: relax.Expr) -> bool:
    if not isinstance(expr, relax.Call):
        return False
    if isinstance(expr.op, ir.Op):
        return expr.op.name == "relax.call_packed"
    return isinstance(expr.op, relax.ExternFunc)


class _Lowering:
    def __init__(self) -> None:
        self.values: list[Value] = []
        self.of: dict[relax.Var, Value] = {}
        self.analyzer = Analyzer()
        self.sizes: list[ir.Expr] = []

    def bind(
        self,
        var: relax.Var,
        op: str,
        inputs: Sequence[Value],
        attrs: dict[str, Any],
        name: str,
    ) -> None:
        """The value of ``var``."""
        shape, dtype = self.type(var)
        if op in (*AXES_ONLY, "cast") and inputs[0].scalar is not None:
            op, attrs, inputs = "scalar", inputs[0].attrs, ()
        self.of[var] = self.append(Value(op, tuple(inputs), shape, dtype, attrs, var, name))

    def inner(self, op: str, inputs: Iterable[Value], shape: Iterable[Size], **attrs: Any) -> Value:
        """A value inside of a call that stands for several operations."""
        inputs = tuple(inputs)
        return self.append(Value(op, inputs, tuple(shape), inputs[0].dtype, attrs, name=op))

    def append(self, value: Value) -> Value:
        self.values.append(value)
        return value

    def type(self, expr: relax.Expr) -> tuple[tuple[Size, ...], str]:
        """Sizes and element type of a tensor; nothing for anything else."""
        known = expr.ty
        if not _is_shaped(expr):
            return (), ""
        return tuple(map(self.size, known.shape.values)), str(known.dtype.dtype)

    def size(self, size: ir.Expr) -> Size:
        """An integer, or one expression for all that are provably equal."""
        size = self.analyzer.simplify(size)
        if isinstance(size, tirx.IntImm):
            return int(size.value)
        for known in self.sizes:
            if self.analyzer.can_prove_equal(known, size):
                return known
        self.sizes.append(size)
        return size

    def operand(self, expr: relax.Expr) -> Value:
        if isinstance(expr, relax.Var) and expr in self.of:
            return self.of[expr]
        if isinstance(expr, ir.GenericConst):
            shape, dtype = self.type(expr)
            if math.prod(expr.value.shape) == 1:
                # As it was written: 1e-6 rather than the float32 nearest to it.
                number = float(str(expr.value.numpy().reshape(())[()]))
                return Value("scalar", (), shape, dtype, {"value": number})
            return self.append(Value("constant", (), shape, dtype, {}, expr, "a constant"))
        if isinstance(expr, tirx.IntImm | tirx.FloatImm):
            return Value("scalar", (), (), "", {"value": float(expr.value)})
        return Value("other", (), (), "", name="a value of another kind")

    def operands(self, *exprs: relax.Expr) -> tuple[Value, ...]:
        return tuple(self.operand(expr) for expr in exprs)

    def lower(self, binding: relax.Binding) -> None:
        expr, var = binding.value, binding.var
        if isinstance(binding, relax.MatchCast) or isinstance(expr, relax.Var | ir.GenericConst):
            if _is_shaped(expr):
                self.of[var] = self.operand(expr)  # the same tensor under another name
            else:
                self.bind(var, "other", self.operands(expr), {}, "relax.match_cast")
            return
        recipe: Recipe | None = None
        name = type(expr).__name__
        if isinstance(expr, relax.TupleGetItem):
            name = "an item of a tuple"
            producer = self.operand(expr.tuple_value)
            if producer.name == "relax.split":
                recipe = ("slice", producer.inputs, {})
        elif isinstance(expr, relax.Call):
            name = expr.op.name if isinstance(expr.op, ir.Op) else "a call"
            if name in _RULES and all(map(_is_shaped, (var, *inputs_of(expr)))):
                recipe = _RULES[name](self, expr)
        op, inputs, attrs = recipe or ("other", self.operands(*inputs_of(expr)), {})
        self.bind(var, op, inputs, attrs, name)


def _is_shaped(expr: relax.Expr) -> bool:
    """Whether it is a tensor of known sizes; some operators' results have none."""
    return isinstance(expr.ty, relax.TensorType) and isinstance(expr.ty.shape, relax.ShapeExpr)


def _axes(axes: Any, rank: int) -> tuple[int, ...]:
    """Non-negative; all of them if none is named."""
    return tuple(range(rank)) if axes is None else tuple(int(axis) % rank for axis in axes)


def _rank(call: relax.Call) -> int:
    return len(call.args[0].ty.shape)


def _all_operands(op: str, count: int) -> Rule:
    return lambda at, call: (op, at.operands(*call.args[:count]), {})


_SAME = {
    2: {
        "multiply": "mul", "divide": "div", "add": "add", "subtract": "sub",
        "maximum": "maximum", "minimum": "minimum",
    },
    1: {
        "nn.relu": "relu", "nn.silu": "silu", "nn.gelu": "gelu", "nn.gelu_tanh": "gelu_tanh",
        "sigmoid": "sigmoid", "tanh": "tanh", "exp": "exp", "erf": "erf", "negative": "neg",
        "abs": "abs", "sqrt": "sqrt", "rsqrt": "rsqrt", "nn.softmax": "softmax",
        "nn.layer_norm": "layer_norm", "broadcast_to": "expand",
        "reshape": "reshape", "expand_dims": "reshape", "squeeze": "reshape",
        "flatten": "reshape", "strided_slice": "slice",
        "gather_elements": "gather", "gather_nd": "gather",
    },
    3: {"where": "where"},
}  # fmt: skip
for _count, _names in _SAME.items():
    for _name, _op in _names.items():
        _rule(_name)(_all_operands(_op, _count))


@_rule("take")
def _take(at: _Lowering, call: relax.Call) -> Recipe:
    """Chosen positions; one position is a part."""
    x, index = call.args
    return ("gather" if len(index.ty.shape) else "slice"), at.operands(x), {}


@_rule("power")
def _power(at: _Lowering, call: relax.Call) -> Recipe | None:
    x, exponent = at.operands(*call.args)
    return None if exponent.scalar is None else ("pow", (x,), {"exponent": exponent.scalar})


@_rule("clip")
def _clip(at: _Lowering, call: relax.Call) -> Recipe | None:
    x, low, high = at.operands(*call.args)
    if low.scalar is None or high.scalar is None:
        return None
    attrs = {"min": low.scalar, "max": high.scalar}
    return "clamp", (x,), {k: v if math.isfinite(v) else None for k, v in attrs.items()}


@_rule("astype")
def _cast(at: _Lowering, call: relax.Call) -> Recipe | None:
    (x,) = at.operands(*call.args)
    after = str(call.ty.dtype.dtype)
    if x.dtype == after:
        return "reshape", (x,), {}
    return ("cast", (x,), {}) if after in FLOATS else None


@_rule("permute_dims")
def _permute(at: _Lowering, call: relax.Call) -> Recipe:
    rank, axes = _rank(call), call.attrs.axes
    perm = tuple(reversed(range(rank))) if axes is None else _axes(axes, rank)
    return "permute", at.operands(*call.args), {"perm": perm}


@_rule("tile")
def _tile(at: _Lowering, call: relax.Call) -> Recipe | None:
    (x,) = at.operands(*call.args)
    repeats = [int(n) for n in call.attrs.repeats]
    rank = max(len(repeats), len(x.shape))
    repeats = [1] * (rank - len(repeats)) + repeats
    sizes = (1,) * (rank - len(x.shape)) + x.shape
    if any(n != 1 and size != 1 for n, size in zip(repeats, sizes, strict=True)):
        return None
    return "expand", (x,), {}


@_rule("repeat")
def _repeat(at: _Lowering, call: relax.Call) -> Recipe | None:
    """Each element several times in a row: an expand of a new axis, and a reshape."""
    (x,) = at.operands(*call.args)
    if call.attrs.axis is None:
        return None
    (axis,), count = _axes([call.attrs.axis], len(x.shape)), int(call.attrs.repeats)
    left, right = x.shape[: axis + 1], x.shape[axis + 1 :]
    inserted = at.inner("reshape", (x,), (*left, 1, *right))
    return "reshape", (at.inner("expand", (inserted,), (*left, count, *right)),), {}


@_rule("matmul")
def _matmul(at: _Lowering, call: relax.Call) -> Recipe | None:
    a, b = at.operands(*call.args)
    return ("matmul", (a, b), {}) if len(a.shape) > 1 < len(b.shape) else None


@_rule("einsum")
def _einsum(at: _Lowering, call: relax.Call) -> Recipe | None:
    """A product of the operands, each with one axis per letter, and a sum."""
    operands = at.operands(*call.args[0].fields)
    terms, _, result = str(call.attrs.subscripts).replace(" ", "").partition("->")
    letters = terms.split(",")
    if any(len(set(term)) < len(term) or "." in term for term in (*letters, result)):
        return None
    sizes = {
        letter: size
        for term, value in zip(letters, operands, strict=True)
        for letter, size in zip(term, value.shape, strict=True)
    }
    order = result + "".join(sorted(sizes.keys() - set(result)))
    total: Value | None = None
    for term, value in zip(letters, operands, strict=True):
        perm = tuple(sorted(range(len(term)), key=lambda i: order.index(term[i])))
        value = at.inner("permute", (value,), (value.shape[i] for i in perm), perm=perm)
        shape = [sizes[letter] if letter in term else 1 for letter in order]
        value = at.inner("reshape", (value,), shape)
        total = (
            value
            if total is None
            else at.inner("mul", (total, value), (sizes[letter] for letter in order))
        )
    assert total is not None
    return "sum", (total,), {"axes": tuple(range(len(result), len(order)))}


def _reduction(op: str) -> Rule:
    return lambda at, call: (
        op,
        at.operands(*call.args),
        {"axes": _axes(call.attrs.axis, _rank(call))},
    )


for _name, _op in {"sum": "sum", "mean": "mean", "max": "amax"}.items():
    _rule(_name)(_reduction(_op))


@_rule("nn.rms_norm")
def _rms_norm(at: _Lowering, call: relax.Call) -> Recipe | None:
    if _axes(call.attrs.axes, _rank(call)) != (_rank(call) - 1,):
        return None
    return "rms_norm", at.operands(*call.args), {"eps": float(call.attrs.epsilon)}


@_rule("full", "full_like")
def _full(at: _Lowering, call: relax.Call) -> Recipe | None:
    number = at.operand(call.args[1]).scalar
    return None if number is None else ("scalar", (), {"value": number})


def _filled(number: float) -> Rule:
    return lambda at, call: ("scalar", (), {"value": number})


_rule("zeros", "zeros_like")(_filled(0.0))
_rule("ones", "ones_like")(_filled(1.0))


@_rule("scatter_elements")
def _scatter(at: _Lowering, call: relax.Call) -> Recipe | None:
    if str(call.attrs.reduction) != "update":
        return None
    base, _, source = at.operands(*call.args)
    return "scatter", (base, source), {}


@_rule("concat")
def _concat(at: _Lowering, call: relax.Call) -> Recipe:
    return "cat", at.operands(*inputs_of(call.args[0])), {}
