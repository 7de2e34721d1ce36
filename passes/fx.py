"""The FX adapter: rewrites BlockFFN layers of ATen graphs to ``blockffn::chunk_sparse_ffn``.

Three forms, one rewrite: :func:`rewrite` for a graph, :class:`BlockFFNPass` for pass managers of
``torch.fx``, :class:`BlockFFNGraphPass` for ``torch._inductor.config.joint_custom_pre_pass``.

The graphs may be decomposed by Inductor's table or not at all: the recogniser knows SiLU and GELU
in both spellings.  So Inductor traces with its stock table, and a graph without a BlockFFN layer
compiles exactly as it does without this pass.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from blockffn_compile.passes import linears
from blockffn_compile.passes.aten import METADATA_ASSERTION, lower, size_token
from blockffn_compile.passes.emitter import Emitter
from blockffn_compile.passes.quantised import alike, is_quantised, quantisation, stored
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined, Matrix, Result, recognise
from blockffn_compile.passes.verification import SIZES, check_error, log_results, placeable
from blockffn_compile.passes.view import Size, Value, ancestors

aten = torch.ops.aten

GRADIENTS = "gradients are needed; run it under torch.no_grad() or torch.inference_mode()"
WRITES = "tensors are written in place before it; functionalise the graph first"


def find(graph: fx.Graph) -> list[Result]:
    """BlockFFN layers and near misses of an ATen graph, in its order.

    In a joint forward and backward graph every layer is declined.
    """
    nodes = list(graph.nodes)
    joint = any(_is_tangent(node) for node in nodes)
    results = recognise(lower(_forward_part(graph) if joint else nodes))
    # The fused operation reads where the layer's last operation stood: nothing may have been
    # written in place before.  (AOTAutograd writes to inputs, if at all, in the end.)
    writes = itertools.accumulate(map(_writes, nodes), operator.or_)
    spoiled = {node for node, written in zip(nodes, writes, strict=True) if written}
    for i, result in enumerate(results):
        if isinstance(result, Declined):
            continue
        if joint:
            results[i] = Declined(result.name, GRADIENTS)
        elif result.output.value.source in spoiled:
            results[i] = Declined(result.name, WRITES)
        elif not placeable(result):
            results[i] = Declined(result.name, SIZES)
    return results


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def rewrite(
    graph: fx.Graph, *, verify: bool = False, dump_graph: str | Path | None = None
) -> list[Result]:
    """Replaces every BlockFFN layer of ``graph``, in place, by one call of the fused operation.

    ``torch.ops.blockffn.chunk_sparse_ffn`` must be registered (``import blockffn_compile.ops``).

    Args:
        graph: ATen graph with composite operations decomposed and the (fake) tensor of every
            node in ``meta["val"]``.
        verify: run both sides of every rewrite on random inputs and compare.
        dump_graph: directory for the graph before and after, one pair of files per call.

    Returns:
        A :class:`BlockFFNMatch` for every layer rewritten, a :class:`Declined` with the reason for
        every near miss, in the order of the graph.

    Raises:
        VerificationError: the two sides differ; the message names the layer and the error.
    """
    results = find(graph)
    log_results(results)
    if dump_graph is not None:
        directory = Path(dump_graph)
        directory.mkdir(parents=True, exist_ok=True)
        dump = directory / f"graph{len(list(directory.glob('graph*.before.txt')))}"
        dump.with_suffix(".before.txt").write_text(_readable(graph))
    matches = [result for result in results if isinstance(result, BlockFFNMatch)]
    if matches:
        _share_sizes(graph)
        for match in matches:
            if verify:
                _verify(graph, match)
            _replace(graph, match)
        graph.eliminate_dead_code()
        graph.lint()
    if dump_graph is not None:
        dump.with_suffix(".after.txt").write_text(_readable(graph))
    return results


class BlockFFNPass(PassBase):
    """:func:`rewrite` for pass managers: takes a GraphModule, returns a ``PassResult``."""

    def __init__(self, *, verify: bool = False) -> None:
        self.verify = verify

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        results = rewrite(graph_module.graph, verify=self.verify)
        graph_module.recompile()
        return PassResult(graph_module, any(isinstance(r, BlockFFNMatch) for r in results))


class BlockFFNGraphPass(CustomGraphPass):
    """:func:`rewrite` for Inductor, as ``joint_custom_pre_pass``.

    Attributes:
        results: of all graphs so far.
    """

    def __init__(
        self,
        *,
        verify: bool = False,
        dump_graph: str | Path | None = None,
        linears: bool = False,
    ) -> None:
        self.verify, self.dump_graph, self.linears = verify, dump_graph, linears
        self.results: list[Result] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.results += rewrite(graph, verify=self.verify, dump_graph=self.dump_graph)
        if not any(map(_is_tangent, graph.nodes)):
            linears.rewrite(graph, quantised_only=not self.linears)

    def uuid(self) -> bytes | None:
        """Identity in Inductor's caches.

        None, which turns them off, when verification or a dump is asked for: both must happen,
        and a cached graph runs no pass.
        """
        if self.verify or self.dump_graph is not None:
            return None
        return _sources_hash() + bytes([self.linears])


@cache
def _sources_hash() -> bytes:
    """Hash of all that decides what the rewrite finds and emits."""
    here = Path(__file__).parent
    names = ("layer.py", "ops.py", "step_ops.py", "lowering.py")
    sources = [*sorted(here.glob("*.py")), *(here.parent / name for name in names)]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.digest()


def _readable(graph: fx.Graph) -> str:
    module = graph.owning_module
    if module is None:
        return str(graph)
    return fx.GraphModule(module, graph).print_readable(print_output=False, include_stride=True)


# --- Joint graphs ---------------------------------------------------------------------------------


def _is_tangent(node: fx.Node) -> bool:
    """AOTAutograd's own mark of the inputs of a backward pass."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def _forward_part(graph: fx.Graph) -> list[fx.Node]:
    """The nodes behind those outputs that do not depend on a tangent."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_tangent(node) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    (output,) = graph.find_nodes(op="output")
    wanted = {node for node in output.all_input_nodes if node not in backward}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in wanted]


# --- Emission -------------------------------------------------------------------------------------


class _LayerEmitter(Emitter):
    """Writes the fused operation."""

    def matrix(self, matrix: Matrix, node: fx.Node) -> fx.Node:
        """``node`` read as ``matrix``."""
        shape = matrix.value.shape
        if matrix.perm != tuple(range(len(shape))):
            node = self.call(aten.permute.default, node, list(matrix.perm))
        if len(shape) != 2 or shape[matrix.perm[1]] != matrix.shape[1]:
            node = self.call(aten.reshape.default, node, list(matrix.shape))
        return node

    def layer(self, match: BlockFFNMatch, nodes: Mapping[Value, fx.Node]) -> fx.Node:
        """The fused operation with everything around it: a node that equals ``match.output``."""
        x = self.matrix(match.x, nodes[match.x.value])
        scores, *rest = (self.matrix(m, nodes[m.value]) for m in match.scores)
        for factor in (*rest, *([match.scale] if match.scale != 1 else [])):
            scores = self.call(aten.mul.Tensor, scores, factor)
        weights = [nodes[w] for w in (match.w_up, match.w_down, match.w_gate) if w is not None]
        scales: list[fx.Node] = []
        # Groups of integers lie along the last axis: the kernels want that to be the summed one,
        # and no group to reach from one expert to the next.
        spec = match.spec
        if (match.up_axes[-1], match.down_axes[-1]) == ("h", "s") and alike(weights):
            _, group = quantisation(weights[0])
            if spec.hidden_size % group == spec.expert_size % group == 0:
                weights, scales = stored(weights)
        y = self.call(
            torch.ops.blockffn.chunk_sparse_ffn.default,
            x,
            self.cast(scores, match.x.value.dtype),
            weights[0],
            weights[1],
            match.spec.act,
            None if match.w_gate is None else weights[2],
            match.up_axes,
            match.down_axes,
            *scales,
        )
        output, perm = match.output.value, match.output.perm
        if len(output.shape) != 2:
            sizes = [output.shape[i] for i in perm]
            y = self.call(aten.reshape.default, y, self.sizes(sizes, match, nodes))
        if perm != tuple(range(len(perm))):
            inverse = [perm.index(i) for i in range(len(perm))]
            y = self.call(aten.permute.default, y, inverse)
            y = self.call(aten.clone.default, y)
            y.kwargs = {"memory_format": torch.contiguous_format}
        return self.cast(y, output.dtype)

    def cast(self, node: fx.Node, dtype: str) -> fx.Node:
        wanted = getattr(torch, dtype)
        if node.meta["val"].dtype == wanted:
            return node
        return self.call(torch.ops.prims.convert_element_type.default, node, wanted)

    def sizes(
        self, sizes: list[Size], match: BlockFFNMatch, nodes: Mapping[Value, fx.Node]
    ) -> list[int | fx.Node]:
        """``sizes`` as arguments; where more than one is symbolic they are read off x."""
        if sum(not isinstance(size, int) for size in sizes) <= 1:
            return [size if isinstance(size, int) else -1 for size in sizes]
        x, shape = nodes[match.x.value], match.x.value.shape
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, x, shape.index(size))
            for size in sizes
        ]


def _share_sizes(graph: fx.Graph) -> None:
    """Makes equal symbolic sizes one node, so that none is read off a value about to go."""
    first: dict[Size, fx.Node] = {}
    for node in graph.nodes:
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            known = first.setdefault(size_token(size), node)
            if known is not node:
                node.replace_all_uses_with(known)


def _replace(graph: fx.Graph, match: BlockFFNMatch) -> None:
    """Puts the fused operation in the place of ``match.output``."""
    output = match.output.value
    nodes = {value: value.source for value in match.operands}
    for value in ancestors(output, frozenset(match.operands)):
        for user in list(value.source.users) if value.source is not None else ():
            if user.target is METADATA_ASSERTION:  # left by torch.export; keeps the value alive
                graph.erase_node(user)
    with graph.inserting_before(output.source):
        new = _LayerEmitter(graph, output.source).layer(match, nodes)
    output.source.replace_all_uses_with(new)
    output.source = new  # for a layer that reads it


# --- Verification ---------------------------------------------------------------------------------


def _verify(graph: fx.Graph, match: BlockFFNMatch) -> None:
    """Runs the layer as it stands and as it will be on the same random inputs.

    Symbolic sizes take their hints, the sizes seen when compiling.

    Raises:
        VerificationError: the results differ by too much.
    """
    operands = list(dict.fromkeys(match.operands))
    output = match.output.value.source
    given = [
        node
        for value in operands
        for node in (value.source.all_input_nodes if is_quantised(value.source) else [value.source])
    ]
    wanted, stop = {output}, set(given)
    for node in reversed(graph.nodes):
        if node in wanted - stop and not isinstance(node.meta.get("val"), torch.SymInt):
            wanted.update(node.all_input_nodes)

    generator = torch.Generator().manual_seed(0)
    scores = {m.value.source for m in match.scores}
    with unset_fake_temporarily(), torch.no_grad():
        inputs = [_random(node.meta["val"], node in scores, generator) for node in given]
        original = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in given:
            copies[node] = original.placeholder(node.name)
        for node in graph.nodes:
            if node in wanted - stop:
                number = node.meta.get("val")
                copies[node] = (
                    optimization_hint(number, fallback=8)
                    if isinstance(number, torch.SymInt)
                    else original.node_copy(node, copies.__getitem__)
                )
        original.output(copies[output])

        fused = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node, tensor in zip(given, inputs, strict=True):
            new[node] = fused.placeholder(node.name)
            new[node].meta["val"] = tensor
        nodes = {
            value: new[value.source]
            if value.source in new
            else fused.node_copy(value.source, new.__getitem__)
            for value in operands
        }
        fused.output(_LayerEmitter(fused, output).layer(match, nodes))

        root = graph.owning_module or torch.nn.Module()
        expected, actual = (fx.GraphModule(root, g)(*inputs) for g in (original, fused))
        error = (actual - expected).abs().max().item() / expected.abs().max().item()
    if actual.shape != expected.shape:
        error = float("inf")
    check_error(match, error, 'the graph that options={"dump_graph": DIRECTORY} writes')


def _random(like: Tensor, scores: bool, generator: torch.Generator) -> Tensor:
    """A random tensor of the size of ``like``; half of the scores are zero."""
    size = [optimization_hint(n, fallback=8) for n in like.shape]
    if not like.dtype.is_floating_point:
        integers = torch.randint(0, 256, size, generator=generator)
        return integers.to(torch.uint8).view(like.dtype).to(like.device)
    tensor = torch.randn(size, generator=generator)
    if scores:
        tensor = tensor.relu()
    return tensor.to(like.dtype).to(like.device)
