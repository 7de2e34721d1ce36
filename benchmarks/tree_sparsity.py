"""Experts in the union of draft trees, and whether preferring those already in it would help.

Run: ``python -m benchmarks.tree_sparsity``, 2 minutes.  The bundled model's head drafts trees of 64
nodes for held-out code; the model says which experts each node uses.  Smaller trees are then
grown from them, node by node: the most probable next, or, among all that are nearly as probable,
the one that adds the fewest experts.  That knows the experts beforehand, which no drafter can: it
bounds what any prediction of them could save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.scale import Recorder
from benchmarks.speculative import prompts, write
from blockffn_compile.engines.engine import Output
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.layer import BlockFFN
from blockffn_compile.models import bundled_path
from blockffn_compile.models.cache import TreeStep
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.models.eagle import load_eagle
from blockffn_compile.speculative.generator import Generator
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import DraftTree

#: A node is nearly as probable as the best one from this share of its probability on.
SHARES = (1.0, 0.9, 0.8, 0.5)
SIZES = (1, 4, 8, 16, 32)


class Observer:
    """Verifies as the engine does, and runs every fourth tree once more to see its experts."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.verify = engine, engine.verify
        self.active: NDArray[np.bool_] | None = None  # [layers, 64, E] of the last tree
        self._calls, self._scores = 0, list[NDArray[np.bool_]]()
        for module in engine.model.modules():
            if isinstance(module, BlockFFN):
                module.router_proj.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._scores.append((logits.flatten(0, -2) > 0).numpy())

    def __call__(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        outputs, self.active = self.verify(trees), None
        self._calls += 1
        if self._calls % 4 == 0 and len(trees[0]) == 64:
            self._scores.clear()
            places = self.engine._texts.verify(trees, 64)
            tokens, positions, *rest = torch.tensor([list(values) for values in places])
            with torch.no_grad():
                step = TreeStep(self.engine.cache, *rest)
                self.engine.model.model(tokens[None], positions, step)
            self.active = np.stack(self._scores)
        return outputs


def grow(
    tree: DraftTree, nodes: int, active: NDArray[np.bool_], share: float
) -> tuple[set[int], float]:
    """The chosen nodes, and the density of their union of experts."""
    probs = np.exp(tree.log_probs)
    chosen, union, ready = {0}, active[:, 0].copy(), set(tree.children(0).values())
    while len(chosen) < nodes and ready:
        least = share * max(probs[node] for node in ready)
        near = [node for node in ready if probs[node] >= least]
        node = min(near, key=lambda n: ((active[:, n] & ~union).sum(), -probs[n]))
        chosen.add(node)
        union |= active[:, node]
        ready.remove(node)
        ready.update(tree.children(node).values())
    return chosen, float(union.mean())


def main() -> None:
    model = load_model(bundled_path(), dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    head = load_eagle(bundled_path() / "drafter", model)
    generator = Generator(model, "eagle", head=head, max_length=400)
    observer = Observer(generator.engine)
    generator.engine.verify = observer  # type: ignore[method-assign]
    seen: list[tuple[DraftTree, list[int], NDArray[np.bool_]]] = []

    class Seeing(Recorder):
        def update(self, choice: Any, tree: DraftTree, path: Sequence[int], *ms: Any) -> None:
            if observer.active is not None:
                seen.append((tree, list(path), observer.active))

    generator._policies[1] = Seeing()
    for text in prompts(tokenizer)["code, greedy"]:
        write({"eagle": generator}, text, Sampler(0.77, seed=0))

    table = Table("nodes", "among nodes of at least", "experts in the union", "tokens a step",
                  title=f"{len(seen)} trees of the bundled head, held-out code")  # fmt: skip
    for nodes in SIZES:
        for share in SHARES if nodes > 1 else (1.0,):
            grown = [grow(tree, nodes, active, share) for tree, _, active in seen]
            union = np.mean([density for _, density in grown])
            accepted = [
                next((i for i, node in enumerate(path) if node not in chosen), len(path))
                for (chosen, _), (_, path, _) in zip(grown, seen, strict=True)
            ]
            table.add_row(str(nodes), f"{share:.0%} of the best", f"{union:.1%}",
                          f"{np.mean(accepted):.2f}")  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
