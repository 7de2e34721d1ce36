"""ONNX graphs in the recogniser's view: one rule per kind of operator, nothing about BlockFFN.

Rules know what PyTorch's two exporters and hand-written models use, in operator sets 12 to 24.
"""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript.optimizer import fold_constants

from blockffn_compile.passes.view import AXES_ONLY, FLOATS, Size, Value

log = logging.getLogger("blockffn_compile")

#: Adds what it knows; a result that it adds nothing for is ``other``.
Rule = Callable[["_Lowering", ir.Node], None]
_RULES: dict[str, Rule] = {}

_DTYPES = {"float": "float32", "double": "float64"}

#: Operations whose result need not have the rank of an operand.
_ANY_RANK = {"other", "reshape", "slice", "gather", "cat", "scatter"}

#: Constants of at most this many elements are read to see what they hold.
_SMALL = 1 << 12

_NOT_NUMBERS = {
    ir.DataType.STRING,
    ir.DataType.BOOL,
    ir.DataType.COMPLEX64,
    ir.DataType.COMPLEX128,
}


def _rule(*op_types: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def lower(model: ir.Model) -> list[Value]:
    """The view of the main graph, each ``onnx_ir.Value`` the ``source`` of its view.

    Nodes that no output of the graph needs are left out.  Shapes that the model does not state
    are inferred, on a copy: the model stays as it is.  A value of unknown rank is opaque.
    """
    graph = model.graph
    lowering = _Lowering(_folded(model), analyze_implicit_usage(graph))
    live = _live(graph, lowering.captured)
    for value in graph.inputs:
        lowering.leaf(value)
    for node in graph:
        if node in live:
            lowering.lower(node)
    outputs = tuple(map(lowering.operand, graph.outputs))
    lowering.values.append(Value("output", outputs, (), ""))
    return lowering.values


def _live(graph: ir.Graph, captured: Mapping[ir.Graph, set[ir.Value]]) -> set[ir.Node]:
    wanted = {value.producer() for value in graph.outputs}
    for node in reversed(graph):
        if node in wanted:
            read = (*node.inputs, *_captured(node, captured))
            wanted.update(value.producer() for value in read if value is not None)
    return {node for node in wanted if node is not None}


def _captured(node: ir.Node, captured: Mapping[ir.Graph, set[ir.Value]]) -> Iterable[ir.Value]:
    """Values of the graph that ``node`` reads from within its subgraphs."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from captured[attribute.as_graph()]


def _folded(model: ir.Model) -> dict[str, ir.Value]:
    """Values by name, of a copy where shapes are inferred and small constants computed."""
    copy = model.clone()
    try:
        fold_constants(copy, onnx_shape_inference=True, should_fold=_is_small)
    except Exception as error:  # of whatever an operator of a malformed model does
        log.debug("constants are not folded: %s", error)
        copy = model.clone()
    values = dict[str, ir.Value]()
    for known in (model.clone(), copy):  # folding drops the names of some
        for output in known.graph.outputs:
            if output.shape is not None and output.shape.is_dynamic():
                output.shape = None  # exporters make names up where inference would tell the size
        ShapeInferencePass(check_type=False, strict_mode=False)(known)
        values |= ir.convenience.create_value_mapping(known.graph, include_subgraphs=False)
    return values


def _is_small(node: ir.Node) -> bool | None:
    tensors = [value.const_value for value in node.inputs if value is not None]
    return None if all(tensor is None or tensor.size <= _SMALL for tensor in tensors) else False


def module_paths(node: ir.Node) -> tuple[str, ...]:
    """Paths of the modules that ``node`` was traced in, outermost first, without the root.

    PyTorch's exporter leaves them in the metadata, its predecessor in the name:
    ``/model/layers.0/mlp/MatMul``.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        return tuple(path for path in ast.literal_eval(scopes)[:-1] if path)
    if node.name and node.name.startswith("/"):
        return tuple(accumulate(node.name[1:].split("/")[:-1], "{}.{}".format))
    return ()


class _Lowering:
    def __init__(
        self, folded: Mapping[str, ir.Value], captured: Mapping[ir.Graph, set[ir.Value]]
    ) -> None:
        self.values: list[Value] = []
        self.of: dict[ir.Value, Value] = {}
        self.folded, self.captured = folded, captured

    def new(
        self, node: ir.Node, op: str, inputs: Iterable[Value] = (), index: int = 0, **attrs: Any
    ) -> Value:
        """What ``node`` computes as its result number ``index``."""
        inputs = tuple(inputs)
        if op in (*AXES_ONLY, "cast") and inputs[0].scalar is not None:
            op, attrs, inputs = "scalar", inputs[0].attrs, ()
        source = node.outputs[index]
        shape = self.shape(source)
        if op != "scalar" and (shape is None or not _fits(op, inputs, shape, attrs)):
            op, attrs = "other", {}
        value = Value(op, inputs, shape or (), self.dtype(source), attrs, source, node.op_type)
        value.scope = module_paths(node)
        self.of[source] = value
        self.values.append(value)
        return value

    def inner(
        self, op: str, inputs: tuple[Value, ...], shape: Iterable[Size], **attrs: Any
    ) -> Value:
        """A value inside of a node that stands for several operations."""
        value = Value(op, inputs, tuple(shape), inputs[0].dtype, attrs, name=op)
        self.values.append(value)
        return value

    def leaf(self, value: ir.Value) -> Value:
        """An input or a constant (``attrs["tensor"]``); a tensor of equal elements is a number."""
        tensor, op, attrs = self.constant(value), "input", dict[str, Any]()
        shape, name = self.shape(value), value.name or ""
        if tensor is not None:
            op, shape, number = "constant", tuple(tensor.shape.numpy()), _number(tensor)
            attrs = {"tensor": tensor}
            if number is not None:
                op, attrs = "scalar", {"value": number}
        elif shape is None:
            op = "other"
        inner = shape or ()
        if op == "constant" and 1 in inner:  # dimensions of size one say nothing
            inner = tuple(size for size in inner if size != 1)
        leaf = Value(op, (), inner, self.dtype(value), attrs, value, name)
        self.values.append(leaf)
        if inner != (shape or ()):
            leaf = self.inner("reshape", (leaf,), shape or ())
        self.of[value] = leaf
        return leaf

    def constant(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """A constant of the graph, or what its nodes compute of small ones."""
        if value is None or value.is_graph_input():
            return None
        tensor, folded = ir.convenience.get_const_tensor(value), self.folded.get(value.name or "")
        return folded.const_value if tensor is None and folded is not None else tensor

    def operand(self, value: ir.Value | None) -> Value:
        if value is None:
            return Value("other", (), (), "", name="an omitted input")
        return self.of.get(value) or self.leaf(value)

    def operands(self, node: ir.Node) -> tuple[Value, ...]:
        return tuple(self.operand(value) for value in node.inputs if value is not None)

    def shape(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Sizes; a dimension that nothing is known about is equal to no other."""
        shape, known = value.shape, self.folded.get(value.name or "")
        if known is not None and (
            shape is None
            or shape.has_unknown_dim()
            or (value.is_graph_output() and known.shape and not known.shape.has_unknown_dim())
        ):
            shape = known.shape
        if shape is None:
            tensor = self.constant(value)
            return None if tensor is None else tuple(tensor.shape.numpy())
        return tuple(dim if isinstance(dim, int) else dim.value or object() for dim in shape)

    def dtype(self, value: ir.Value) -> str:
        known = self.folded.get(value.name or "")
        dtype = value.dtype or (None if known is None else known.dtype)
        name = "" if dtype is None else dtype.name.lower()
        return _DTYPES.get(name, name)

    def lower(self, node: ir.Node) -> None:
        tensor = self.constant(node.outputs[0])
        if tensor is not None and (node.op_type == "Constant" or _number(tensor) is not None):
            self.leaf(node.outputs[0])
            return
        if node.op_type in ("Shape", "Size"):
            self.new(node, "other")  # they do not read the elements
            return
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        values = (node.outputs[0], *(value for value in node.inputs if value is not None))
        if rule is not None and all(self.shape(value) is not None for value in values):
            # A node that breaks its operator's rules is opaque.
            with suppress(ArithmeticError, LookupError, TypeError, ValueError):
                rule(self, node)
        inside = tuple(map(self.operand, _captured(node, self.captured)))
        for index, output in enumerate(node.outputs):
            if output not in self.of and self.constant(output) is not None:
                self.leaf(output)
            elif output not in self.of:
                self.new(node, "other", (*self.operands(node), *inside), index)


# --- Reading nodes --------------------------------------------------------------------------------


def _fits(
    op: str, inputs: tuple[Value, ...], shape: tuple[Size, ...], attrs: dict[str, Any]
) -> bool:
    """Whether the ranks are those of the operation: files may state shapes that are wrong."""
    ranks, rank = [len(value.shape) for value in inputs], len(shape)
    if op == "permute":
        return ranks == [rank] and sorted(attrs["perm"]) == list(range(rank))
    if op in ("sum", "mean", "amax"):
        axes = attrs["axes"]
        return rank in (ranks[0], ranks[0] - len(axes)) and all(a < ranks[0] for a in axes)
    if op == "expand":
        return ranks[0] <= rank
    return op in _ANY_RANK or rank == max(ranks)


def _number(tensor: ir.TensorProtocol) -> float | None:
    """The number that a small constant holds everywhere, as a person would have written it."""
    if not 0 < tensor.size <= _SMALL or tensor.dtype in _NOT_NUMBERS:
        return None
    elements = tensor.numpy()
    return float(str(elements.flat[0])) if (elements == elements.flat[0]).all() else None


def _float(node: ir.Node, name: str, default: float) -> float:
    """An attribute, stored with the precision of fp32, as a person would have written it."""
    return float(str(np.float32(node.attributes.get_float(name, default))))


def _ints(at: _Lowering, node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """An attribute that newer operator sets made an input; () where it is left out."""
    if name in node.attributes:
        return tuple(node.attributes[name].as_ints())
    if index >= len(node.inputs) or node.inputs[index] is None:
        return ()
    tensor = at.constant(node.inputs[index])
    return None if tensor is None else tuple(map(int, tensor.numpy().flat))


def _scalar(at: _Lowering, node: ir.Node, index: int) -> float | None:
    """Input number ``index`` as a number; NaN where it is one that is not known."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    number = at.operand(node.inputs[index]).scalar
    return math.nan if number is None else number


# --- Rules ----------------------------------------------------------------------------------------

_BINARY = {"Mul": "mul", "Add": "add", "Sub": "sub", "Max": "maximum", "Min": "minimum"}
_UNARY = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Exp": "exp",
    "Erf": "erf",
    "Neg": "neg",
    "Abs": "abs",
    "Sqrt": "sqrt",
}
_REDUCTIONS = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "amax"}


@_rule(*_BINARY)
def _binary(at: _Lowering, node: ir.Node) -> None:
    if len(node.inputs) == 2:
        at.new(node, _BINARY[node.op_type], at.operands(node))


@_rule(*_UNARY)
def _unary(at: _Lowering, node: ir.Node) -> None:
    at.new(node, _UNARY[node.op_type], at.operands(node))


@_rule("Div", "Reciprocal")
def _div(at: _Lowering, node: ir.Node) -> None:
    *numerator, divisor = at.operands(node)
    if all(v.scalar == 1 for v in numerator):  # 1 / sqrt(x): ONNX has no operator for it
        op, x = ("rsqrt", divisor.inputs) if divisor.op == "sqrt" else ("reciprocal", (divisor,))
        at.new(node, op, x)
    else:
        at.new(node, "div", (*numerator, divisor))


@_rule("Gelu")
def _gelu(at: _Lowering, node: ir.Node) -> None:
    tanh = node.attributes.get_string("approximate", "none") == "tanh"
    at.new(node, "gelu_tanh" if tanh else "gelu", at.operands(node))


@_rule("Swish")
def _swish(at: _Lowering, node: ir.Node) -> None:
    if _float(node, "alpha", 1.0) == 1:
        at.new(node, "silu", at.operands(node))


@_rule("Pow")
def _pow(at: _Lowering, node: ir.Node) -> None:
    x, exponent = at.operands(node)
    if exponent.scalar is not None:
        at.new(node, "pow", (x,), exponent=exponent.scalar)


@_rule("Clip")
def _clip(at: _Lowering, node: ir.Node) -> None:
    low, high = (_scalar(at, node, i) for i in (1, 2))
    if math.nan not in (low, high):
        at.new(node, "clamp", (at.operand(node.inputs[0]),), min=low, max=high)


@_rule("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout")
def _reshape(at: _Lowering, node: ir.Node) -> None:
    at.new(node, "reshape", (at.operand(node.inputs[0]),))


@_rule("Transpose")
def _transpose(at: _Lowering, node: ir.Node) -> None:
    (x,) = at.operands(node)
    perm = node.attributes.get_ints("perm") or range(len(x.shape))[::-1]
    at.new(node, "permute", (x,), perm=tuple(perm))


@_rule("Expand", "Tile")
def _expand(at: _Lowering, node: ir.Node) -> None:
    x, shape = at.operand(node.inputs[0]), at.shape(node.outputs[0])
    assert shape is not None
    if all(a in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False)):
        at.new(node, "expand", (x,))


@_rule("Cast", "CastLike")
def _cast(at: _Lowering, node: ir.Node) -> None:
    x, dtype = at.operand(node.inputs[0]), at.dtype(node.outputs[0])
    if x.dtype == dtype:
        at.new(node, "reshape", (x,))
    elif dtype in FLOATS:
        at.new(node, "cast", (x,))


@_rule("MatMul")
def _matmul(at: _Lowering, node: ir.Node) -> None:
    a, b = at.operands(node)
    if len(a.shape) > 1 < len(b.shape):
        at.new(node, "matmul", (a, b))


@_rule("Gemm")
def _gemm(at: _Lowering, node: ir.Node) -> None:
    """alpha * a @ b + beta * c."""
    a, b, *c = at.operands(node)
    if len(a.shape) != 2 or len(b.shape) != 2 or (c and _float(node, "beta", 1.0) != 1):
        return
    if node.attributes.get_int("transA", 0):
        a = at.inner("permute", (a,), a.shape[::-1], perm=(1, 0))
    if node.attributes.get_int("transB", 0):
        b = at.inner("permute", (b,), b.shape[::-1], perm=(1, 0))
    alpha = _float(node, "alpha", 1.0)
    steps: list[tuple[str, tuple[Value, ...]]] = [("matmul", (b,))]
    if alpha != 1:
        steps.append(("mul", (Value("scalar", (), (), "", {"value": alpha}),)))
    if c:
        steps.append(("add", tuple(c)))
    (*before, (op, others)), value = steps, a
    for inner_op, inner_others in before:
        value = at.inner(inner_op, (value, *inner_others), (a.shape[0], b.shape[1]))
    at.new(node, op, (value, *others))


@_rule("Einsum")
def _einsum(at: _Lowering, node: ir.Node) -> None:
    """Every operand gets all letters as dimensions; then a product and a sum."""
    left, arrow, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms, operands = left.split(","), at.operands(node)
    if not arrow:
        right = "".join(sorted(c for c in left if c != "," and left.count(c) == 1))
    if any(
        "." in term or len(set(term)) != len(x.shape)
        for term, x in zip(terms, operands, strict=True)
    ):
        return  # an ellipsis or a diagonal
    letters = list(dict.fromkeys(right + left.replace(",", "")))
    sizes: dict[str, Size] = dict.fromkeys(letters, 1)
    for term, x in zip(terms, operands, strict=True):
        sizes |= {c: size for c, size in zip(term, x.shape, strict=True) if size != 1}
    factors = []
    for term, x in zip(terms, operands, strict=True):
        perm = tuple(term.index(c) for c in letters if c in term)
        moved = at.inner("permute", (x,), [x.shape[i] for i in perm], perm=perm)
        spread = [x.shape[term.index(c)] if c in term else 1 for c in letters]
        factors.append(at.inner("reshape", (moved,), spread))
    value, *others = factors
    for i, other in enumerate(others, start=2):
        known = set("".join(terms[:i]))
        shape = [sizes[c] if c in known else 1 for c in letters]
        value = at.inner("mul", (value, other), shape)
    summed = tuple(range(len(right), len(letters)))
    if summed:
        at.new(node, "sum", (value,), axes=summed)
    else:
        at.new(node, "reshape", (value,))


@_rule(*_REDUCTIONS)
def _reduction(at: _Lowering, node: ir.Node) -> None:
    x, axes = at.operand(node.inputs[0]), _ints(at, node, "axes", 1)
    if axes is None or (not axes and node.attributes.get_int("noop_with_empty_axes", False)):
        return
    rank = len(x.shape)
    if all(-rank <= axis < rank for axis in axes):
        axes = tuple(axis % rank for axis in axes or range(rank))
        at.new(node, _REDUCTIONS[node.op_type], (x,), axes=axes)


@_rule("Softmax")
def _softmax(at: _Lowering, node: ir.Node) -> None:
    at.new(node, "softmax", at.operands(node))


@_rule("LayerNormalization")
def _layer_norm(at: _Lowering, node: ir.Node) -> None:
    at.new(node, "layer_norm", (at.operand(node.inputs[0]),))


@_rule("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(at: _Lowering, node: ir.Node) -> None:
    x, weight = at.operands(node)
    if node.attributes.get_int("axis", -1) in (-1, len(x.shape) - 1):
        at.new(node, "rms_norm", (x, weight), eps=_float(node, "epsilon", 1e-5))


@_rule("ConstantOfShape")
def _filled(at: _Lowering, node: ir.Node) -> None:
    value = node.attributes.get_tensor("value")
    at.new(node, "scalar", value=0.0 if value is None else _number(value))


@_rule("Where")
def _where(at: _Lowering, node: ir.Node) -> None:
    at.new(node, "where", at.operands(node))


@_rule("ScatterElements", "ScatterND")
def _scatter(at: _Lowering, node: ir.Node) -> None:
    if node.attributes.get_string("reduction", "none") == "none":
        base, _, source = at.operands(node)
        at.new(node, "scatter", (base, source))


@_rule("Slice")
def _slice(at: _Lowering, node: ir.Node) -> None:
    x, steps = at.operand(node.inputs[0]), _ints(at, node, "steps", 4)
    if steps is None or any(step != 1 for step in steps):
        at.new(node, "gather", (x,))
    else:
        at.new(node, "reshape" if x.shape == at.shape(node.outputs[0]) else "slice", (x,))


@_rule("Split")
def _split(at: _Lowering, node: ir.Node) -> None:
    for index in range(len(node.outputs)):
        at.new(node, "slice", (at.operand(node.inputs[0]),), index)


@_rule("Gather", "GatherElements", "GatherND")
def _gather(at: _Lowering, node: ir.Node) -> None:
    x, indices = at.operands(node)
    one = node.op_type == "Gather" and indices.scalar is not None
    at.new(node, "slice" if one else "gather", (x,))


@_rule("Concat")
def _concat(at: _Lowering, node: ir.Node) -> None:
    at.new(node, "cat", at.operands(node))
