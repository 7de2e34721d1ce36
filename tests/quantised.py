"""Quantised models in fp64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from blockffn_compile.quantisation import Dequantize

#: Sizes that groups of 32 divide, down to the low ranks of the attention.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "expert_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def exact(model: nn.Module) -> nn.Module:
    """The same weights and sums in fp64."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Dequantize):
            module.dtype = torch.float64
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "parametrizations" not in name:
            tensor.data = tensor.data.double()
    return model
