"""Static key-value cache: fixed shapes, so that one compiled graph serves every step."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import blockffn_compile.step_ops  # noqa: F401  (registers the attention of a step)
from blockffn_compile.models.config import BlockFFNConfig


class StepCache(Protocol):
    """Stands in for the cache of a forward pass, and does the attention itself."""

    def attend(self, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores keys and values [B, G, T, dim] and attends with q [B, Q, T, D].

        Returns:
            [B, T, Q * V].
        """


class StaticCache:
    """Keys and values of every layer, allocated once.

    Attributes:
        keys: per layer, [batch, kv heads, max_len, key dim].
        values: per layer, [batch, kv heads, max_len, value dim].
    """

    def __init__(
        self,
        config: BlockFFNConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < max_len <= config.max_position_embeddings:
            raise ValueError(
                f"cache length {max_len} is not within 1..{config.max_position_embeddings} "
                "(max_position_embeddings)"
            )
        heads, key_dim, value_dim = config.cache_sizes
        self.max_len = max_len
        layers = range(config.num_hidden_layers)
        # Zeros, not empty: masked slots enter the attention sums as 0 * value.
        self.keys = [
            torch.zeros(batch, heads, max_len, key_dim, dtype=dtype, device=device) for _ in layers
        ]
        self.values = [
            torch.zeros(batch, heads, max_len, value_dim, dtype=dtype, device=device)
            for _ in layers
        ]

    def update(
        self, layer: int, key: Tensor, value: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes ``key`` and ``value`` [batch, heads, T, dim] at slots ``positions`` [T].

        Returns:
            The whole cached keys and values of the layer.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        return keys, values

    def sequence(self, row: int) -> StaticCache:
        """The cache of one sequence, in the same memory."""
        rows = slice(row, row + 1)
        return StaticCache.of([k[rows] for k in self.keys], [v[rows] for v in self.values])

    @staticmethod
    def of(keys: list[Tensor], values: list[Tensor]) -> StaticCache:
        """A cache in the memory of these tensors, one for each layer."""
        cache = StaticCache.__new__(StaticCache)
        cache.max_len, cache.keys, cache.values = keys[0].shape[2], keys, values
        return cache


class TreeStep(NamedTuple):
    """Where the tokens of one step stand: nodes of trees, over one or several sequences.

    Stands in for the cache of a forward pass.

    Attributes:
        cache: of all sequences.
        rows: [T] int64, the sequence of each token.
        context: [T] int64, how many slots of the sequence lie before the tree.
        slots: [T] int64, where the token's key and value go: a node's index behind the context.
        ancestors: [T] int64 bit mask, bit j for node j; the token itself included.
    """

    cache: StaticCache
    rows: Tensor
    context: Tensor
    slots: Tensor
    ancestors: Tensor

    def attend(self, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores keys and values [1, G, T, dim] and attends with q [1, Q, T, D].

        Returns:
            [1, T, Q * V].
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.slots] = key[0].transpose(0, 1)
        values[self.rows, :, self.slots] = value[0].transpose(0, 1)
        y = torch.ops.blockffn.cached_attention(
            q[0].transpose(0, 1),
            keys,
            values,
            self.rows,
            self.context,
            self.ancestors,
        )
        return y.flatten(1)[None]
