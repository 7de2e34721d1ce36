"""Calls of kernels in Relax functions, in the place of what the adapter found.

Nothing here decides what is rewritten, or which kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import tvm
from tvm import relax, tirx

from blockffn_compile.layer import BlockFFNSpec, Quantisation
from blockffn_compile.passes.recognizer import BlockFFNMatch, Matrix
from blockffn_compile.passes.view import Value


@dataclass(frozen=True)
class Stored:
    """A weight as the original function had it.

    Attributes:
        name: of the parameter; empty for a constant.
        axes: its dimensions in letters, e for experts, n for outputs and k for inputs, as in
            ``schedules.packing.unfold``.  A linear layer counts as one expert.
        outputs: N.
    """

    name: str
    axes: str
    outputs: int


@dataclass(frozen=True)
class Panels:
    """Panels [E, N/P, K, P] of one weight, or of several below each other.

    Attributes:
        weights: one, or for a joined linear layer several.
        experts: E.
        inputs: K.
        panel: P.
        dtype: element type.
        quantisation: of the weights, which are integers then.
        scales: whether these are their scales, for each group along K.
    """

    weights: tuple[Stored, ...]
    experts: int
    inputs: int
    panel: int
    dtype: str
    quantisation: Quantisation | None = None
    scales: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        outputs, rows = sum(weight.outputs for weight in self.weights), self.inputs
        if self.quantisation is not None:
            rows //= self.quantisation.group if self.scales else self.quantisation.per_byte
        return self.experts, -(-outputs // self.panel), rows, self.panel

    @property
    def stored_dtype(self) -> str:
        """Element type of the panels themselves."""
        if self.quantisation is None:
            return self.dtype
        return "bfloat16" if self.scales else self.quantisation.dtype

    @property
    def suffix(self) -> str:
        """Of a name that says what they are."""
        return ".scales" if self.scales else ".panels"


class Kernels(Protocol):
    """Makes the functions that the rewrite calls, and packs what they read.

    Where weights are quantised, the scales of each follow it in the arguments.
    """

    def quantisation(self, weight: str, inputs: int) -> Quantisation | None:
        """How to store a weight of this name and so many inputs; None as it is."""

    def ffn(
        self, spec: BlockFFNSpec, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int, int]:
        """``f(x, scores, up, [gate,] down, y)`` and the widths of its up and down panels."""

    def linear(
        self, inputs: int, outputs: int, dtype: str, quantisation: Quantisation | None
    ) -> tuple[tirx.PrimFunc, int]:
        """``f(x, weight, y)`` and the width of its panels."""

    def pack(self, panels: Panels, weights: Sequence[tvm.runtime.Tensor]) -> tvm.runtime.Tensor:
        """The panels of constants."""


@dataclass(frozen=True)
class Product:
    """A linear layer ``x @ w``.

    Attributes:
        value: its result, of the element type of x.
        x: [..., K].
        weight: [N, K] or [K, N], as ``axes`` says.
    """

    value: Value
    x: Value
    weight: Value
    axes: str


#: New parameters by what they hold.
NewParams = dict[Panels, relax.Var]
#: Computes a variable in another way.
Emit = Callable[["Rewriter"], relax.Expr]


def product(sizes: Sequence[Any]) -> Any:
    """The product of sizes, an expression."""
    return math.prod(sizes, start=tirx.IntImm("int64", 1))


def _dtype(expr: relax.Expr) -> str:
    return str(expr.ty.dtype.dtype)


def row_sizes(matrix: Matrix) -> list[Any]:
    """Sizes of those dimensions of a value that are the rows of its matrix."""
    sizes = [matrix.value.source.ty.shape.values[i] for i in matrix.perm]
    columns = 1
    while columns < matrix.shape[1]:
        columns *= int(sizes.pop())
    return sizes


@relax.expr_functor.mutator
class Rewriter(relax.PyExprMutator):
    """Visits a function, and emits what stands for some of its variables."""

    def __init__(
        self,
        mod: tvm.IRModule,
        emits: Mapping[relax.Var, Emit],
        kernels: Kernels,
        panels: NewParams,
    ) -> None:
        super().__init__(mod)
        self.emits, self.kernels, self.panels = emits, kernels, panels

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """A binding, or what stands for it."""
        emit = self.emits.get(binding.var)
        if emit is None:
            super().visit_var_binding_(binding)
            return
        value = emit(self)
        inner = isinstance(binding.var, relax.DataflowVar)
        var = self.builder_.emit(value) if inner else self.builder_.emit_output(value)
        self.set_var_remap(binding.var, var)

    def read(self, value: Value) -> relax.Expr:
        """A value of the function as it now is."""
        return self.visit_expr(value.source)

    def matrix(self, matrix: Matrix) -> relax.Var:
        """A value read as ``matrix``."""
        expr, rank = self.read(matrix.value), len(matrix.perm)
        rows = row_sizes(matrix)
        if matrix.perm != tuple(range(rank)):
            expr = relax.op.permute_dims(expr, matrix.perm)
        if rank != 2 or len(rows) != 1:
            expr = relax.op.reshape(expr, (product(rows), matrix.shape[1]))
        return self.builder_.emit(expr)

    def cast(self, expr: relax.Expr, dtype: str) -> relax.Expr:
        """``expr`` as another element type."""
        if _dtype(expr) == dtype:
            return expr
        return self.builder_.emit(relax.op.astype(expr, dtype))

    def call(
        self, function: tirx.PrimFunc, args: Sequence[relax.Expr], rows: Any, columns: int
    ) -> relax.Var:
        """The result [rows, columns] of a kernel, of the element type of its first argument."""
        name = str(function.attrs["global_symbol"])
        kernel = self.builder_.add_func(function.without_attr("global_symbol"), name)
        result = relax.TensorType((rows, columns), args[0].ty.dtype)
        return self.builder_.emit(relax.call_tir(kernel, args, result))

    def weights(self, panels: Panels, values: Sequence[Value]) -> list[relax.Expr]:
        """Constants, or new parameters, that hold the panels of these values, and any scales."""
        wanted = [panels]
        if panels.quantisation is not None:
            wanted.append(replace(panels, scales=True))
        return [self._weights(each, values) for each in wanted]

    def _weights(self, panels: Panels, values: Sequence[Value]) -> relax.Expr:
        if values[0].op == "constant":
            return relax.const(self.kernels.pack(panels, [v.source.value for v in values]))
        if panels not in self.panels:
            name = "+".join(weight.name for weight in panels.weights) + panels.suffix
            taken = sum(var.name.startswith(name) for var in self.panels.values())
            name += str(taken or "")
            type_ = relax.TensorType(panels.shape, panels.stored_dtype)
            self.panels[panels] = relax.Var(name, type_)
        return self.panels[panels]


def _name(value: Value) -> str:
    return value.source.name if value.op == "input" else ""


def _stored(value: Value, axes: str, outputs: int) -> Stored:
    return Stored(_name(value), axes, outputs)


def layer(match: BlockFFNMatch) -> Emit:
    """The fused call with everything around it."""
    spec, dtype = match.spec, match.x.value.dtype

    def emit(to: Rewriter) -> relax.Expr:
        emit, op = to.builder_.emit, relax.op
        x = to.matrix(match.x)
        scores, *factors = (to.matrix(m) for m in match.scores)
        for factor in factors:
            if _dtype(factor) != _dtype(scores):
                scores, factor = (to.cast(value, "float32") for value in (scores, factor))
            scores = emit(op.multiply(scores, factor))
        if match.scale != 1:
            scores = emit(op.multiply(scores, relax.const(match.scale, scores.ty.dtype)))
        scores = to.cast(scores, dtype)
        ups = [w for w in (match.w_up, match.w_gate) if w is not None]
        wanted = {to.kernels.quantisation(_name(w), spec.hidden_size) for w in ups}
        wanted.add(to.kernels.quantisation(_name(match.w_down), spec.expert_size))
        quantisation = wanted.pop() if len(wanted) == 1 else None
        function, up_panel, down_panel = to.kernels.ffn(spec, dtype, quantisation)

        def panels(weight: Value, axes: str, letters: str, panel: int) -> list[relax.Expr]:
            outputs, inputs = spec.expert_size, spec.hidden_size
            if letters == "hs":
                outputs, inputs = inputs, outputs
            axes = axes.translate(str.maketrans(letters, "nk"))
            stored = (_stored(weight, axes, outputs),)
            made = Panels(stored, spec.num_experts, inputs, panel, dtype, quantisation)
            return to.weights(made, [weight])

        args = [x, scores]
        for weight in ups:
            args += panels(weight, match.up_axes, "sh", up_panel)
        args += panels(match.w_down, match.down_axes, "hs", down_panel)
        y = to.call(function, args, x.ty.shape.values[0], spec.hidden_size)
        output, perm = match.output.value, match.output.perm
        sizes = output.source.ty.shape.values
        y = op.reshape(y, [sizes[i] for i in perm])
        if perm != tuple(range(len(perm))):
            y = op.permute_dims(emit(y), [perm.index(i) for i in range(len(perm))])
        return to.cast(emit(y), output.dtype)

    return emit


def joined(products: Sequence[Product], quantisation: Quantisation | None) -> dict[relax.Var, Emit]:
    """One call for products of the same tokens, at the place of the first."""
    x, dtype, result = products[0].x, products[0].x.dtype, list[relax.Var]()
    stored = [_stored(p.weight, p.axes, int(p.value.source.ty.shape.values[-1])) for p in products]

    def call(to: Rewriter) -> relax.Var:
        if not result:
            *rows, inputs = x.source.ty.shape.values
            inputs, outputs = int(inputs), sum(weight.outputs for weight in stored)
            function, panel = to.kernels.linear(inputs, outputs, dtype, quantisation)
            panels = to.weights(
                Panels(tuple(stored), 1, inputs, panel, dtype, quantisation),
                [p.weight for p in products],
            )
            tokens = to.read(x)
            if len(rows) != 1:
                tokens = to.builder_.emit(relax.op.reshape(tokens, (product(rows), inputs)))
            result.append(to.call(function, [tokens, *panels], product(rows), outputs))
        return result[0]

    def part(index: int) -> Emit:
        start = sum(weight.outputs for weight in stored[:index])
        end = start + stored[index].outputs

        def emit(to: Rewriter) -> relax.Expr:
            y: relax.Expr = call(to)
            if len(products) > 1:
                y = to.builder_.emit(relax.op.strided_slice(y, [1], [start], [end]))
            return relax.op.reshape(y, products[index].value.source.ty.shape)

        return emit

    return {p.value.source: part(i) for i, p in enumerate(products)}
