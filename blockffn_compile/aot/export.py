"""A model's decoding step as Relax functions.

TVM's importer of exported PyTorch programs does most of it; the converters here stand for what it
lacks, or does otherwise than PyTorch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import tvm
from torch import Tensor, fx, nn
from torch.export import Dim
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program

from blockffn_compile.aot.kernels import StepKernels
from blockffn_compile.layer import CHUNK_TOKENS
from blockffn_compile.models.cache import StaticCache, TreeStep
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.schedules.tir.tile import LANES

#: Inputs of a step, int64 [T] each, see :class:`~blockffn_compile.models.cache.TreeStep`.
STEP_INPUTS = ("tokens", "positions", "rows", "context", "slots", "ancestors")
#: Inputs of a move, int64 [n] each, see :func:`export`.
MOVE_INPUTS = ("rows", "sources", "slots")

Converter = Callable[[fx.Node, Any], relax.Var]


class _Trunk(nn.Module):
    """Features [T, H] of the tokens of a step."""

    def __init__(self, model: BlockFFNForCausalLM) -> None:
        super().__init__()
        self._decoder = [model.model]  # in a list: its parameters are arguments, not parameters

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        cache: tuple[Tensor, ...],
        weights: dict[str, Tensor],
    ) -> Tensor:
        tokens, positions, *places = inputs
        step = TreeStep(StaticCache.of(list(cache[::2]), list(cache[1::2])), *places)
        arguments = (tokens[None], positions, step)
        return torch.func.functional_call(self._decoder[0], weights, arguments)[0]


class _Head(nn.Module):
    """Logits [N, V] of features."""

    def __init__(self, model: BlockFFNForCausalLM) -> None:
        super().__init__()
        self.scale = model.logit_scale

    def forward(self, features: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(features * self.scale, weight)


def export(model: BlockFFNForCausalLM, kernels: StepKernels) -> tuple[tvm.IRModule, dict[str, str]]:
    """The functions ``trunk``, ``head`` and ``move`` of a model; no weight is read.

    ``trunk(*STEP_INPUTS, keys 0, values 0, keys 1, ..., weights...)`` returns features [T, H] and
    writes the cache in place; ``head(features, weight)`` returns logits; ``move(*MOVE_INPUTS, keys
    0, values 0, ...)`` copies cache entries of ``rows`` from ``sources`` to ``slots``, one after
    the other.  The number of tokens T, at most 64, that of texts and the length of the cache are
    symbolic.

    Args:
        model: in eval mode, on any device; on ``meta`` it takes no memory.
        kernels: for attention and the cache.

    Returns:
        The module, and the name of each weight in the model's state by that of its parameter.
        Buffers are weights too: ``model.rotary.cos`` and ``.sin``.

    Raises:
        ValueError: attention heads have a size that the kernel does not take.
    """
    config, weight = model.config, model.lm_head.weight
    with weight.device:
        cache = StaticCache(config, 2, 3, weight.dtype, weight.device)
        inputs = tuple(torch.zeros(5, dtype=torch.int64) for _ in STEP_INPUTS)
        features = torch.zeros(5, config.hidden_size, dtype=weight.dtype)
    for name, dim in (("key", cache.keys[0].shape[3]), ("value", cache.values[0].shape[3])):
        if dim % LANES:
            raise ValueError(f"{name} heads of {dim}: bundles need a multiple of {LANES}")
    decoder = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    weights = {name: tensor.detach() for name, tensor in decoder.items()}
    entries = [t for pair in zip(cache.keys, cache.values, strict=True) for t in pair]
    few, many = Dim("t", min=1, max=CHUNK_TOKENS), Dim("n", min=1, max=CHUNK_TOKENS)
    sizes = {0: Dim("b", min=1, max=2**20), 2: Dim("l", min=1, max=config.max_position_embeddings)}
    trunk = _relax(
        _Trunk(model),
        (inputs, tuple(entries), weights),
        (({0: few},) * len(inputs), (sizes,) * len(entries), dict.fromkeys(weights)),
        len(inputs) + len(entries),
        kernels,
    )
    head = _relax(_Head(model), (features, weight), ({0: many}, None), 1, kernels)
    move = _move(entries, kernels)
    names = {f"weights_{name.replace('.', '_')}": f"model.{name}" for name in weights}
    tied = config.tie_word_embeddings
    names["weight"] = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return _merge({"trunk": trunk, "head": head, "move": move}), names


def _relax(
    module: nn.Module, arguments: Any, dims: Any, inputs: int, kernels: StepKernels
) -> tvm.IRModule:
    """The function ``main`` of a module, of which the first ``inputs`` are not weights."""
    with warnings.catch_warnings():
        # PyTorch's own copy of a program uses what PyTorch deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        program = torch.export.export(module, arguments, dynamic_shapes=dims).run_decompositions()
    mod = from_exported_program(
        program,
        run_ep_decomposition=False,
        unwrap_unit_return_tuple=True,
        custom_convert_map=CONVERTERS
        | {
            "index_put.default": functools.partial(_index_put, kernels),
            "cached_attention.default": functools.partial(_attention, kernels),
        },
    )
    mod["main"] = mod["main"].with_attr("num_input", inputs)
    return mod


def _move(cache: list[Tensor], kernels: StepKernels) -> tvm.IRModule:
    """The function ``main`` that moves entries of a cache; it returns the cache."""
    n, batch, length = (tirx.Var(name, "int64") for name in ("n", "b", "l"))
    inputs = [relax.Var(name, relax.TensorType((n,), "int64")) for name in MOVE_INPUTS]
    types = []
    for entries in cache:
        _, heads, _, dim = entries.shape
        dtype = str(entries.dtype).removeprefix("torch.")
        types.append(relax.TensorType((batch, heads, length, dim), dtype))
    params = [relax.Var(f"cache_{i}", type_) for i, type_ in enumerate(types)]
    builder = relax.BlockBuilder()
    with builder.function("main", [*inputs, *params]):
        moved = []
        for param in params:
            _, heads, _, dim = param.ty.shape
            kernel = kernels.move(int(heads), int(dim), str(param.ty.dtype.dtype))
            called = _add(builder, kernel)
            arguments = (param, *inputs)
            moved.append(builder.emit(relax.op.call_tir_inplace(called, arguments, [0], param.ty)))
        builder.emit_func_output(relax.Tuple(moved))
    mod = builder.get()
    mod["main"] = mod["main"].with_attr("num_input", len(inputs) + len(params))
    return mod


def _merge(modules: dict[str, tvm.IRModule]) -> tvm.IRModule:
    """One module with the ``main`` of each under a new name."""
    merged = tvm.IRModule()
    for name, mod in modules.items():
        for gv, function in mod.functions.items():
            if gv.name_hint == "main":
                merged[name] = function.with_attr("global_symbol", name)
            else:
                merged.update_func(gv, function)
    return merged


# --- Converters -----------------------------------------------------------------------------------


def _matmul(node: fx.Node, importer: Any) -> relax.Var:
    """Summed in fp32 and rounded once, as PyTorch does."""
    a, b = (importer.env[arg] for arg in node.args[:2])
    y = importer.block_builder.emit(relax.op.matmul(a, b, out_dtype="float32"))
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return y if dtype == "float32" else importer.block_builder.emit(relax.op.astype(y, dtype))


def _rows(node: fx.Node, importer: Any) -> relax.Var:
    """Rows of a table; an index outside of it gives the nearest one."""
    args: Any = node.args
    table, indices = args[:2]
    if not isinstance(indices, fx.Node):  # of index.Tensor
        if len(indices) > 1:
            return importer._index_tensor(node)
        (indices,) = indices
    # The default, "fast", checks nothing and warns of that whenever it is compiled.
    taken = relax.op.take(importer.env[table], importer.env[indices], axis=0, mode="clip")
    return importer.block_builder.emit(taken)


def _select(node: fx.Node, importer: Any) -> relax.Var:
    """One of a known number of parts; see :func:`_rows` for the mode."""
    args: Any = node.args
    x, axis, index = args
    if index < 0:
        raise ValueError(f"{node.format_node()}: count parts from the first")
    taken = relax.op.take(importer.env[x], relax.const(index, "int64"), axis=axis, mode="clip")
    return importer.block_builder.emit(taken)


def _amax(node: fx.Node, importer: Any) -> relax.Var:
    args: Any = (*node.args, None, False)
    x, axes, keepdim = args[:3]
    return importer.block_builder.emit(
        relax.op.max(importer.env[x], axis=list(axes) if axes else None, keepdims=keepdim)
    )


def _index_put(kernels: StepKernels, node: fx.Node, importer: Any) -> relax.Var:
    """``cache[rows, :, slots] = new``, in the caller's memory."""
    args: Any = node.args
    cache, (rows, everything, slots), new = args[:3]
    if everything is not None or len(args) > 3:
        raise ValueError(f"{node.format_node()}: only cache[rows, :, slots] = new can be written")
    _, heads, _, dim = node.meta["val"].shape
    cache, new, rows, slots = (importer.env[arg] for arg in (cache, new, rows, slots))
    function = kernels.store(heads, dim, str(cache.ty.dtype.dtype))
    kernel = _add(importer.block_builder, function)
    return importer.block_builder.emit(
        relax.op.call_tir_inplace(kernel, (cache, new, rows, slots), [0], cache.ty)
    )


def _attention(kernels: StepKernels, node: fx.Node, importer: Any) -> relax.Var:
    args = [importer.env[arg] for arg in node.args]
    q, keys, values = (arg.ty for arg in args[:3])
    tokens, heads, key_dim = q.shape
    kv_heads, value_dim = int(keys.shape[1]), int(values.shape[3])
    dtype = str(q.dtype.dtype)
    function = kernels.attention(int(heads), kv_heads, int(key_dim), value_dim, dtype)
    kernel = _add(importer.block_builder, function)
    result = relax.TensorType((tokens, heads, value_dim), dtype)
    return importer.block_builder.emit(relax.call_tir(kernel, args, result))


def _add(builder: relax.BlockBuilder, function: tirx.PrimFunc) -> Any:
    name = str(function.attrs["global_symbol"])
    return builder.add_func(function.without_attr("global_symbol"), name)


CONVERTERS: dict[str, Converter] = {
    "mm.default": _matmul,
    "bmm.default": _matmul,
    "amax.default": _amax,
    "embedding.default": _rows,
    "index.Tensor": _rows,
    "select.int": _select,
}
