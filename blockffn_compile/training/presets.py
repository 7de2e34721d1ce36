"""Architecture of the bundled model, and of the dense twin that it is compared with."""

from __future__ import annotations

import dataclasses

from blockffn_compile.models.config import BlockFFNConfig

BUNDLED = BlockFFNConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    ffn_type="block_linear",
    num_experts=32,
    expert_size=64,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=256,
    max_position_embeddings=2048,
    initializer_range=0.04,
    eos_token_id=0,
)


def dense_twin(config: BlockFFNConfig) -> BlockFFNConfig:
    """The same decoder with gated dense FFNs of as many parameters as the BlockFFN layers."""
    matrices = 3 if config.ffn_gated else 2
    parameters_per_input = matrices * config.num_experts * config.expert_size + config.num_experts
    return dataclasses.replace(
        config,
        ffn_type="vanilla",
        ffn_gated=True,
        intermediate_size=round(parameters_per_input / 3),
    )
