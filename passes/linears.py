"""Linear layers of few tokens, rewritten to ``blockffn::linear``.

Products that read the same tokens become one call.  The rewrite is asked for (option ``linears``
of the backend) because the kernels keep a packed copy of each weight; where weights are quantised
it is made unasked, and for any number of tokens.

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
from blockffn_compile.passes.aten import size_token
from blockffn_compile.passes.emitter import Emitter
from blockffn_compile.passes.quantised import is_quantised, quantisation, stored

log = logging.getLogger("blockffn_compile")
aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def rewrite(graph: fx.Graph, *, quantised_only: bool = False) -> int:
    """Replaces products ``x @ w.T`` with graph inputs ``w``, in place; returns how many.

    ``torch.ops.blockffn.linear`` must be registered (``import blockffn_compile.step_ops``).

    Args:
        graph: ATen graph without gradients, with the (fake) tensor of every node in
            ``meta["val"]``.
        quantised_only: leaves other weights alone.
    """
    _split_biases(graph)
    groups: dict[Any, list[tuple[fx.Node, fx.Node]]] = {}
    for node in graph.nodes:
        if (weight := _weight(node, quantised_only)) is not None:
            x: Any = node.args[0]
            kind = quantisation(weight) if is_quantised(weight) else None
            key = (_base(x), *map(size_token, x.meta["val"].shape), kind)
            groups.setdefault(key, []).append((node, weight))
    for products in groups.values():
        _replace(graph, products)
    if groups:
        graph.eliminate_dead_code()
        if not quantised_only:
            _round_shared(graph)
        graph.lint()
    count = sum(map(len, groups.values()))
    if groups or not quantised_only:
        log.info("%d linear layers rewritten to %d calls", count, len(groups))
    return count


def _split_biases(graph: fx.Graph) -> None:
    """``bias + x @ w.T`` as a product and a sum, where ``w`` is quantised."""
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, x, transposed = node.args
        weight = _transposed(transposed)
        if not node.kwargs and weight is not None and is_quantised(weight):
            new = Emitter(graph, node)
            with graph.inserting_before(node):
                product = new.call(aten.mm.default, x, transposed)
                node.replace_all_uses_with(new.call(aten.add.Tensor, product, bias))
            graph.erase_node(node)


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


def _weight(node: fx.Node, quantised_only: bool) -> fx.Node | None:
    """The weight [N, K] of a product on a CPU: quantised, or a graph input and few tokens."""
    if node.target is not aten.mm.default:
        return None
    args: Any = node.args
    x, transposed = args
    tokens, device = x.meta["val"].shape[0], x.meta["val"].device.type
    if device != "cpu" or (weight := _transposed(transposed)) is None:
        return None
    if is_quantised(weight):
        # What is joined goes to the place of the first: only inputs are certain to be there.
        return weight if all(n.op == "placeholder" for n in weight.all_input_nodes) else None
    few = isinstance(tokens, int) and tokens <= CHUNK_TOKENS
    return weight if few and weight.op == "placeholder" and not quantised_only else None


def _transposed(node: fx.Node) -> fx.Node | None:
    """The matrix of which this is the transpose."""
    args: Any = node.args
    if node.target is aten.permute.default and list(args[1]) == [1, 0]:
        matrix: fx.Node = args[0]
        return matrix
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
        stores = stored(weights) if is_quantised(weights[0]) else (weights,)
        joined = new.call(torch.ops.blockffn.linear.default, first.args[0], *stores)
        start = 0
        for product, weight in products:
            end = start + weight.meta["val"].shape[0]
            part = joined
            if len(products) > 1:
                part = new.call(aten.slice.Tensor, joined, 1, start, end)
            product.replace_all_uses_with(part)
            start = end
