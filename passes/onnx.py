"""The ONNX adapter: rewrites BlockFFN layers to ``com.blockffn::ChunkSparseFFN``.

Two forms, one rewrite: :func:`rewrite` for a model of onnx-ir, :class:`BlockFFNPass` for its pass
pipelines.  Models of any exporter will do: weights may be stored in any orientation, folded or
not, and operators fused or spelled out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from blockffn_compile.layer import Scheme
from blockffn_compile.passes import onnx_contrib
from blockffn_compile.passes.onnx_contrib import ContribEmitter
from blockffn_compile.passes.onnx_emit import DTYPES, Emitter, opset
from blockffn_compile.passes.onnx_function import MIN_OPSET, FunctionEmitter
from blockffn_compile.passes.onnx_nested import nested
from blockffn_compile.passes.onnx_ops import lower
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, Matrix, Result, recognise
from blockffn_compile.passes.signs import column_signs
from blockffn_compile.passes.verification import (
    SIZES,
    QuantisedMatch,
    check_error,
    log_results,
    placeable,
)
from blockffn_compile.passes.view import Size

#: What a layer becomes.  ``portable``: a node of our operator, with a function body that any
#: runtime can run; ``contrib``: the operators of ONNX Runtime for mixtures of experts.
Flavour = Literal["portable", "contrib"]

INPUTS = "weights are inputs of the graph; store them as initializers"


def find(model: ir.Model) -> list[Result]:
    """BlockFFN layers and near misses of the main graph, in its order; then layers elsewhere,
    which are declined."""
    results = recognise(lower(model))
    version = opset(model)
    for i, result in enumerate(results):
        if isinstance(result, Declined):
            continue
        stored = (result.w_up, result.w_down, result.w_gate)
        if version < MIN_OPSET:
            reason = (
                f"the model uses operator set {version}; convert it to {MIN_OPSET} or newer, "
                "for example with onnx.version_converter"
            )
            results[i] = Declined(result.name, reason)
        elif any(weight is not None and weight.op != "constant" for weight in stored):
            results[i] = Declined(result.name, INPUTS)
        elif not placeable(result):
            results[i] = Declined(result.name, SIZES)
    return [*results, *nested(model)]


def rewrite(
    model: ir.Model,
    *,
    flavour: Flavour = "portable",
    quantize: Scheme | None = None,
    verify: bool = False,
) -> list[Result]:
    """Replaces every BlockFFN layer of the main graph, in place.

    Inputs and outputs of the graph keep their names and order, and whatever is not of a layer stays
    as it is.

    Args:
        model: weights may be external; they are read when the model is saved.
        flavour: what a layer becomes.
        quantize: type of the weights, for ``contrib``; the results say what it costs.
        verify: run both sides of every rewrite on random inputs, and compare: with ONNX's reference
            evaluator, or with ONNX Runtime, whose ``contrib`` operators are.

    Returns:
        A :class:`BlockFFNMatch` for every layer rewritten, a :class:`Declined` with the reason for
        every near miss, in the order of the graph.  Layers with quantised weights are
        :class:`QuantisedMatch`.

    Raises:
        ValueError: an unknown flavour or type of weights.
        VerificationError: the two sides differ; the message names the layer and the error.
    """
    check_options(flavour, quantize)

    def emitter(model: ir.Model) -> Emitter:
        if flavour == "contrib":
            return ContribEmitter(model, quantize)
        return FunctionEmitter(model)

    errors = {}
    if verify or quantize:
        trial = model.clone()
        for match in _matches(_apply(trial, emitter(trial))):
            errors[match.name] = _error(model, trial, match)
            if not quantize:
                check_error(match, errors[match.name], "the model")
    results = _apply(model, emitter(model))
    if quantize:
        for i, result in enumerate(results):
            if isinstance(result, BlockFFNMatch):
                fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
                results[i] = QuantisedMatch(**fields, weights=quantize, error=errors[result.name])
    log_results(results)
    return results


def check_options(flavour: str, quantize: str | None) -> None:
    """Refuses what :func:`rewrite` does not know.

    Raises:
        ValueError: the message names the option and what it may be.
    """
    options = (("flavour", flavour, Flavour), ("quantize", quantize or "int8", Scheme))
    for name, value, kind in options:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}; choose {' or '.join(get_args(kind))}")
    if quantize and flavour != "contrib":
        raise ValueError(f"flavour {flavour!r} has no quantised weights; choose 'contrib'")


class BlockFFNPass(ir.passes.InPlacePass):
    """:func:`rewrite` for pass pipelines of onnx-ir, with its options.

    Attributes:
        results: of all models so far.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.results: list[Result] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        results = rewrite(model, **self.options)
        self.results += results
        return ir.passes.PassResult(model, any(_matches(results)))


def _matches(results: list[Result]) -> Iterator[BlockFFNMatch]:
    return (result for result in results if isinstance(result, BlockFFNMatch))


def _apply(model: ir.Model, emitter: Emitter) -> list[Result]:
    results = find(model)
    for i, result in enumerate(results):
        if isinstance(result, BlockFFNMatch):
            reason = emitter.refusal(result)
            if reason is None:
                emitter.replace(result)
            else:
                results[i] = Declined(result.name, reason)
    return results


# --- Verification ---------------------------------------------------------------------------------


def _error(before: ir.Model, after: ir.Model, match: BlockFFNMatch) -> float:
    """Runs the layer as it stands and as it will be on the same random inputs.

    Returns:
        The largest error, relative to the largest output.
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
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _random(
    matrix: Matrix,
    match: BlockFFNMatch,
    sizes: dict[Size, int],
    scores: bool,
    generator: np.random.Generator,
) -> np.ndarray:
    """Elements for the value behind ``matrix``; half of the scores are zero, and the others have
    the sign that they always have."""
    tokens = 1
    for i in match.x.perm:
        tokens *= sizes[match.x.value.shape[i]]
    tokens //= match.x.shape[1]
    rows = 1 if matrix.shape[0] == 1 else tokens
    array = generator.standard_normal((rows, matrix.shape[1]))
    if scores:
        sign = column_signs(matrix)
        array = array.clip(min=0) * (1 if sign is None else sign)
    shape = [matrix.value.shape[i] for i in matrix.perm]
    array = array.reshape([n if isinstance(n, int) else sizes.get(n, -1) for n in shape])
    array = array.transpose([matrix.perm.index(i) for i in range(len(shape))])
    return array.astype(DTYPES[matrix.value.dtype].numpy())


def _evaluate(model: ir.Model, inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    for value in graph.inputs:  # which the model need not say of values in its middle
        array = inputs[value.name or ""]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape(array.shape)
    called = {node.op_identifier() for node in graph}  # the evaluator does not know overloads
    functions = [body for name, body in model.functions.items() if name in called]
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    ir.external_data.load_to_model(part)
    proto = ir.serde.serialize_model(part)
    result: Any
    if any(domain == onnx_contrib.DOMAIN for domain, _, _ in called):
        from onnxruntime import InferenceSession

        (result,) = InferenceSession(proto.SerializeToString()).run(None, inputs)
    else:
        (result,) = ReferenceEvaluator(proto).run(None, inputs)
    return result
