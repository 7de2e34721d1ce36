"""A BlockFFN decoder as an ONNX model with a static key-value cache.

Inputs (B texts, T new tokens of each, P slots of the cache):

===================  ====================  ======================================================
``tokens``           [B, T] int64
``positions``        [B, T] int64          rotary positions
``slots``            [B, T] int64          where in the cache the tokens' keys and values go
``mask``             [B, T, P] bool        slots that a token attends to, its own included
``past.N.key``       [B, G, P, D]          for each layer N
``past.N.value``     [B, G, P, V]
===================  ====================  ======================================================

Outputs: ``logits`` [B, T, vocabulary], ``features`` [B, T, H] (of the final norm),
``present.N.key`` and ``present.N.value``: the cache with the new entries in it.  A caller that
binds ``present`` to the memory of ``past`` has them written in place, and nothing is copied.

Without a cache there are no ``slots``, ``past`` and ``present``, and the mask is [B, T, T].
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.export import Dim

from blockffn_compile.layer import Scheme
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.onnx.files import Progress, save
from blockffn_compile.passes import onnx as passes
from blockffn_compile.quantisation import is_quantised
from blockffn_compile.report import Report, report

#: ``portable``: sparse layers as nodes with a function body, which any runtime can run and for
#: which ONNX Runtime takes our kernels where they are registered.  ``contrib``: as ONNX Runtime's
#: own operators for mixtures of experts.  ``dense``: standard operators and all experts.
Flavour = Literal["portable", "contrib", "dense"]

#: Element types that ONNX Runtime computes with on CPUs.
DTYPES = {torch.float32: "float32", torch.float16: "float16"}

#: Where the model's ``config.json`` is in its metadata.
CONFIG = "blockffn.config"

OPSET = 20

#: Constants of more elements keep the name that they have in the model.
_SMALL = 64


def export(
    model: BlockFFNForCausalLM,
    path: str | Path,
    *,
    flavour: Flavour = "portable",
    quantize: Scheme | None = None,
    dtype: torch.dtype | None = None,
    with_past: bool = True,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Writes a decoder as an ONNX model; large weights go to ``PATH.data``.

    Args:
        model: in eval mode.
        path: the file to write.
        flavour: ``portable``, ``contrib`` or ``dense``.
        quantize: type of the experts' weights, ``int8`` or ``int4``, for ``contrib``; the report
            says what it costs.
        dtype: of weights and computation, float32 or float16; default: the model's.
        with_past: with a key-value cache among inputs and outputs.
        progress: called with the weights written so far and their number.

    Returns:
        What became of each layer; no entries for ``dense``.

    Raises:
        ValueError: an unknown flavour or type of weights, an unsupported dtype, or a model that
            is quantised itself.
        ModelError: the file cannot be written.
    """
    if flavour not in get_args(Flavour):
        raise ValueError(f"flavour is {flavour!r}; choose {' or '.join(get_args(Flavour))}")
    if flavour != "dense":
        passes.check_options(flavour, quantize)
    elif quantize:
        raise ValueError("flavour 'dense' has no quantised weights; choose 'contrib'")
    if is_quantised(model):
        raise ValueError(
            "the model is quantised, which no operator of ours in ONNX is; export the original, "
            "with flavour='contrib' and quantize= for weights of small integers"
        )
    dtype = dtype or model.lm_head.weight.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} has no kernels in ONNX Runtime on CPUs; give "
            f"dtype={' or '.join(DTYPES.values())}"
        )
    if dtype != model.lm_head.weight.dtype:
        model = copy.deepcopy(model).to(dtype)
    exported = _trace(model, with_past)
    layers = []
    if flavour != "dense":
        layers = passes.rewrite(exported, flavour=flavour, quantize=quantize)
    exported.metadata_props[CONFIG] = json.dumps(model.config.to_dict())
    save(exported, path, progress)
    return report(layers)


@dataclass
class _GraphCache:
    """The cache as values of the graph, which writes make anew; see :class:`StepCache`.

    Attributes:
        past: keys and values of each layer; empty without a cache.
        indices: [B, G, T, 3], where in the cache the new entries go.
        bias: [B, 1, 1, T, P], zero or minus infinity.
        present: what ``past`` became.
    """

    past: Sequence[Tensor]
    indices: Tensor | None
    bias: Tensor
    present: list[Tensor]

    def attend(self, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (
            self.write(2 * layer + i, entries) for i, entries in enumerate((key, value))
        )
        batch, heads, tokens, dim = q.shape
        groups = keys.shape[1]
        # Heads that share keys are rows of one product: the cache is not repeated for them.
        rows = (q * dim**-0.5).reshape(batch, groups, -1, dim)
        scores = rows @ keys.transpose(2, 3)
        scores = scores.reshape(batch, groups, heads // groups, tokens, -1) + self.bias
        weights = scores.softmax(-1).reshape(batch, groups, rows.shape[2], -1)
        y = (weights @ values).reshape(batch, heads, tokens, -1)
        return y.transpose(1, 2).flatten(2)

    def write(self, index: int, entries: Tensor) -> Tensor:
        if self.indices is None:
            return entries
        past = self.past[index]
        written = torch.onnx.ops.symbolic(
            "ScatterND",
            (past, self.indices, entries),
            dtype=past.dtype,
            shape=past.shape,
        )
        self.present.append(written)
        return written


class _Decoder(nn.Module):
    """The model as a function of what the ONNX model takes."""

    def __init__(self, model: BlockFFNForCausalLM) -> None:
        super().__init__()
        # Same names as in checkpoints.
        self.model, self.lm_head = model.model, model.lm_head
        self.logit_scale = model.logit_scale

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        slots: Tensor | None = None,
        past: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        dtype = self.lm_head.weight.dtype
        bias = torch.where(mask, 0.0, -torch.inf).to(dtype)[:, None, None]
        indices = None
        if slots is not None:
            batch, groups, length = tokens.shape[0], past[0].shape[1], tokens.shape[1]
            grid = (batch, groups, length)
            row = torch.arange(batch)[:, None, None].expand(grid)
            group = torch.arange(groups)[None, :, None].expand(grid)
            indices = torch.stack((row, group, slots[:, None].expand(grid)), dim=-1)
        cache = _GraphCache(past, indices, bias, [])
        features = self.model(tokens, positions[:, None], cache)
        return self.lm_head(features * self.logit_scale), features, *cache.present


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of a model's inputs (``past``) or outputs (``present``) for its cache."""
    return [f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings, of packages that are not installed and of equal sizes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def cache_shapes(config: BlockFFNConfig, rows: int, slots: int) -> list[tuple[int, ...]]:
    """Shapes of the cache, in the order of :func:`cache_names`."""
    heads, key_dim, value_dim = config.cache_sizes
    pair = (rows, heads, slots, key_dim), (rows, heads, slots, value_dim)
    return [*pair] * config.num_hidden_layers


def _trace(model: BlockFFNForCausalLM, with_past: bool) -> ir.Model:
    """The decoder in standard operators; weights are shared with ``model``."""
    config, dtype = model.config, model.lm_head.weight.dtype
    batch, tokens, slots = Dim("batch"), Dim("tokens"), Dim("slots")
    names = ["tokens", "positions", "mask"]
    keys = 8 if with_past else 3
    # Different tensors each: the exporter would take equal ones for one input.
    ids = [torch.zeros(2, 3, dtype=torch.long) for _ in range(3)]
    inputs: list[object] = [*ids[:2], torch.ones(2, 3, keys, dtype=torch.bool)]
    both = {0: batch, 1: tokens}
    shapes: list[object] = [both, both, {**both, 2: slots if with_past else tokens}]
    outputs = ["logits", "features"]
    if with_past:
        past = [torch.zeros(shape, dtype=dtype) for shape in cache_shapes(config, 2, keys)]
        inputs += [ids[2], past]
        shapes += [both, [{0: batch, 2: slots}] * len(past)]
        names += ["slots", *cache_names(config.num_hidden_layers, "past")]
        outputs += cache_names(config.num_hidden_layers, "present")
    with _quietly():
        program = torch.onnx.export(
            _Decoder(model).eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=tuple(shapes),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    exported = program.model
    fold_constants(exported, should_fold=_is_small)
    ir.passes.Sequential(CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass())(exported)
    return exported


def _is_small(node: ir.Node) -> bool | None:
    """Weights keep the orientation and the name that they have in the model."""
    tensors = (v.const_value for v in node.inputs if v is not None)
    return None if all(t is None or t.size <= _SMALL for t in tensors) else False
