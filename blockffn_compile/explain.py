"""What the backend does with a model, layer by layer, told without compiling it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

from torch import fx
from torch._dynamo import pgo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import fullgraph_capture, get_traced_fn
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import TracingContext, tracing
from torch._inductor.decomposition import select_decomp_table

from blockffn_compile.passes.fx import find
from blockffn_compile.report import Report, report


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
    return report(find(_trace(model, inputs, kwargs)))


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
