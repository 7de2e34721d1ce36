"""``torch.compile(model, backend="blockffn")``: BlockFFN layers fused, all the rest by Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import get_custom_graph_passes

import blockffn_compile.lowering
import blockffn_compile.ops  # noqa: F401  (registers the operation of the rewrite)
from blockffn_compile.passes.fx import BlockFFNGraphPass


def blockffn(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles a graph that Dynamo captured.

    The rewrite runs as the first of Inductor's passes over the whole graph, after AOTAutograd.
    Graphs that need gradients stay as they are.  Inductor's caches know the rewrite by the hash
    of its sources.

    Args:
        gm: the graph; taken over.
        example_inputs: its inputs, real or fake.
        mode: as for Inductor (``default``, ``max-autotune-no-cudagraphs``, ...).
        options: ``verify`` (bool): run both sides of every rewrite on random inputs and raise if
            they differ.  ``dump_graph`` (str): directory for every graph before and after.
            ``linears`` (bool): run linear layers of up to 64 tokens on our kernels too; they keep
            a packed copy of each weight.  All others are Inductor's own.

    Returns:
        The compiled graph, a callable.

    Raises:
        RuntimeError: an option that neither this backend nor Inductor knows.
        VerificationError: ``verify`` found a difference.
    """
    options = dict(options or {})
    own = {
        name: options.pop(name) for name in ("verify", "dump_graph", "linears") if name in options
    }
    # The object behind backend="inductor": it checks options and knows the modes.
    wrapper: Any = torch._TorchCompileInductorWrapper
    patches = wrapper(mode, options, dynamic=None).config
    others = patches.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    passes = [BlockFFNGraphPass(**own), *get_custom_graph_passes(others)]
    return compile_fx(
        gm, example_inputs, config_patches={**patches, "joint_custom_pre_pass": passes}
    )
