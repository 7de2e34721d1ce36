"""A model made ready to write: its engine, drafters and policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from tokenizers import Tokenizer

from blockffn_compile.engines.engine import BUCKETS
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.models.eagle import EagleHead
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative import cost
from blockffn_compile.speculative.drafter import Drafter
from blockffn_compile.speculative.eagle import COUNTS, EagleDrafter, EagleModel
from blockffn_compile.speculative.loop import Step, Stop, decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.policy import TRIAL_NODES, TreePolicy
from blockffn_compile.speculative.sampling import Sampler

#: ``auto`` drafts with whatever there is, and only where it pays.
Speculate = Literal["auto", "eagle", "ngram", "off"]


class Generator:
    """Continues texts with a model, several at a time.

    Compiles for every token count when it is made, and measures what each costs; nothing compiles
    later.  What the policy learns about the drafters stays.

    Attributes:
        engine: that runs the model.
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        speculate: Speculate = "auto",
        *,
        head: EagleHead | None = None,
        rows: int = 1,
        max_length: int | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        """Compiles and measures.

        Args:
            model: in eval mode.
            speculate: who drafts: the n-grams of the text itself, an EAGLE head, both or nobody.
            head: for ``eagle``, and for ``auto`` where there is one.
            rows: most texts at a time.
            max_length: of a text; default the model's context.
            progress: called with the graphs compiled so far and their number.

        Raises:
            ValueError: ``speculate`` is unknown, or ``eagle`` without a head.
        """
        if speculate not in ("auto", "eagle", "ngram", "off"):
            raise ValueError(f"speculate is {speculate!r}; choose auto, eagle, ngram or off")
        if speculate == "eagle" and head is None:
            raise ValueError(
                "speculate='eagle' needs a draft head: load one with load_eagle, or train one "
                "with `blockffn train-drafter`"
            )
        self.engine = TorchEngine(model, rows, max_length)
        self._makers: list[Callable[[], Drafter]] = []
        eagle = None
        if speculate in ("auto", "ngram"):
            self._makers.append(NGramDrafter)
        if speculate in ("auto", "eagle") and head is not None:
            eagle = EagleModel(model, head, self.engine.max_length)
            self._makers.append(lambda: EagleDrafter(eagle))
        # Plain decoding verifies a node for each text.
        buckets = BUCKETS if self._makers else [n for n in BUCKETS if n < 2 * rows]
        total, done = len(buckets) + (len(COUNTS) if eagle else 0), 0

        def tick(bucket: int) -> None:
            nonlocal done
            done += 1
            progress(done, total)

        for bucket in self.engine.warm_up(buckets):
            tick(bucket)
        self._cost = {1: 1.0}
        if self._makers:
            weight = model.model.embed_tokens.weight
            size = sum(parameter.nbytes for parameter in model.parameters())
            shape = (model.config, weight.dtype, size, rows, self.engine.max_length)
            self._cost = cost.recall(self.engine, weight.device, str(shape))
        self._draft_ms = [0.0] * len(self._makers)
        if eagle is not None:
            for bucket in eagle.warm_up():
                tick(bucket)
            self._draft_ms[-1] = eagle.level_ms * (TRIAL_NODES - 1)
        self._policies: dict[int, TreePolicy] = {}

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampler: Sampler | None = None,
        stop_tokens: Collection[int] = (),
        stop: Stop | None = None,
    ) -> Iterator[Step]:
        """Continues texts; see :func:`decode`."""
        texts = max(1, len(prompts))
        if texts not in self._policies:
            share = cost.share(self._cost, texts)
            self._policies[texts] = TreePolicy(share, self._draft_ms)
        return decode(
            self.engine,
            prompts,
            max_new_tokens,
            drafters=lambda: [make() for make in self._makers],
            policy=self._policies[texts],
            sampler=sampler,
            stop_tokens=stop_tokens,
            stop=stop,
        )


def stop_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Stop:
    """Ends a text at the first token that completes one of ``strings``.

    Raises:
        ValueError: one of the strings is empty.
    """
    if not all(strings):
        raise ValueError("a stop string is empty")
    # Every token adds at least a byte, so that many of them hold the longest string.
    reach = max((len(s.encode()) for s in strings), default=0)

    def stop(tokens: Sequence[int]) -> int | None:
        for end in range(max(1, len(tokens) - BUCKETS[-1]), len(tokens) + 1):
            text = tokenizer.decode(
                list(tokens[max(0, end - reach) : end]), skip_special_tokens=False
            )
            if any(string in text for string in strings):
                return end
        return None

    return stop
