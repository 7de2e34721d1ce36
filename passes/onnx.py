"""The ONNX adapter: rewrites BlockFFN layers to ``com.blockffn::ChunkSparseFFN``.

Two forms, one rewrite: :func:`rewrite` for a model of onnx-ir, :class:`BlockFFNPass` for its pass
pipelines.  Models of any exporter will do: weights may be stored in any orientation, folded or
not, and operators fused or spelled out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.tape import Tape

from blockffn_compile.passes.onnx_function import DOMAIN, MIN_OPSET, NAME, VERSION, function
from blockffn_compile.passes.onnx_ops import lower
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, Matrix, Result, recognise
from blockffn_compile.passes.verification import SIZES, check_error, log_results, placeable
from blockffn_compile.passes.view import Size, Value

INPUTS = "weights are inputs of the graph; store them as initializers"

_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float64": ir.DataType.DOUBLE,
}


def find(model: ir.Model) -> list[Result]:
    """BlockFFN layers and near misses of the main graph, in its order."""
    results = recognise(lower(model))
    version = _opset(model)
    for i, result in enumerate(results):
        if isinstance(result, Declined):
            continue
        if version < MIN_OPSET:
            reason = (
                f"the model uses operator set {version}; convert it to {MIN_OPSET} or newer, "
                "for example with onnx.version_converter"
            )
            results[i] = Declined(result.name, reason)
        elif any(weight.op != "constant" for weight in _weights(result)):
            results[i] = Declined(result.name, INPUTS)
        elif not placeable(result):
            results[i] = Declined(result.name, SIZES)
    return results


def rewrite(model: ir.Model, *, verify: bool = False) -> list[Result]:
    """Replaces every BlockFFN layer of the main graph, in place, by one node.

    The node's operator comes with a function body, so any runtime can run the model.  Inputs and
    outputs of the graph keep their names and order, and whatever is not of a layer stays as it is.

    Args:
        model: weights may be external; they are read when the model is saved.
        verify: run both sides of every rewrite on random inputs, with ONNX's reference evaluator,
            and compare.

    Returns:
        A :class:`BlockFFNMatch` for every layer rewritten, a :class:`Declined` with the reason for
        every near miss, in the order of the graph.

    Raises:
        VerificationError: the two sides differ; the message names the layer and the error.
    """
    if verify:
        trial = model.clone()
        for match in _matches(_apply(trial)):
            _verify(model, trial, match)
    results = _apply(model)
    log_results(results)
    return results


class BlockFFNPass(ir.passes.InPlacePass):
    """:func:`rewrite` for pass pipelines of onnx-ir.

    Attributes:
        results: of all models so far.
    """

    def __init__(self, *, verify: bool = False) -> None:
        self.verify = verify
        self.results: list[Result] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        results = rewrite(model, verify=self.verify)
        self.results += results
        return ir.passes.PassResult(model, any(_matches(results)))


def _matches(results: list[Result]) -> Iterator[BlockFFNMatch]:
    return (result for result in results if isinstance(result, BlockFFNMatch))


def _opset(model: ir.Model) -> int:
    imports = model.opset_imports
    return imports.get("") or imports.get("ai.onnx") or 1


def _weights(match: BlockFFNMatch) -> list[Value]:
    """In the order of the operator's inputs."""
    return [w for w in (match.w_up, match.w_down, match.w_gate) if w is not None]


# --- Emission -------------------------------------------------------------------------------------


def _apply(model: ir.Model) -> list[Result]:
    results = find(model)
    emitter = _Emitter(model)
    for match in _matches(results):
        emitter.replace(match)
    return results


class _Emitter:
    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.tape = Tape()
        self.overloads: dict[tuple[str, bool], str] = {}
        self.stored: dict[tuple[ir.Value, str], ir.Value] = {}

    def replace(self, match: BlockFFNMatch) -> None:
        """Puts one node, and what has to stand around it, in the place of ``match.output``."""
        old: ir.Value = match.output.value.source
        node = old.producer()
        assert node is not None
        self.tape = Tape()
        new = self.layer(match)
        new.type, new.shape = old.type, old.shape
        for i, made in enumerate(self.tape.nodes):
            made.metadata_props.update(node.metadata_props)
            made.name = f"{node.name or match.name}.{i}.{made.op_type}"
        self.graph.insert_before(node, self.tape.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name, old.name = old.name, None
        new.name = name
        _remove_unused(self.graph, node)
        match.output.value.source = new  # for a layer that reads it

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes)

    def constant(self, value: Any) -> ir.Value:
        """Small integers as a node: initializers need a name of their own."""
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})

    def layer(self, match: BlockFFNMatch) -> ir.Value:
        """A value that equals ``match.output``."""
        x = self.matrix(match.x)
        scores, *rest = map(self.matrix, match.scores)
        for factor in rest:
            scores = self.op("Mul", scores, factor)
        dtype = match.scores[0].value.dtype
        if match.scale != 1:
            scale = ir.tensor(match.scale, dtype=_TYPES[dtype])
            scores = self.op("Mul", scores, self.tape.op("Constant", [], {"value": scale}))
        y = self.tape.op(
            NAME,
            [x, self.cast(scores, dtype, match.x.value.dtype), *self.weights(match)],
            {"act": match.spec.act},
            domain=DOMAIN,
            overload=self.overload(match),
        )
        output, perm = match.output.value, match.output.perm
        if len(output.shape) != 2:
            y = self.op("Reshape", y, self.sizes([output.shape[i] for i in perm], match))
        if perm != tuple(range(len(perm))):
            y = self.op("Transpose", y, perm=[perm.index(i) for i in range(len(perm))])
        return self.cast(y, match.x.value.dtype, output.dtype)

    def matrix(self, matrix: Matrix) -> ir.Value:
        value, shape = matrix.value.source, matrix.value.shape
        if matrix.perm != tuple(range(len(shape))):
            value = self.op("Transpose", value, perm=matrix.perm)
        if len(shape) != 2 or shape[matrix.perm[1]] != matrix.shape[1]:
            value = self.op("Reshape", value, self.constant(matrix.shape))
        return value

    def cast(self, value: ir.Value, dtype: str, wanted: str) -> ir.Value:
        return value if dtype == wanted else self.op("Cast", value, to=_TYPES[wanted])

    def sizes(self, sizes: list[Size], match: BlockFFNMatch) -> ir.Value:
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

    def weights(self, match: BlockFFNMatch) -> list[ir.Value]:
        """The weights as initializers [E, S, H]."""
        spec = match.spec
        sizes = {"e": spec.num_experts, "s": spec.expert_size, "h": spec.hidden_size}
        axes = (match.up_axes, match.down_axes, match.up_axes)
        return [
            self.expert_major(weight, stored, sizes)
            for weight, stored in zip(_weights(match), axes, strict=False)
        ]

    def expert_major(self, weight: Value, axes: str, sizes: dict[str, int]) -> ir.Value:
        source, tensor = weight.source, weight.attrs["tensor"]
        shape = ir.Shape([sizes[letter] for letter in "esh"])
        if axes == "e,s,h" and source.is_initializer() and tensor.shape == shape:
            return source
        if (source, axes) not in self.stored:
            name = f"{source.name}.esh"
            while name in self.graph.initializers:
                name += "_"
            value = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=shape,
                const_value=_expert_major(tensor, axes, sizes),
            )
            self.graph.register_initializer(value)
            self.stored[source, axes] = value
        return self.stored[source, axes]

    def overload(self, match: BlockFFNMatch) -> str:
        """Makes sure that the model has the function, and names it.

        A model whose layers are all of one kind, which is the rule, needs no overloads.
        """
        spec = match.spec
        kind = spec.act, spec.gated
        if kind not in self.overloads:
            functions = self.model.functions
            first = all((f.domain, f.name) != (DOMAIN, NAME) for f in functions.values())
            name = "" if first else f"gated_{spec.act}" if spec.gated else spec.act
            body = function(spec.act, spec.gated, _opset(self.model), name)
            functions.setdefault(body.identifier(), body)
            self.model.opset_imports[DOMAIN] = VERSION
            # Versions of the file format that brought functions, and overloads of them.
            self.model.ir_version = max(self.model.ir_version, 10 if name else 8)
            self.overloads[kind] = name
        return self.overloads[kind]


def _expert_major(tensor: ir.TensorProtocol, axes: str, sizes: dict[str, int]) -> ir.LazyTensor:
    """``tensor``, stored with ``axes``, as [E, S, H]; computed whenever it is read."""
    letters = axes.replace(",", "")
    perm = [letters.index(c) for c in "esh"]

    def compute() -> ir.Tensor:
        array = tensor.numpy().reshape([sizes[c] for c in letters]).transpose(perm)
        return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype)

    return ir.LazyTensor(compute, tensor.dtype, ir.Shape([sizes[c] for c in "esh"]))


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


# --- Verification ---------------------------------------------------------------------------------


def _verify(before: ir.Model, after: ir.Model, match: BlockFFNMatch) -> None:
    """Runs the layer as it stands and as it will be on the same random inputs.

    Raises:
        VerificationError: the results differ by too much.
    """
    output = match.output.value.source.name
    matrices = [m for m in (match.x, *match.scores) if m.value.op not in ("constant", "scalar")]
    sizes: dict[Size, int] = {}
    for size in match.x.value.shape:
        sizes.setdefault(size, size if isinstance(size, int) else 2 + len(sizes))
    generator = np.random.default_rng(0)
    inputs = {
        m.value.source.name: _random(m, match, sizes, m is not match.x, generator) for m in matrices
    }
    expected, actual = (
        _evaluate(model, inputs, output).astype(np.float64) for model in (before, after)
    )
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    check_error(match, float(error), "the model")


def _random(
    matrix: Matrix,
    match: BlockFFNMatch,
    sizes: dict[Size, int],
    scores: bool,
    generator: np.random.Generator,
) -> np.ndarray:
    """Elements for the value behind ``matrix``; half of the scores are zero."""
    tokens = 1
    for i in match.x.perm:
        tokens *= sizes[match.x.value.shape[i]]
    tokens //= match.x.shape[1]
    rows = 1 if matrix.shape[0] == 1 else tokens
    array = generator.standard_normal((rows, matrix.shape[1]))
    if scores:
        array = array.clip(min=0)
    shape = [matrix.value.shape[i] for i in matrix.perm]
    array = array.reshape([n if isinstance(n, int) else sizes.get(n, -1) for n in shape])
    array = array.transpose([matrix.perm.index(i) for i in range(len(shape))])
    return array.astype(_TYPES[matrix.value.dtype].numpy())


def _evaluate(model: ir.Model, inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    called = {node.op_identifier() for node in graph}  # the evaluator does not know overloads
    functions = [body for name, body in model.functions.items() if name in called]
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    ir.external_data.load_to_model(part)
    result: Any
    (result,) = ReferenceEvaluator(ir.serde.serialize_model(part)).run(None, inputs)
    return result
