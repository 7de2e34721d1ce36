"""What was rewritten, what was declined and why: the same report for every graph language."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from blockffn_compile.layer import BlockFFNSpec
from blockffn_compile.passes.recognizer import BlockFFNMatch, Result
from blockffn_compile.passes.verification import QuantisedMatch


@dataclass(frozen=True)
class Layer:
    """One BlockFFN layer, or one that looks like it.

    Attributes:
        name: path of its module, or ``layer N``.
        status: whether it is rewritten.
        reason: why not; empty for a rewritten layer.
        spec: what it computes; None for a declined layer.
        router: what makes the scores of a rewritten layer sparse, and their norm.
        weights: type of the weights, if the rewrite quantised them.
        error: what that costs; see :class:`~blockffn_compile.passes.verification.QuantisedMatch`.
    """

    name: str
    status: Literal["rewritten", "declined"]
    reason: str = ""
    spec: BlockFFNSpec | None = None
    router: str = ""
    weights: str = ""
    error: float = 0.0

    @property
    def description(self) -> str:
        """What it computes, or why it is left alone, in one line."""
        if self.spec is None:
            return self.reason
        s = self.spec
        act = f"gated {s.act}" if s.gated else s.act
        size = f"{s.num_experts} experts of {s.expert_size}, hidden {s.hidden_size}"
        text = f"{size}, {act}, {s.layout}, scores: {self.router}"
        return f"{text}, {self.weights}: error {self.error:.1%}" if self.weights else text


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


def report(results: Iterable[Result]) -> Report:
    """The report of a pass."""
    return Report(tuple(map(_layer, results)))


def _layer(result: Result) -> Layer:
    if isinstance(result, BlockFFNMatch):
        layer = Layer(result.name, "rewritten", spec=result.spec, router=result.router)
        if not isinstance(result, QuantisedMatch):
            return layer
        return dataclasses.replace(layer, weights=result.weights, error=result.error)
    return Layer(result.name, "declined", result.reason)
