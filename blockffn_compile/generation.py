"""The decoding loop: one compiled step over a static cache, tokens as they come.

Read it from the bottom: :func:`generate` is the loop, :func:`compile_step` what it calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from blockffn_compile.models.cache import StaticCache
from blockffn_compile.models.modeling import BlockFFNForCausalLM

if TYPE_CHECKING:
    from blockffn_compile.models.eagle import EagleHead
    from blockffn_compile.speculative.generator import Speculate

#: (tokens [T], positions [T], cache) -> logits [vocab_size] of the last token.
Step = Callable[[Tensor, Tensor, StaticCache], Tensor]

#: Name or function of a backend of ``torch.compile``; ``eager`` runs without a compiler.
Backend = str | Callable[..., Any]

#: Caches grow by doubling from here, so that few lengths, hence few graphs, are ever compiled.
SHORTEST_CACHE = 256

_compiled: WeakKeyDictionary[BlockFFNForCausalLM, dict[Backend, Callable[..., Tensor]]]
_compiled = WeakKeyDictionary()


def _forward(
    model: BlockFFNForCausalLM, tokens: Tensor, positions: Tensor, cache: StaticCache
) -> Tensor:
    return model(tokens[None], positions, cache, logits_to_keep=1)[0, -1]


def _compile(backend: Backend) -> Callable[..., Tensor]:
    if backend == "eager":
        return _forward
    compiler = functools.partial(
        torch.compile, _forward, backend=backend, fullgraph=True, isolate_recompiles=True
    )
    one, many = compiler(dynamic=False), compiler()

    def forward(
        model: BlockFFNForCausalLM, tokens: Tensor, positions: Tensor, cache: StaticCache
    ) -> Tensor:
        if len(tokens) == 1:
            return one(model, tokens, positions, cache)
        tokens, positions = tokens[:], positions[:]  # the marks are for these views alone
        torch._dynamo.mark_dynamic(tokens, 0)
        torch._dynamo.mark_dynamic(positions, 0)
        return many(model, tokens, positions, cache)

    return forward


def compile_step(model: BlockFFNForCausalLM, backend: Backend = "blockffn") -> Step:
    """The model's forward pass over a cache, compiled; kept, so that asking twice is free.

    Two graphs serve every call: one for single tokens and one for any longer run of them.
    Positions are tensors, so no step recompiles.

    Args:
        model: in eval mode.
        backend: what compiles it.
    """
    known = _compiled.setdefault(model, {})
    if backend not in known:
        known[backend] = _compile(backend)
    return functools.partial(known[backend], model)


def new_cache(model: BlockFFNForCausalLM, length: int) -> StaticCache:
    """An empty cache for one sequence of at least ``length`` tokens."""
    longest = model.config.max_position_embeddings
    size = min(SHORTEST_CACHE, longest)
    while size < length:
        size = min(2 * size, longest)
    weight = model.model.embed_tokens.weight
    return StaticCache(model.config, 1, size, weight.dtype, weight.device)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> int:
    """Draws a token from logits [vocab_size]; temperature 0 takes the best one."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float() / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def generate(
    model: BlockFFNForCausalLM,
    tokens: Tensor | Sequence[int],
    max_new_tokens: int = 128,
    *,
    backend: Backend = "blockffn",
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    speculate: Speculate = "off",
    head: EagleHead | None = None,
) -> Iterator[int]:
    """Continues a text token by token.

    Ends after ``max_new_tokens``, before the model's end-of-text token, or where the context is
    full.

    Args:
        model: in eval mode.
        tokens: [T] int64 or a list, the prompt.
        max_new_tokens: at most this many are yielded.
        backend: what compiles the step.
        temperature: 0 for greedy decoding.
        top_k: sample from the best k only.
        seed: of the sampling; without one, PyTorch's global generator draws.
        speculate: who drafts tokens ahead, see :class:`Generator`, which this makes anew for each
            call: make one yourself for several texts, or to see what a step did.
        head: an EAGLE draft head, for ``eagle`` and ``auto``.

    Returns:
        An iterator over token ids; each is computed when it is asked for.

    Raises:
        ValueError: the prompt is empty, does not fit the context or the vocabulary, or a number
            is out of range.
    """
    prompt = torch.as_tensor(
        tokens, dtype=torch.long, device=model.model.embed_tokens.weight.device
    )
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if prompt.dim() != 1 or not 0 < len(prompt) < longest:
        shape = list(prompt.shape)
        raise ValueError(f"the prompt must have 1 to {longest - 1} tokens, got shape {shape}")
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(f"the prompt has tokens outside 0..{vocabulary - 1}")
    if temperature < 0 or max_new_tokens < 0 or (top_k is not None and top_k < 1):
        raise ValueError("temperature and max_new_tokens must be >= 0, and top_k >= 1")
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    end = min(len(prompt) + max_new_tokens, longest)
    if speculate != "off":
        if backend != "blockffn":
            raise ValueError(f"speculate={speculate!r} needs backend='blockffn', not {backend!r}")
        from blockffn_compile.speculative.generator import Generator
        from blockffn_compile.speculative.sampling import Sampler

        writer = Generator(model, speculate, head=head, max_length=end)
        steps = writer(
            [prompt.tolist()],
            max_new_tokens,
            sampler=Sampler(temperature, top_k, seed=seed),
            stop_tokens=model.config.stop_tokens,
        )
        return (token for step in steps for token in step.tokens)

    # The mode is left at each yield: the decorator, unlike a `with` block, sees to it.
    @torch.no_grad()
    def decode() -> Iterator[int]:
        step, cache = compile_step(model, backend), new_cache(model, end)
        run, position = prompt, 0
        while position + len(run) < end:
            positions = torch.arange(position, position + len(run), device=run.device)
            token = sample(step(run, positions, cache), temperature, top_k, generator)
            if token == model.config.eos_token_id:
                return
            yield token
            position += len(run)
            run = torch.tensor([token], device=run.device)

    return decode()
