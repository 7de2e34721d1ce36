"""The decoding loop: draft, verify, accept, commit; over one text or several at once.

What it yields is what plain decoding with the same engine and sampler would: drafts decide only
how many tokens come out of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from blockffn_compile.engines.engine import BUCKETS, Engine, wait
from blockffn_compile.speculative.acceptance import accept
from blockffn_compile.speculative.drafter import Drafter
from blockffn_compile.speculative.policy import PLAIN, Choice, TreePolicy
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import DraftTree

log = logging.getLogger("blockffn_compile")

#: New tokens of a text -> how many of them to keep, where the text is to end; None to go on.
Stop = Callable[[Sequence[int]], int | None]


@dataclass(frozen=True)
class Step:
    """What one step did for one text.

    Attributes:
        row: the text's index among the prompts.
        tokens: that the text grew by; a token or string that stops it is left out.
        drafted: how many of these, the first ones, were drafted.
        nodes: size of the tree verified, root included; 0 for the first step, the prompt's.
        drafter: name of the drafter, None for a plain step.
        draft_ms: milliseconds spent on the draft.
        verify_ms: milliseconds of the verification, of all texts together.
        done: the text ends here.
    """

    row: int
    tokens: list[int]
    drafted: int
    nodes: int
    drafter: str | None
    draft_ms: float
    verify_ms: float
    done: bool


@dataclass
class _Text:
    """A text in the making."""

    row: int
    tokens: list[int]  # prompt and new ones; the last is the root, not yet in the cache
    prompt: int
    end: int  # most tokens
    drafters: list[Drafter]
    policy: TreePolicy
    choice: Choice = PLAIN
    draft_ms: float = 0.0

    def draft(self, most: int, vocab_size: int) -> DraftTree:
        """A tree of at most ``most`` nodes; a drafter that fails is not asked again."""
        self.choice, self.draft_ms = self.policy.choose(), 0.0
        root, index = self.tokens[-1], self.choice.drafter
        # The last node's token needs no place of its own: it is the next root.
        most = min(most, self.choice.nodes, self.end - len(self.tokens))
        if index is None or most < 2:
            self.choice = PLAIN
            return DraftTree.root(root)
        start = time.perf_counter()
        try:
            tree = self.drafters[index].propose(root, most, self.choice.rate)
            tree.check(vocab_size, most)
            if tree.tokens[0] != root:
                raise ValueError(f"the tree's root is {tree.tokens[0]}, the text ends in {root}")
        except Exception as error:
            self._drop(index, error)
            self.choice = PLAIN
            return DraftTree.root(root)
        self.draft_ms = (time.perf_counter() - start) * 1e3
        return self.policy.trim(self.choice, tree)

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        for index, drafter in enumerate(self.drafters):
            try:
                drafter.observe(tokens, features)
            except Exception as error:
                self._drop(index, error)

    def _drop(self, index: int, error: Exception) -> None:
        log.warning("drafter %s failed and is left out: %s", self.drafters[index].name, error)
        self.drafters[index] = _Silent()


class _Silent:
    """In the place of a drafter that failed."""

    name = "none"

    def reset(self) -> None: ...

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None: ...

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        return DraftTree.root(root)


def decode(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    drafters: Callable[[], Sequence[Drafter]] = tuple,
    policy: TreePolicy | None = None,
    sampler: Sampler | None = None,
    stop_tokens: Collection[int] = (),
    stop: Stop | None = None,
) -> Iterator[Step]:
    """Continues texts, each at a row of the engine.

    A text ends after ``max_new_tokens``, before a stop token, where ``stop`` says, or where the
    engine's context is full.  Between two steps the iterator may be dropped: the engine takes new
    texts at any time.

    Args:
        engine: at least as many rows as prompts.
        prompts: token ids.
        max_new_tokens: for each text.
        drafters: makes the drafters of one text; none decodes plainly.
        policy: for as many drafters, over :func:`cost.measure`; what it has learnt serves the
            next texts too.  Needed with drafters.
        sampler: default greedy.  Texts at different rows draw from different streams.
        stop_tokens: end a text; they are not yielded.
        stop: looks at the new tokens of a text after each step.

    Yields:
        A :class:`Step` per unfinished text and round; the first ones follow the prompts.

    Raises:
        ValueError: too many prompts, or one is empty, too long or outside the vocabulary.
    """
    if len(prompts) > min(engine.rows, BUCKETS[-1]):
        raise ValueError(f"{len(prompts)} prompts for an engine of {engine.rows} rows")
    sampler = sampler or Sampler()
    # Texts draw from different streams.
    samplers = [
        replace(sampler, seed=((sampler.seed or 0) + row) % 2**64) for row in range(len(prompts))
    ]
    policy = policy or TreePolicy({1: 1.0})
    texts: list[_Text] = []

    def advance(text: _Text, tokens: list[int], nodes: int, verify_ms: float) -> Step:
        drafted = len(tokens) - 1
        tokens = tokens[: text.end - len(text.tokens)]
        stopped = next((i for i, token in enumerate(tokens) if token in stop_tokens), None)
        done = stopped is not None
        tokens = tokens[:stopped]
        new = len(text.tokens) - text.prompt
        text.tokens += tokens
        if stop is not None and (keep := stop(text.tokens[text.prompt :])) is not None:
            tokens, done = tokens[: max(keep - new, 0)], True
        done = done or len(text.tokens) >= text.end
        index = text.choice.drafter
        name = None if index is None else text.drafters[index].name
        drafted = min(drafted, len(tokens))
        return Step(text.row, tokens, drafted, nodes, name, text.draft_ms, verify_ms, done)

    for row, prompt in enumerate(prompts):
        start = time.perf_counter()
        output = engine.prefill(row, prompt)
        end = min(len(prompt) + max_new_tokens, engine.max_length)
        text = _Text(row, list(prompt), len(prompt), end, list(drafters()), policy)
        if text.end == len(prompt):
            continue
        text.observe(prompt, output.features)
        token = samplers[row].choose(output.logits[-1], text.tokens, len(prompt))
        step = advance(text, [token], 0, (time.perf_counter() - start) * 1e3)
        if not step.done:
            texts.append(text)
        yield step

    while texts:
        most = BUCKETS[-1] // len(texts)
        trees = {text.row: text.draft(most, engine.vocab_size) for text in texts}
        start = time.perf_counter()
        outputs = engine.verify(trees)
        wait(outputs)
        verify_ms = (time.perf_counter() - start) * 1e3
        # Of trees of one size, each has an equal share.
        alike = len({len(tree) for tree in trees.values()}) == 1
        share = verify_ms / len(texts) if alike else None
        steps = []
        for text in texts:
            tree, (logits, features) = trees[text.row], outputs[text.row]
            path, tokens = accept(
                tree, logits, samplers[text.row], text.tokens, len(text.tokens), stop_tokens
            )
            engine.commit(text.row, path)
            text.policy.update(text.choice, tree, path, text.draft_ms, share)
            kept = [text.tokens[-1], *tokens[:-1]]
            if features is not None:
                # A slice is cheaper than a gather, and the best path is often the first.
                whole = path == list(range(len(path)))
                features = features[: len(path)] if whole else features[path]
            text.observe(kept, features)
            steps.append(advance(text, tokens, len(tree), verify_ms))
        texts = [text for text, step in zip(texts, steps, strict=True) if not step.done]
        yield from steps
