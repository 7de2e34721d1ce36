"""The same model as a Hugging Face ``PreTrainedModel``; needs transformers.

Importing this module registers ``model_type`` "blockffn", so that ``AutoModelForCausalLM`` loads
and generates from any directory that :func:`blockffn_compile.load_model` reads, and the other way
round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from blockffn_compile.layer import BlockFFN
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import Decoder, RotaryEmbedding


class HFBlockFFNConfig(PreTrainedConfig):
    """Carries the fields of :class:`BlockFFNConfig`, which are its keyword arguments."""

    model_type = "blockffn"

    def native(self) -> BlockFFNConfig:
        """The fields, validated.

        Raises:
            CheckpointError: a field is missing or has an unsupported value.
        """
        return BlockFFNConfig.from_dict(self.to_dict())


@dataclass(frozen=True)
class _CacheView:
    """A Hugging Face cache under the protocol of our own; it keeps count of the slots itself."""

    cache: Cache

    def update(
        self, layer: int, key: Tensor, value: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, layer)


class HFBlockFFNForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`BlockFFNForCausalLM` for the Hugging Face ecosystem, parameter names identical."""

    config_class = HFBlockFFNConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: HFBlockFFNConfig) -> None:
        super().__init__(config)
        native = config.native()
        self.model = Decoder(native)
        self.lm_head = nn.Linear(native.hidden_size, native.vocab_size, bias=False)
        self.logit_scale = native.dim_model_base / native.hidden_size
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockFFN):
            std = self.model.config.initializer_range
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=std)
        elif isinstance(module, RotaryEmbedding):
            module.reset_tables(module.cos.device)

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for the last tokens.

        Padding needs only ``attention_mask``: a row's positions may start anywhere, since the
        rotation makes attention depend on distances alone.

        Args:
            input_ids: [batch, T].
            attention_mask: [batch, cached + T], zero for padding; or a whole mask, broadcastable
                to [batch, heads, T, keys].
            cache: a Hugging Face cache; ``use_cache`` without one makes a ``DynamicCache``.
            labels: [batch, T], -100 to ignore; shifted here.
            logits_to_keep: of how many of the last tokens; 0 for all.
        """
        if cache is None and use_cache:
            cache = DynamicCache()
        count, past = input_ids.shape[1], cache.get_seq_length() if cache is not None else 0
        keys = cache.get_mask_sizes(count, 0)[0] if cache is not None else count
        positions = torch.arange(count, device=input_ids.device) + past
        slots = torch.arange(keys, device=input_ids.device)
        mask = slots <= positions[:, None]
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask
        elif attention_mask is not None:
            seen = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]))
            # A padding token sees itself: attention over nothing is not a number.
            itself = slots == positions[:, None]
            mask = (mask & seen[:, None, None]) | itself
        view = None if cache is None else _CacheView(cache)
        hidden = self.model(input_ids, positions, view, mask)[:, -logits_to_keep:]
        logits = self.lm_head(hidden * self.logit_scale)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)


AutoConfig.register(HFBlockFFNConfig.model_type, HFBlockFFNConfig)
AutoModelForCausalLM.register(HFBlockFFNConfig, HFBlockFFNForCausalLM)
