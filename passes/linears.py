"""Linear layers of few tokens, rewritten to ``blockffn::linear``.

Products that read the same tokens become one call.  The rewrite is asked for (option ``linears``
of the backend) because the kernels keep a packed copy of each weight.

The kernels give a token the same bits whatever the token count.  So that the rest of the graph
does too, values of low precision that are used more than once are rounded to it exactly once:
left to itself, Inductor keeps some of them in fp32, and which ones depends on the shapes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from blockffn_compile.layer import CHUNK_TOKENS
from blockffn_compile.passes.emitter import Emitter

log = logging.getLogger("blockffn_compile")
aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def rewrite(graph: fx.Graph) -> int:
    """Replaces products ``x @ w.T`` with graph inputs ``w``, in place; returns how many.

    ``torch.ops.blockffn.linear`` must be registered (``import blockffn_compile.step_ops``).

    Args:
        graph: ATen graph without gradients, with the (fake) tensor of every node in
            ``meta["val"]``.
    """
    groups: dict[tuple[fx.Node, torch.Size], list[tuple[fx.Node, fx.Node]]] = {}
    for node in graph.nodes:
        if (weight := _weight(node)) is not None:
            x: Any = node.args[0]
            groups.setdefault((_base(x), x.meta["val"].shape), []).append((node, weight))
    for products in groups.values():
        _replace(graph, products)
    if groups:
        graph.eliminate_dead_code()
        _round_shared(graph)
        graph.lint()
    count = sum(map(len, groups.values()))
    log.info("%d linear layers rewritten to %d calls", count, len(groups))
    return count


def _round_shared(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if (
            len(node.users) > 1
            and isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.pointwise in node.target.tags
            and value.dtype in (torch.bfloat16, torch.float16)
        ):
            users = list(node.users)
            with graph.inserting_after(node):
                rounded = graph.call_function(torch.ops.blockffn.materialize.default, (node,))
            rounded.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, rounded)


def _weight(node: fx.Node) -> fx.Node | None:
    """The weight [N, K] of a product with few tokens on a CPU, which must be a graph input."""
    if node.target is not aten.mm.default:
        return None
    args: Any = node.args
    x, transposed = args
    tokens = x.meta["val"].shape[0]
    if not isinstance(tokens, int) or tokens > CHUNK_TOKENS or x.meta["val"].device.type != "cpu":
        return None
    if transposed.target is aten.permute.default and list(transposed.args[1]) == [1, 0]:
        weight = transposed.args[0]
        return weight if weight.op == "placeholder" else None
    return None


def _base(node: Any) -> fx.Node:
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _replace(graph: fx.Graph, products: list[tuple[fx.Node, fx.Node]]) -> None:
    """One call for products of the same tokens, at the place of the first."""
    first = products[0][0]
    weights = [weight for _, weight in products]
    new = Emitter(graph, first)
    with graph.inserting_before(first):
        joined = new.call(torch.ops.blockffn.linear.default, first.args[0], weights)
        start = 0
        for product, weight in products:
            end = start + weight.meta["val"].shape[0]
            part = joined
            if len(products) > 1:
                part = new.call(aten.slice.Tensor, joined, 1, start, end)
            product.replace_all_uses_with(part)
            start = end
