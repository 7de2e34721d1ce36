"""Quantised weights in FX graphs: results of ``blockffn::dequantize``, which kernels do without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx


def is_quantised(node: fx.Node) -> bool:
    """Whether a node stands for integers and scales that the graph is given."""
    # By name: the operator need not be registered where there are no quantised weights.
    return str(node.target) == "blockffn.dequantize.default" and all(
        operand.op in ("placeholder", "get_attr") for operand in node.all_input_nodes
    )


def alike(weights: Iterable[fx.Node]) -> bool:
    """Whether all are quantised, in one way."""
    weights = list(weights)
    return all(map(is_quantised, weights)) and len(set(map(quantisation, weights))) == 1


def quantisation(weight: fx.Node) -> tuple[Any, int]:
    """Type of a weight's integers, and weights to a scale."""
    values, scales = (operand.meta["val"] for operand in weight.all_input_nodes)
    return values.dtype, weight.meta["val"].numel() // scales.numel()


def stored(weights: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Their integers and their scales."""
    pairs = [weight.all_input_nodes for weight in weights]
    return [values for values, _ in pairs], [scales for _, scales in pairs]
