"""The Relax adapter: rewrites BlockFFN layers and linear layers to calls of TIR kernels.

:class:`BlockFFNPass` is a ``tvm.transform.ModulePass`` for any pipeline; it runs before operators
are legalised.  The kernels themselves come from outside, see :class:`Kernels`.

Kernels read weights as panels.  A weight that is a constant of the module is packed on the spot.
One that is a parameter of its function (index ``num_input`` or higher, the attribute that the
importers set) is replaced by a new parameter, which takes the panels: :class:`Panels` says of what.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax
from tvm.sym import Analyzer

from blockffn_compile.layer import CHUNK_TOKENS
from blockffn_compile.passes.recognizer import DTYPES, BlockFFNMatch, Declined, Result, recognise
from blockffn_compile.passes.relax_emit import (
    Emit,
    Kernels,
    NewParams,
    Panels,
    Product,
    Rewriter,
    joined,
    layer,
    product,
    row_sizes,
)
from blockffn_compile.passes.relax_ops import lower
from blockffn_compile.passes.verification import log_results
from blockffn_compile.passes.view import Value, strip

log = logging.getLogger("blockffn_compile")

TOKENS = (
    f"it may have more than {CHUNK_TOKENS} tokens; bound their number with the function's "
    "attribute tir_var_upper_bound"
)
INPUTS = (
    "its weights are inputs of the function; make them parameters (attribute num_input) or "
    "constants of the module"
)
WRITES = "tensors are written in place that it reads"


@dataclass(frozen=True)
class Rewritten:
    """What :func:`rewrite` did to a function.

    Attributes:
        layers: a match for every layer rewritten, a refusal for every near miss.
        linears: how many linear layers became calls.
        panels: the new parameters, by name.
    """

    layers: tuple[Result, ...]
    linears: int
    panels: dict[str, Panels]


def find(function: relax.Function) -> list[Result]:
    """BlockFFN layers and near misses, in the order of the function."""
    return _find(_Function(function, inputs=0))


def rewrite(
    mod: tvm.IRModule, name: str, kernels: Kernels, *, linears: bool = True
) -> tuple[tvm.IRModule, Rewritten]:
    """Rewrites one function of a module.

    Args:
        mod: its functions in A-normal form, as importers and parsers make them.
        name: of the function.
        kernels: what to call.
        linears: rewrite linear layers too, several of the same input to one call.

    Returns:
        A new module, and what was done.  Parameters that only panels are made of are gone; the
        panels are the last parameters.

    Raises:
        ValueError: the function's parameters are bound to it.
    """
    attrs = mod[name].attrs or {}
    if "params" in attrs:
        raise ValueError(f"{name} holds its parameters; detach them: relax.frontend.detach_params")
    # Whoever calls a function knows its parameters.
    callers = (f for f in mod.functions.values() if isinstance(f, relax.Function))
    called = {var.name_hint for f in callers for var in relax.analysis.all_global_vars(f)}
    inputs = len(mod[name].params) if name in called else int(attrs.get("num_input", 10**9))

    function = _Function(mod[name], inputs)
    results = _find(function)
    log_results(results)
    panels: NewParams = {}
    emits = {m.output.value.source: layer(m) for m in results if isinstance(m, BlockFFNMatch)}
    mod = _replace(mod, name, emits, kernels, panels)
    groups = _products(_Function(mod[name], inputs), kernels) if linears else {}
    emits = {
        var: emit
        for (*_, quantisation), group in groups.items()
        for var, emit in joined(group, quantisation).items()
    }
    mod = _replace(mod, name, emits, kernels, panels)
    count = sum(map(len, groups.values()))
    log.info("%s: %d linear layers rewritten to %d calls", name, count, len(groups))
    _drop_packed(mod, name, panels)
    return mod, Rewritten(tuple(results), count, {var.name: p for p, var in panels.items()})


@tvm.transform.module_pass(opt_level=0, name="BlockFFN")
class BlockFFNPass:
    """:func:`rewrite` of every Relax function of a module.

    Attributes:
        rewritten: what was done to each function, by its name.
    """

    def __init__(self, kernels: Kernels, *, linears: bool = True) -> None:
        self.kernels, self.linears = kernels, linears
        self.rewritten: dict[str, Rewritten] = {}

    def transform_module(self, mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        """A new module."""
        names = [v.name_hint for v, f in mod.functions.items() if isinstance(f, relax.Function)]
        for name in names:
            mod, done = rewrite(mod, name, self.kernels, linears=self.linears)
            self.rewritten[name] = done
        return mod


# --- What can be rewritten ------------------------------------------------------------------------


class _Function:
    """The view of a function, and what is known of its parameters and sizes.

    Attributes:
        values: operands before users.
        inputs: parameters that callers give anew each time.
        written: variables that calls write to in place.
    """

    def __init__(self, function: relax.Function, inputs: int) -> None:
        self.values = lower(function)
        self.inputs = set(list(function.params)[:inputs])
        self.written: set[relax.Var] = set()
        for block in function.body.blocks:
            for binding in block.bindings:
                call = binding.value
                if isinstance(call, relax.Call) and call.op == _INPLACE:
                    indices = (int(i) for i in call.attrs.inplace_indices)
                    self.written.update(call.args[1].fields[i] for i in indices if i >= 0)
        self.analyzer = Analyzer()
        bounds = (function.attrs or {}).get("tir_var_upper_bound", {})
        for var in relax.analysis.defined_symbolic_vars(function):
            if var.name in bounds:
                self.analyzer.bind(var, ir.Range(0, int(bounds[var.name]) + 1))

    def few(self, sizes: Sequence[Any]) -> bool:
        """Whether the product of sizes is at most CHUNK_TOKENS."""
        return bool(self.analyzer.can_prove(product(sizes) <= CHUNK_TOKENS))

    def is_weight(self, value: Value) -> bool:
        return value.op == "constant" or (value.op == "input" and value.source not in self.inputs)


_INPLACE = ir.Op.get("relax.call_tir_inplace")


def _find(function: _Function) -> list[Result]:
    results = recognise(function.values)
    for i, result in enumerate(results):
        if isinstance(result, Declined):
            continue
        reason = None
        weights = (result.w_up, result.w_down, result.w_gate)
        if not all(function.is_weight(w) for w in weights if w is not None):
            reason = INPUTS
        elif not function.few(row_sizes(result.x)):
            reason = TOKENS
        elif any(value.source in function.written for value in result.operands):
            reason = WRITES
        if reason is not None:
            results[i] = Declined(result.name, reason)
    return results


def _products(function: _Function, kernels: Kernels) -> dict[tuple[Any, ...], list[Product]]:
    """Linear layers that a kernel can run, those of the same tokens together.

    The last part of a key says how to quantise their weights.
    """
    groups: dict[tuple[Any, ...], list[Product]] = {}
    for value in function.values:
        found = _as_product(value) if value.op == "matmul" else None
        if (
            found is not None
            and function.is_weight(found.weight)
            and found.x.source not in function.written
            and function.few(list(found.x.source.ty.shape.values)[:-1])
        ):
            base, op = strip(found.x, frozenset({"reshape"})), found.weight.op
            name = found.weight.source.name if op == "input" else ""
            quantisation = kernels.quantisation(name, int(found.x.source.ty.shape.values[-1]))
            groups.setdefault((base, found.x.shape, op, quantisation), []).append(found)
    return groups


def _as_product(value: Value) -> Product | None:
    x, weight = value.inputs
    axes = "k,en"
    if weight.op == "permute":
        axes, (weight,) = "en,k", weight.inputs
    if weight.op not in ("input", "constant") or x.source is None or value.source is None:
        return None
    if len(weight.shape) != 2 or not all(isinstance(size, int) for size in weight.shape):
        return None
    if value.dtype != x.dtype:  # summed in another type, then rounded
        if [user.op for user in value.users] != ["cast"]:
            return None
        (value,) = value.users
    same = value.dtype == x.dtype == weight.dtype and x.dtype in DTYPES
    return Product(value, x, weight, axes) if same else None


# --- Replacing ------------------------------------------------------------------------------------


def _replace(
    mod: tvm.IRModule,
    name: str,
    emits: Mapping[relax.Var, Emit],
    kernels: Kernels,
    panels: NewParams,
) -> tvm.IRModule:
    """Computes variables in other ways, and drops what is not used then."""
    rewriter = Rewriter(mod, emits, kernels, panels)
    function = rewriter.visit_expr(mod[name])
    mod = rewriter.builder_.get()
    params = list(function.params)
    mod[name] = _with_params(
        function, [*params, *(var for var in panels.values() if var not in params)]
    )
    return relax.transform.DeadCodeElimination([name])(mod)


def _with_params(function: relax.Function, params: Sequence[relax.Var]) -> relax.Function:
    return relax.Function(params, function.body, function.ret_ty, function.is_pure, function.attrs)


def _drop_packed(mod: tvm.IRModule, name: str, panels: NewParams) -> None:
    """Removes parameters that only panels are made of."""
    function = mod[name]
    used = set(relax.analysis.free_vars(function.body))
    packed = {weight.name for p in panels for weight in p.weights}
    params = [v for v in function.params if v in used or v.name not in packed]
    mod[name] = _with_params(function, params)
