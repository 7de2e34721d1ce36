"""Static key-value cache: fixed shapes, so that one compiled graph serves every step."""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn_compile.models.config import BlockFFNConfig


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
        if config.attention_type == "mla":
            heads = config.num_attention_heads
            key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
            value_dim = config.value_dim
        else:
            heads, key_dim, value_dim = config.kv_heads, config.head_dim, config.head_dim
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
