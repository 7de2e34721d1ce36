"""The BlockFFN decoder: pre-norm transformer with MLA or grouped-query attention.

Follows the released BlockFFN models (arXiv 2507.08771; MiniCPM scaling, arXiv 2404.06395).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockffn_compile.layer import ACTIVATIONS, BlockFFN, RMSNorm
from blockffn_compile.models.cache import StaticCache, StepCache
from blockffn_compile.models.config import BlockFFNConfig


class RotaryEmbedding(nn.Module):
    """cos and sin tables, fp32, [max_position_embeddings, rope_dim], halves repeated."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.reset_tables(torch.get_default_device())

    def reset_tables(self, device: torch.device) -> None:
        """Computes the tables anew, on the CPU so that every device gets the same values."""
        dim = self.config.rope_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        positions = torch.arange(
            self.config.max_position_embeddings, dtype=torch.float32, device="cpu"
        )
        angles = torch.outer(positions, self.config.rope_theta**-exponents).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follows the module to a device but not to a dtype: a cast would spoil the angles."""
        super()._apply(fn, recurse)
        self.reset_tables(self.cos.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [..., T, dim] by position, half-split pairing, in fp32 or wider."""
    cos, sin = rope
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: BlockFFNConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.grouped = config.kv_heads != config.num_attention_heads
        dim, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv, bias=False)
        self.v_proj = nn.Linear(dim, kv, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, T, dim] from [batch, T, H]."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return rotate(q, rope), rotate(k, rope), v

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: StaticCache | StepCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        q, k, v = self.project(x, rope)
        if cache is not None and hasattr(cache, "attend"):
            return self.o_proj(cache.attend(self.layer, q, k, v))
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), keys and values expanded."""

    def __init__(self, config: BlockFFNConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layer, self.grouped = config, layer, False
        heads, key_dim = config.num_attention_heads, config.qk_nope_head_dim
        rope_dim, value_dim = config.qk_rope_head_dim, config.value_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (key_dim + rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + rope_dim, bias=False
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (key_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(heads * value_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(heads).transpose(1, 2)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(heads).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.value_dim], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), rope).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, rope)), dim=-1)
        return q, torch.cat((k_nope, k_rope), dim=-1), v


class DenseFFN(nn.Module):
    """The ``vanilla`` FFN: ``down(act(gate(x)) * up(x))``, or without the gate."""

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(dim, width, bias=False) if config.ffn_gated else None
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(
            self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: BlockFFNConfig, layer: int) -> None:
        super().__init__()
        attention = LatentAttention if config.attention_type == "mla" else Attention
        self.self_attn = attention(config, layer)
        self.mlp: nn.Module = (
            DenseFFN(config) if config.ffn_type == "vanilla" else BlockFFN(config.ffn_spec)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, x: Tensor, *attention_args) -> Tensor:  # type: ignore[no-untyped-def]
        attended = self.self_attn(self.input_layernorm(x), *attention_args)
        x = x + attended * self.residual_scale
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_scale


class Decoder(nn.Module):
    """Embedding, layers and the final norm (``model.*`` in checkpoints)."""

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: StaticCache | StepCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if positions is None:
            if cache is not None:
                raise ValueError("positions are needed with a cache: the slots to write")
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if isinstance(cache, StaticCache) and mask is None:
            slots = torch.arange(cache.max_len, device=tokens.device)
            mask = slots[None, :] <= positions[:, None]
        x = self.embed_tokens(tokens) * self.config.scale_emb
        rope = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, rope, positions, cache, mask)
        return self.norm(x)


class BlockFFNForCausalLM(nn.Module):
    """Decoder with its language-model head.

    The cache, when given, is written in place: ``positions`` are both the rotary positions and
    the cache slots of the tokens.
    """

    def __init__(self, config: BlockFFNConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.logit_scale = config.dim_model_base / config.hidden_size

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal initialisation with ``initializer_range``, norms at one."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: StaticCache | StepCache | None = None,
        mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits of tokens.

        Args:
            tokens: [batch, T] int64.
            positions: [T] int64, default 0..T-1.
            cache: written at ``positions`` and read whole; or what does the attention itself.
            mask: bool, broadcastable to [batch, heads, T, keys], true where a token may look.
                Default: causal.
            logits_to_keep: of how many of the last tokens; 0 for all.

        Returns:
            [batch, tokens kept, vocab_size] in the model's dtype.
        """
        hidden = self.model(tokens, positions, cache, mask)[:, -logits_to_keep:]
        return self.lm_head(hidden * self.logit_scale)
