"""New nodes of an ATen graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

#: What a new node takes over from the one it replaces: where it came from in the model.
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "original_aten", "seq_nr")


class Emitter:
    """Writes nodes with ``meta["val"]``, and the origin of ``like``, at the insertion point."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph = graph
        self.origin = {k: v for k, v in like.meta.items() if k in _ORIGIN}

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call of an operator; its fake result is computed from those of its arguments."""
        node = self.graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        mode = next((v.fake_mode for v in tree_leaves(values) if isinstance(v, FakeTensor)), None)

        def fake(value: Any) -> Any:
            # A constant of the graph's module may come with itself instead of a fake tensor.
            if mode is None or isinstance(value, FakeTensor) or not isinstance(value, Tensor):
                return value
            return mode.from_tensor(value, static_shapes=True)

        values = tree_map(fake, values)
        with mode or nullcontext():
            node.meta = {**self.origin, "val": target(*values)}
        return node
