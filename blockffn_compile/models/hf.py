"""The same model as a Hugging Face ``PreTrainedModel``; needs transformers.

Importing this module registers ``model_type`` "blockffn", so that ``AutoModelForCausalLM`` loads
and generates from any directory that :func:`blockffn_compile.load_model` reads, and the other way
round. ``model.generate(**inputs, custom_generate=speculative_generate)`` writes the same with
compiled graphs and speculative decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

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
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from blockffn_compile.layer import BlockFFN
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.eagle import EagleHead
from blockffn_compile.models.modeling import BlockFFNForCausalLM, Decoder, RotaryEmbedding
from blockffn_compile.speculative.generator import Generator, Speculate
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import MAX_NODES


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

    def generate(
        self,
        *args: Any,
        streamer: BaseStreamer | None = None,
        custom_generate: str | Callable | None = None,
        **kwargs: Any,
    ) -> Any:
        """See :meth:`GenerationMixin.generate`."""
        if custom_generate is speculative_generate:
            # transformers itself hands a callable no streamer, though it puts the prompt there.
            custom_generate = functools.partial(speculative_generate, streamer=streamer)
        return super().generate(*args, streamer=streamer, custom_generate=custom_generate, **kwargs)

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


#: Logits processors, each with the name of its setting in :class:`Sampler` and of its own.
_SETTINGS = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


def speculative_generate(
    model: HFBlockFFNForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    speculate: Speculate = "auto",
    head: EagleHead | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """A decoding method: ``model.generate(**inputs, custom_generate=speculative_generate)``.

    Greedy decoding gives the tokens of ``generate``, sampling their distribution; a seed
    (``torch.manual_seed``) gives other draws than there. The first call compiles for every token
    count; a :class:`Generator` is kept with the model, and made anew for more rows at a time,
    another ``speculate`` or ``head``, or after the model has changed its dtype or device.

    Args:
        model: whose ``generate`` calls this.
        input_ids: [rows, T], up to 64 rows, padded on the left.
        logits_processor: temperature, top-k, top-p, min-p and repetition penalty.
        stopping_criteria: a length and end-of-text tokens.
        generation_config: greedy or sampling; may ask for several sequences of a prompt.
        streamer: for one row; is given tokens as they come, several at a time.
        speculate: who drafts; pass it to ``generate``.
        head: an EAGLE head to draft with; pass it to ``generate``.
        model_kwargs: ``attention_mask`` [rows, T], zero for padding.

    Returns:
        [rows, T + new], shorter rows padded on the right; the context's end ends a row. With
        ``return_dict_in_generate`` as the sequences of a ``GenerateDecoderOnlyOutput``.

    Raises:
        ValueError: something is asked for that this method does not do; the message names it.
    """
    _refuse(generation_config, model_kwargs)
    if len(input_ids) > MAX_NODES:
        raise ValueError(f"speculative_generate takes {MAX_NODES} rows, there are {len(input_ids)}")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer follows one row, there are {len(input_ids)}")
    sampler = _sampler(logits_processor, generation_config.do_sample)
    length, eos = _ends(stopping_criteria)
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    generator = _generator(model, len(prompts), speculate, head)

    def stop(new: Sequence[int]) -> int | None:
        """Keeps the end-of-text token, which ``stop_tokens`` would leave out."""
        recent = range(max(0, len(new) - MAX_NODES), len(new))
        return next((i + 1 for i in recent if new[i] in eos), None)

    texts: list[list[int]] = [[] for _ in prompts]
    for step in generator(prompts, length - input_ids.shape[1], sampler=sampler, stop=stop):
        texts[step.row] += step.tokens
        if streamer is not None and step.tokens:
            streamer.put(torch.tensor(step.tokens))
    if streamer is not None:
        streamer.end()
    padding = generation_config.pad_token_id
    if padding is None:
        padding = min(eos, default=0)
    longest = max(map(len, texts))
    new = [text + [padding] * (longest - len(text)) for text in texts]
    sequences: Any = torch.cat([input_ids, input_ids.new_tensor(new)], dim=1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raises ValueError for what would be passed over in silence."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"speculative_generate decodes greedily or samples, not by {mode.value}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"speculative_generate keeps nothing for {name}")
    if "inputs_embeds" in model_kwargs:
        raise ValueError("speculative_generate starts from input_ids, not from inputs_embeds")
    cache = model_kwargs.get("cache")
    if cache is not None and cache.get_seq_length():
        raise ValueError("speculative_generate has its own cache and cannot go on from another")


def _sampler(processors: LogitsProcessorList, do_sample: bool) -> Sampler:
    settings: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    for processor in processors:
        if type(processor) not in _SETTINGS:
            raise ValueError(f"speculative_generate has no {type(processor).__name__}")
        name, theirs = _SETTINGS[type(processor)]
        settings[name] = getattr(processor, theirs)
    return Sampler(**settings)


def _ends(criteria: StoppingCriteriaList) -> tuple[int, set[int]]:
    """Most tokens of a row, padding included, and the tokens that end one."""
    length, eos = 0, set[int]()
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            length = criterion.max_length
        elif isinstance(criterion, EosTokenCriteria):
            eos |= set(criterion.eos_token_id.tolist())
        else:
            raise ValueError(f"speculative_generate has no {type(criterion).__name__}")
    return length, eos


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return input_ids.tolist()
    seen = mask.bool()
    if (seen[:, :-1] & ~seen[:, 1:]).any():
        raise ValueError("the attention_mask has zeros after a one; pad on the left")
    return [row[kept].tolist() for row, kept in zip(input_ids, seen, strict=True)]


@dataclass(frozen=True)
class _Kept:
    """A model's generator, and what it was made for."""

    generator: Generator
    made_for: tuple[Any, ...]


_kept: WeakKeyDictionary[HFBlockFFNForCausalLM, _Kept] = WeakKeyDictionary()


def _generator(
    model: HFBlockFFNForCausalLM, rows: int, speculate: Speculate, head: EagleHead | None
) -> Generator:
    made_for = (speculate, head, model.dtype, model.device)
    kept = _kept.get(model)
    if kept is None or kept.made_for != made_for or kept.generator.engine.rows < rows:
        with torch.device("meta"):
            native = BlockFFNForCausalLM(model.config.native())
        native.model, native.lm_head = model.model, model.lm_head
        kept = _Kept(Generator(native, speculate, head=head, rows=rows), made_for)
        _kept[model] = kept
    return kept.generator


AutoConfig.register(HFBlockFFNConfig.model_type, HFBlockFFNConfig)
AutoModelForCausalLM.register(HFBlockFFNConfig, HFBlockFFNForCausalLM)
