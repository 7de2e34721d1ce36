"""What the backend does with a model, layer by layer, told without compiling it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NoReturn
from unittest.mock import patch

from torch import fx
from torch._dynamo import pgo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import fullgraph_capture, get_traced_fn
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import TracingContext, tracing
from torch._inductor.decomposition import select_decomp_table

from blockffn_compile.layer import BlockFFNSpec
from blockffn_compile.passes.fx import find
from blockffn_compile.passes.recognizer import BlockFFNMatch, Result


@dataclass(frozen=True)
class Layer:
    """One BlockFFN layer, or one that looks like it.

    Attributes:
        name: path of its module, or ``layer N``.
        status: whether the backend rewrites it.
        reason: why not; empty for a rewritten layer.
        spec: what it computes; None for a declined layer.
        router: what makes the scores of a rewritten layer sparse, and their norm.
    """

    name: str
    status: Literal["rewritten", "declined"]
    reason: str = ""
    spec: BlockFFNSpec | None = None
    router: str = ""

    @property
    def description(self) -> str:
        """What it computes, or why it is left alone, in one line."""
        if self.spec is None:
            return self.reason
        s = self.spec
        act = f"gated {s.act}" if s.gated else s.act
        size = f"{s.num_experts} experts of {s.expert_size}, hidden {s.hidden_size}"
        return f"{size}, {act}, {s.layout}, scores: {self.router}"


@dataclass(frozen=True)
class Report:
    """All layers of a model; ``str()`` is a table."""

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no BlockFFN layers"
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{la.name:{width}}  {la.status:9}  {la.description}" for la in self.layers]
        rewritten = sum(layer.status == "rewritten" for layer in self.layers)
        return "\n".join([*lines, f"{rewritten} of {len(self.layers)} layers rewritten"])


def explain(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Report:
    """Which layers of ``model`` the backend rewrites, and why not the others.

    Traces the model exactly as ``torch.compile`` does, with the gradient mode that is on now, and
    runs the recogniser.  Nothing is executed or compiled: caches that the model would write stay
    as they are, and so do the caches and the shape statistics of ``torch.compile``.

    Args:
        model: a module or function without graph breaks.
        *inputs: example inputs.
        **kwargs: example keyword inputs.

    Returns:
        One entry per layer, in the order of the graph.

    Raises:
        torch._dynamo.exc.Unsupported: the model has a graph break; the message says where.
    """
    return Report(tuple(map(_layer, find(_trace(model, inputs, kwargs)))))


def _layer(result: Result) -> Layer:
    if isinstance(result, BlockFFNMatch):
        return Layer(result.name, "rewritten", spec=result.spec, router=result.router)
    return Layer(result.name, "declined", result.reason)


class _Traced(Exception):  # noqa: N818  (control flow: it ends a compilation that is not wanted)
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph


def _trace(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """The graph that Inductor's first pass over the whole graph sees."""

    def stop(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Traced(gm.graph)

    # Dynamo's own entry point for tracers: unlike torch.compile it adds nothing to the function's
    # compiled code.  Still it remembers shapes, to make those dynamic that change, and puts
    # names among the globals of the function.
    names = get_traced_fn(model)[0].__globals__
    known = set(names)
    with (
        patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
        get_metrics_context(),
        dynamo_timed("blockffn_compile.explain"),
    ):
        captured = fullgraph_capture(model, args, kwargs).backend_input
    for name in set(names) - known:
        del names[name]
    if captured is None:
        return fx.Graph()  # no tensor is computed
    context = TracingContext(captured.fake_mode)
    context.tensor_to_context = captured.tensor_to_context
    compiler = aot_autograd(
        fw_compiler=stop,
        inference_compiler=stop,
        partition_fn=stop,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    try:
        with tracing(context):
            compiler(captured.graph_module, captured.example_inputs)
    except _Traced as traced:
        return traced.graph
    raise AssertionError("AOTAutograd called none of its compilers")


class _Module(ModuleType):
    """Importing this module binds it to ``blockffn_compile.explain``, the name of the function:
    so the module can be called, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
