"""Nodes in the place of a BlockFFN layer of an ONNX graph, and the weights that they read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from blockffn_compile.passes.recognizer import BlockFFNMatch, Matrix
from blockffn_compile.passes.view import Size

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float64": ir.DataType.DOUBLE,
}


@dataclass(frozen=True)
class Weight:
    """A weight of a layer as the model stores it.

    Attributes:
        source: in the graph.
        tensor: its elements.
        axes: of its dimensions, row-major, by the letters e, s and h.
        sizes: of the letters.
    """

    source: ir.Value
    tensor: ir.TensorProtocol
    axes: str
    sizes: dict[str, int]

    def read(self, order: str) -> np.ndarray:
        """The elements with a dimension for each letter of ``order``."""
        stored = self.axes.replace(",", "")
        array = self.tensor.numpy().reshape([self.sizes[c] for c in stored])
        return np.ascontiguousarray(array.transpose([stored.index(c) for c in order]))


def opset(model: ir.Model) -> int:
    """Version of the standard operators."""
    imports = model.opset_imports
    return imports.get("") or imports.get("ai.onnx") or 1


def weights(match: BlockFFNMatch) -> list[Weight]:
    """Up, down and, of a gated layer, gate."""
    spec = match.spec
    sizes = {"e": spec.num_experts, "s": spec.expert_size, "h": spec.hidden_size}
    stored = (match.w_up, match.up_axes), (match.w_down, match.down_axes)
    return [
        Weight(value.source, value.attrs["tensor"], axes, sizes)
        for value, axes in (*stored, (match.w_gate, match.up_axes))
        if value is not None
    ]


class Emitter(ABC):
    """Replaces layers of one model; what computes the experts is up to the subclass."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self._tape = Tape()
        self._stored: dict[Hashable, ir.Value] = {}

    def refusal(self, match: BlockFFNMatch) -> str | None:
        """Why there is nothing that computes this layer, as a reason to decline it."""
        return None

    @abstractmethod
    def experts(self, match: BlockFFNMatch, x: ir.Value, scores: ir.Value) -> ir.Value:
        """The result [T, H] for ``x`` [T, H] and ``scores`` [T, E], all of one type."""

    def replace(self, match: BlockFFNMatch) -> None:
        """Puts nodes in the place of ``match.output``."""
        old: ir.Value = match.output.value.source
        node = old.producer()
        assert node is not None
        self._tape = Tape()
        new = self._layer(match)
        new.type, new.shape = old.type, old.shape
        for i, made in enumerate(self._tape.nodes):
            made.metadata_props.update(node.metadata_props)
            made.name = f"{node.name or match.name}.{i}.{made.op_type}"
        self.graph.insert_before(node, self._tape.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name, old.name = old.name, None
        new.name = name
        _remove_unused(self.graph, node)
        match.output.value.source = new  # for a layer that reads it

    # --- What subclasses write with ---

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes, domain=domain, overload=overload)

    def constant(self, tensor: Any, dtype: str = "int64") -> ir.Value:
        """A small tensor as a node: initializers need a name of their own."""
        kind = DTYPES.get(dtype, ir.DataType.INT64)
        return self.op("Constant", value=ir.tensor(np.array(tensor, kind.numpy()), dtype=kind))

    def initializer(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: ir.DataType,
        compute: Callable[[], np.ndarray],
        key: Hashable,
    ) -> ir.Value:
        """A new weight, computed whenever it is read.

        Args:
            name: if it is still free.
            key: layers that give the same one share the weight.
        """
        if (name, key) not in self._stored:
            dims = ir.Shape(shape)
            unused = name
            while unused in self.graph.initializers:
                unused += "_"
            value = ir.Value(
                name=unused,
                type=ir.TensorType(dtype),
                shape=dims,
                const_value=ir.LazyTensor(lambda: ir.Tensor(compute(), dtype=dtype), dtype, dims),
            )
            self.graph.register_initializer(value)
            self._stored[name, key] = value
        return self._stored[name, key]

    def stored(self, weight: Weight, order: str) -> ir.Value:
        """The weight as an initializer with a dimension for each letter of ``order``."""
        source, tensor = weight.source, weight.tensor
        shape = tuple(weight.sizes[letter] for letter in order)
        if weight.axes.split(",") == [*order] and source.is_initializer() and tensor.shape == shape:
            return source
        name, key = f"{source.name}.{order}", (source, weight.axes)
        return self.initializer(name, shape, tensor.dtype, lambda: weight.read(order), key)

    # --- The layer around its experts ---

    def _layer(self, match: BlockFFNMatch) -> ir.Value:
        """A value that equals ``match.output``."""
        x = self._matrix(match.x)
        scores, *rest = map(self._matrix, match.scores)
        for factor in rest:
            scores = self.op("Mul", scores, factor)
        dtype = match.scores[0].value.dtype
        if match.scale != 1:
            scores = self.op("Mul", scores, self.constant(match.scale, dtype))
        y = self.experts(match, x, self._cast(scores, dtype, match.x.value.dtype))
        output, perm = match.output.value, match.output.perm
        if len(output.shape) != 2:
            y = self.op("Reshape", y, self._sizes([output.shape[i] for i in perm], match))
        if perm != tuple(range(len(perm))):
            y = self.op("Transpose", y, perm=[perm.index(i) for i in range(len(perm))])
        return self._cast(y, match.x.value.dtype, output.dtype)

    def _matrix(self, matrix: Matrix) -> ir.Value:
        value, shape = matrix.value.source, matrix.value.shape
        if matrix.perm != tuple(range(len(shape))):
            value = self.op("Transpose", value, perm=matrix.perm)
        if len(shape) != 2 or shape[matrix.perm[1]] != matrix.shape[1]:
            value = self.op("Reshape", value, self.constant(matrix.shape))
        return value

    def _cast(self, value: ir.Value, dtype: str, wanted: str) -> ir.Value:
        return value if dtype == wanted else self.op("Cast", value, to=DTYPES[wanted])

    def _sizes(self, sizes: list[Size], match: BlockFFNMatch) -> ir.Value:
        """``sizes`` as a tensor; where more than one is symbolic they are read off x."""
        if sum(not isinstance(size, int) for size in sizes) <= 1:
            return self.constant([size if isinstance(size, int) else -1 for size in sizes])
        known = match.x.value.shape
        numbers = [size for size in sizes if isinstance(size, int)]
        pool: list[Hashable] = [*known, *numbers]
        shape = self.op("Shape", match.x.value.source)
        if numbers:
            shape = self.op("Concat", shape, self.constant(numbers), axis=0)
        return self.op("Gather", shape, self.constant([pool.index(size) for size in sizes]))


def _remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Removes ``node`` and all that was computed for it alone."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        operands = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in operands:
            producer = value.producer()
            if producer is not None:
                stack.append(producer)
            elif value.is_initializer() and not (
                value.uses() or value.is_graph_input() or value.is_graph_output()
            ):
                assert value.name is not None
                graph.initializers.pop(value.name)
