"""The engine on ONNX Runtime: an exported model whose cache is written in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockffn_compile.engines.engine import BUCKETS, Output, text_length
from blockffn_compile.engines.texts import Texts
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.onnx.export import CONFIG, DTYPES, cache_names, cache_shapes
from blockffn_compile.onnx.files import ModelError
from blockffn_compile.onnx.session import session
from blockffn_compile.speculative.tree import DraftTree

#: Slots of the cache at first; it doubles when a text outgrows it.
_SLOTS = 256


class OrtEngine:
    """A model of :func:`blockffn_compile.onnx.export`; see :class:`Engine`.

    Inputs, outputs and the cache stay in this process's tensors, which ONNX Runtime reads and
    writes where they are.  Its sums depend on the number of tokens, so a token's logits may differ
    in their last bits with what is verified beside it.

    Attributes:
        rows: how many texts.
        max_length: as asked for, at most the model's context.
        cache: keys and values of all layers, [rows, heads, slots, dim]; it grows with the texts.
        session: of ONNX Runtime; its ``flavour`` tells how sparse layers run.
    """

    def __init__(
        self,
        path: str | Path,
        rows: int = 1,
        max_length: int | None = None,
        *,
        library: str | Path | None = None,
        portable: bool = False,
        threads: int | None = None,
    ) -> None:
        """Opens the model.

        Args:
            path: exported with a cache.
            rows: how many texts.
            max_length: of a text; default: the model's context.
            library, portable, threads: see :func:`blockffn_compile.onnx.session`.

        Raises:
            ModelError: the file cannot be used, or was not exported with a cache.
            ValueError: ``max_length`` is not within the model's context.
        """
        self.session = session(path, library=library, portable=portable, threads=threads)
        fields = self.session.get_modelmeta().custom_metadata_map.get(CONFIG)
        types = {value.name: value.type for value in self.session.get_inputs()}
        if fields is None or "past.0.key" not in types:
            raise ModelError(f"{path}: not a decoder with a cache; write one with onnx.export")
        config = BlockFFNConfig.from_dict(json.loads(fields))
        self.config, self.rows = config, rows
        self.max_length = text_length(max_length, config.max_position_embeddings)
        self.vocab_size = config.vocab_size
        self._texts = Texts(rows, self.max_length, self.vocab_size)
        half = types["past.0.key"] == "tensor(float16)"
        self._dtype = torch.float16 if half else torch.float32
        self.cache: list[Tensor] = []
        self._bindings: dict[tuple[int, int], Any] = {}
        self._reserve(min(_SLOTS, self.max_length))

    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        """See :class:`Engine`."""
        self._texts.start(row, tokens)
        self._reserve(len(tokens))
        for stored in self.cache:
            stored[row] = 0  # hidden slots are multiplied by zero, which a NaN would survive
        logits, features = torch.empty(0), list[Tensor]()
        for start in range(0, len(tokens), BUCKETS[-1]):
            run = list(tokens[start : start + BUCKETS[-1]])
            chain = DraftTree.chain(run[0], run[1:], [0.0] * (len(run) - 1))
            logits, part = self._run({row: (chain, start)})[row]
            features.append(part)
        return Output(logits[-1:], torch.cat(features))

    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        """See :class:`Engine`."""
        places = self._texts.verify(trees, BUCKETS[-1])
        self._reserve(max(places.slots) + 1)
        outputs = self._run({row: (tree, self.length(row)) for row, tree in trees.items()})
        return {row: Output(*output) for row, output in outputs.items()}

    def commit(self, row: int, path: Sequence[int]) -> None:
        """See :class:`Engine`."""
        move = self._texts.commit(row, path)
        if move is not None:
            end = move.start + len(move.sources)
            for stored in self.cache:
                stored[row, :, move.start : end] = stored[row][:, move.sources]

    def length(self, row: int) -> int:
        """See :class:`Engine`."""
        return self._texts.lengths[row]

    def _run(self, trees: Mapping[int, tuple[DraftTree, int]]) -> dict[int, tuple[Tensor, Tensor]]:
        """Runs trees behind the given numbers of slots, over the rows from the first to the last.

        Where rows have fewer nodes than others, copies of a root fill the place.  They go to the
        last slot, which is no text's.
        """
        first, last = min(trees), max(trees)
        count = max(len(tree) for tree, _ in trees.values())
        slots = self.cache[0].shape[2]
        shape = (last - first + 1, count)
        tokens = np.full(shape, trees[first][0].tokens[0])
        positions = np.zeros(shape, np.int64)
        places = np.full(shape, slots - 1)
        mask = np.zeros((*shape, slots), np.bool_)
        mask[..., -1] = True
        for row, (tree, past) in trees.items():
            nodes, at = len(tree), row - first
            tokens[at, :nodes] = tree.tokens
            positions[at, :nodes] = tree.depths + past
            places[at, :nodes] = np.arange(past, past + nodes)
            seen = mask[at, :nodes]
            seen[:, -1] = False
            seen[:, :past] = True
            seen[:, past : past + nodes] = tree.ancestors[:, None] >> np.arange(nodes) & 1
        inputs = {"tokens": tokens, "positions": positions, "slots": places, "mask": mask}
        logits = torch.empty(*shape, self.vocab_size, dtype=self._dtype)
        features = torch.empty(*shape, self.config.hidden_size, dtype=self._dtype)
        binding = self._binding(first, last)
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, tensor in (("logits", logits), ("features", features)):
            self._bind(binding.bind_output, name, tensor)
        self.session.run_with_iobinding(binding)
        return {
            row: (logits[row - first, : len(tree)], features[row - first, : len(tree)])
            for row, (tree, _) in trees.items()
        }

    def _binding(self, first: int, last: int) -> Any:
        """The cache of these rows as input and, in the same memory, as output."""
        if (first, last) not in self._bindings:
            binding = self.session.io_binding()
            layers = self.config.num_hidden_layers
            for prefix, bind in (("past", binding.bind_input), ("present", binding.bind_output)):
                for name, stored in zip(cache_names(layers, prefix), self.cache, strict=True):
                    self._bind(bind, name, stored[first : last + 1])
            self._bindings[first, last] = binding
        return self._bindings[first, last]

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        kind = np.dtype(DTYPES[tensor.dtype])
        bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def _reserve(self, length: int) -> None:
        """Makes room for texts of ``length`` tokens, and the slot that no text uses."""
        known = self.cache[0].shape[2] - 1 if self.cache else 0
        if length <= known:
            return
        while known < length:
            known = min(max(2 * known, _SLOTS), self.max_length)
        shapes = cache_shapes(self.config, self.rows, known + 1)
        grown = [torch.zeros(shape, dtype=self._dtype) for shape in shapes]
        for new, old in zip(grown, self.cache, strict=False):
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
        self.cache = grown
        self._bindings.clear()
