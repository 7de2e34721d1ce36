"""ATen graphs in the recogniser's view: one rule per kind of operation, nothing about BlockFFN.

Rules know the operations that ``torch.export`` and AOTAutograd leave and the smaller set that
remains after Inductor's decompositions.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from blockffn_compile.passes.quantised import is_quantised
from blockffn_compile.passes.view import AXES_ONLY, Size, Value

aten, prims = torch.ops.aten, torch.ops.prims

#: Checks types and devices, not elements: no user of its operand.
METADATA_ASSERTION = aten._assert_tensor_metadata.default

Args = dict[str, Any]
Rule = Callable[["_Lowering", fx.Node, Args], Value | None]
_RULES: dict[Any, Rule] = {}


def _rule(*packets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(packets, rule))
        return rule

    return register


def lower(nodes: Sequence[fx.Node]) -> list[Value]:
    """The view of ``nodes``, each node the ``source`` of its value.

    Args:
        nodes: of one ATen graph, in order; dead ones are left out.  Shapes and types are read
            from the (fake) tensors in ``node.meta["val"]``, where AOTAutograd and
            ``torch.export`` leave them; a node without one is opaque.
    """
    lowering = _Lowering()
    dead: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.target is METADATA_ASSERTION or not (node.is_impure() or node.users.keys() - dead):
            dead.add(node)
    for node in (n for n in nodes if n not in dead):
        value = lowering.lower(node)
        value.source, value.scope = node, module_paths(node)
        lowering.of[node] = value
    return lowering.values


def module_paths(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that ``node`` was traced in, outermost first, without the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = []
    for path, _ in stack.values():
        path = re.sub(r"^L\['\w+'\]\.?", "", path)  # Dynamo's name of the root
        path = re.sub(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]", r".\1", path)
        if path:
            paths.append(path)
    return tuple(paths)


def size_token(size: int | torch.SymInt) -> Size:
    """An integer, or the symbolic expression: equal for equal sizes, and adds no guard."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else expr


class _Lowering:
    def __init__(self) -> None:
        self.values: list[Value] = []
        self.of: dict[fx.Node, Value] = {}

    def new(self, node: fx.Node, op: str, inputs: Iterable[Value] = (), **attrs: Any) -> Value:
        """The value that ``node`` computes."""
        tensor = node.meta.get("val")
        shape: tuple[Size, ...] = ()
        dtype = ""
        if isinstance(tensor, Tensor):
            shape, dtype = tuple(map(size_token, tensor.shape)), _type_name(tensor)
        inputs = tuple(inputs)
        if op in (*AXES_ONLY, "cast") and inputs[0].scalar is not None:
            op, attrs, inputs = "scalar", inputs[0].attrs, ()
        return self._append(Value(op, inputs, shape, dtype, attrs, name=_name(node)))

    def inner(
        self, op: str, inputs: tuple[Value, ...], shape: Iterable[Size], **attrs: Any
    ) -> Value:
        """A value inside of a node that stands for several operations."""
        return self._append(Value(op, inputs, tuple(shape), inputs[0].dtype, attrs, name=op))

    def _append(self, value: Value) -> Value:
        self.values.append(value)
        return value

    def operand(self, arg: Any) -> Value:
        if isinstance(arg, bool | int | float):
            return Value("scalar", (), (), "", {"value": float(arg)})
        known = self.of.get(arg) if isinstance(arg, fx.Node) else None
        return known or Value("other", (), (), "", name="a value of another kind")

    def operands(self, *args: Any) -> tuple[Value, ...]:
        return tuple(self.operand(arg) for arg in args)

    def lower(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return self.new(node, "input")
        if node.op == "get_attr":
            return self._constant(node)
        if node.op == "output":
            return self.new(node, "output", self.operands(*node.all_input_nodes))
        if isinstance(_val(node), int | torch.SymInt):
            return self.new(node, "other")  # it reads a shape, not the elements
        if is_quantised(node):
            return self.new(node, "constant")  # a stored weight
        value: Value | None = None
        if node.target is operator.getitem:
            value = self._item(node)
        elif isinstance(node.target, torch._ops.OpOverload) and isinstance(_val(node), Tensor):
            rule = _RULES.get(node.target.overloadpacket)
            value = rule(self, node, _bind(node)) if rule is not None else None
        return value or self.new(node, "other", self.operands(*node.all_input_nodes))

    def _constant(self, node: fx.Node) -> Value:
        """A tensor that the graph's module holds; one number is a number."""
        module = node.graph.owning_module
        tensor = operator.attrgetter(str(node.target))(module) if module is not None else None
        if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
            node.meta.setdefault("val", tensor)
            if tensor.dim() == 0 and tensor.device.type == "cpu":
                with unset_fake_temporarily():
                    return self.new(node, "scalar", value=float(tensor.item()))
        return self.new(node, "constant")

    def _item(self, node: fx.Node) -> Value | None:
        """One result of an operation with several."""
        producer, index = node.args
        assert isinstance(producer, fx.Node)
        packet = getattr(producer.target, "overloadpacket", None)
        source = self.of[producer].inputs[:1]
        if packet in (aten.split, aten.split_with_sizes, aten.unbind):
            return self.new(node, "slice", source)
        if packet is aten._fused_rms_norm and index == 0:
            return _rms_norm(self, node, _bind(producer))
        if packet is aten.native_layer_norm and index == 0:
            return self.new(node, "layer_norm", source)
        if packet is aten.var_mean and index == 1:
            return self.new(node, "mean", source, axes=_axes(_bind(producer), source[0]))
        return None


# --- Reading nodes --------------------------------------------------------------------------------


def _val(node: fx.Node) -> Any:
    return node.meta.get("val")


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return node.name


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bind(node: fx.Node) -> Args:
    """The arguments of an operator call by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False))
    return bound | node.kwargs


def _axes(args: Args, x: Value) -> tuple[int, ...]:
    """Reduced dimensions, non-negative; all of them if none is named."""
    rank, dims = len(x.shape), args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return tuple(dim % rank for dim in dims)


# --- Rules ----------------------------------------------------------------------------------------

_BINARY = {
    aten.mul: "mul",
    aten.div: "div",
    aten.add: "add",
    aten.sub: "sub",
    aten.maximum: "maximum",
    aten.minimum: "minimum",
}
_UNARY = {
    aten.relu: "relu",
    aten.silu: "silu",
    aten.sigmoid: "sigmoid",
    aten.tanh: "tanh",
    aten.exp: "exp",
    aten.erf: "erf",
    aten.neg: "neg",
    aten.abs: "abs",
    aten.sqrt: "sqrt",
    aten.rsqrt: "rsqrt",
    aten.reciprocal: "reciprocal",
}
_REDUCTIONS = {aten.sum: "sum", aten.mean: "mean", aten.amax: "amax"}
_FILLED = {aten.zeros: 0.0, aten.zeros_like: 0.0, aten.ones: 1.0, aten.ones_like: 1.0}


def _packet(node: fx.Node) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target.overloadpacket


@_rule(*_BINARY)
def _binary(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
        return None
    return at.new(node, _BINARY[_packet(node)], at.operands(args["self"], args["other"]))


@_rule(*_UNARY)
def _unary(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, _UNARY[_packet(node)], at.operands(args["self"]))


@_rule(aten.gelu)
def _gelu(at: _Lowering, node: fx.Node, args: Args) -> Value:
    op = "gelu" if args["approximate"] == "none" else "gelu_tanh"
    return at.new(node, op, at.operands(args["self"]))


@_rule(aten.pow)
def _pow(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    if not isinstance(args["exponent"], int | float):
        return None
    return at.new(node, "pow", at.operands(args["self"]), exponent=args["exponent"])


@_rule(aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh)
def _clamp(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    low, high = (args.get(name, args.get(f"{name}_val")) for name in ("min", "max"))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return at.new(node, "clamp", at.operands(args["self"]), min=low, max=high)


@_rule(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.flatten,
    aten.unflatten,
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.lift_fresh,
    aten.lift_fresh_copy,
)
def _reshape(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    if _val(node).dtype != _val(node.all_input_nodes[0]).dtype:
        return None  # view.dtype reads the bits as another type
    return at.new(node, "reshape", at.operands(node.all_input_nodes[0]))


@_rule(aten.permute, aten.t, aten.transpose, aten.mT, aten.numpy_T)
def _permute(at: _Lowering, node: fx.Node, args: Args) -> Value:
    x = at.operand(args["self"])
    perm = list(range(len(x.shape)))
    if "dims" in args:
        perm = [dim % len(perm) for dim in args["dims"]]
    elif _packet(node) is aten.numpy_T:
        perm.reverse()
    elif len(perm) > 1:
        a, b = args.get("dim0", -2), args.get("dim1", -1)
        perm[a], perm[b] = perm[b], perm[a]
    return at.new(node, "permute", (x,), perm=tuple(perm))


@_rule(aten.expand, aten.repeat)
def _expand(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    x, repeats = at.operand(args["self"]), args.get("repeats", ())
    sizes = (1,) * (len(repeats) - len(x.shape)) + x.shape
    if any(n != 1 and size != 1 for n, size in zip(repeats, sizes, strict=False)):
        return None  # tiles
    return at.new(node, "expand", (x,))


@_rule(prims.convert_element_type, aten._to_copy, aten.to)
def _cast(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    before, after = _val(node.all_input_nodes[0]), _val(node)
    if before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return at.new(node, "reshape", at.operands(node.all_input_nodes[0]))
    if not after.dtype.is_floating_point:
        return None
    return at.new(node, "cast", at.operands(node.all_input_nodes[0]))


@_rule(aten.mm, aten.bmm, aten.matmul)
def _matmul(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    a, b = at.operands(args["self"], args.get("mat2", args.get("other")))
    return at.new(node, "matmul", (a, b)) if len(a.shape) > 1 < len(b.shape) else None


@_rule(aten.addmm, aten.baddbmm)
def _addmm(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    bias, a, b = at.operands(*node.args[:3])
    if args["alpha"] != 1 or args["beta"] != 1:
        return None
    shape = (*a.shape[:-1], b.shape[-1])
    return at.new(node, "add", (at.inner("matmul", (a, b), shape), bias))


@_rule(aten.linear)
def _linear(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    x, weight = at.operands(args["input"], args["weight"])
    if len(x.shape) < 2:
        return None
    transposed = at.inner("permute", (weight,), weight.shape[::-1], perm=(1, 0))
    if args["bias"] is None:
        return at.new(node, "matmul", (x, transposed))
    product = at.inner("matmul", (x, transposed), (*x.shape[:-1], weight.shape[0]))
    return at.new(node, "add", (product, at.operand(args["bias"])))


@_rule(*_REDUCTIONS)
def _reduction(at: _Lowering, node: fx.Node, args: Args) -> Value:
    x = at.operand(args["self"])
    return at.new(node, _REDUCTIONS[_packet(node)], (x,), axes=_axes(args, x))


@_rule(aten.softmax, aten._softmax)
def _softmax(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "softmax", at.operands(args["self"]))


@_rule(aten.layer_norm)
def _layer_norm(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "layer_norm", at.operands(args["input"]))


@_rule(aten.rms_norm)
def _rms_norm(at: _Lowering, node: fx.Node, args: Args) -> Value:
    x, weight, eps = at.operand(args["input"]), args["weight"], args["eps"]
    if eps is None:
        eps = torch.finfo(getattr(torch, x.dtype)).eps
    return at.new(node, "rms_norm", (x,) if weight is None else (x, at.operand(weight)), eps=eps)


@_rule(aten.full, aten.full_like, aten.scalar_tensor)
def _full(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    number = args.get("fill_value", args.get("s"))
    return at.new(node, "scalar", value=float(number)) if isinstance(number, int | float) else None


@_rule(*_FILLED)
def _filled(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "scalar", value=_FILLED[_packet(node)])


@_rule(aten.where)
def _where(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    if "other" not in args:
        return None
    return at.new(node, "where", at.operands(args["condition"], args["self"], args["other"]))


@_rule(aten.masked_fill)
def _masked_fill(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "where", at.operands(args["mask"], args["value"], args["self"]))


@_rule(aten.threshold)
def _threshold(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "where", at.operands(args["self"], args["self"], args["value"]))


@_rule(aten.scatter)
def _scatter(at: _Lowering, node: fx.Node, args: Args) -> Value | None:
    if args.get("reduce") is not None:
        return None
    source = args.get("src", args.get("value"))
    return at.new(node, "scatter", at.operands(args["self"], source))


@_rule(aten.slice, aten.select, aten.narrow)
def _slice(at: _Lowering, node: fx.Node, args: Args) -> Value:
    x = at.operand(args["self"])
    whole = x.shape == tuple(map(size_token, _val(node).shape))
    return at.new(node, "reshape" if whole else "slice", (x,))


@_rule(aten.gather, aten.index, aten.index_select)
def _gather(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "gather", at.operands(args["self"]))


@_rule(aten.cat)
def _cat(at: _Lowering, node: fx.Node, args: Args) -> Value:
    return at.new(node, "cat", at.operands(*args["tensors"]))
