"""Long texts are those of plain decoding to the bit, cache included, for every drafter and size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from blockffn_compile.engines.engine import BUCKETS
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.models.eagle import EagleHead, eagle_config
from blockffn_compile.speculative.drafter import Drafter, FirstOf
from blockffn_compile.speculative.eagle import EagleDrafter, EagleModel
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.policy import Choice
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.small_model import ModelDrafter
from blockffn_compile.speculative.tree import DraftTree
from tests.conftest import make_config
from tests.speculative.tables import Always

PROMPT = [5, 17, 3, 250, 17, 99, 4, 61, 12]
NEW = 520


class EverySize(Always):
    """Drafts in every step, for trees of every bucket in turn, and of one node more and less."""

    def __init__(self) -> None:
        super().__init__(64)
        self._around = itertools.cycle(
            min(64, max(2, nodes + more)) for nodes in BUCKETS for more in (-1, 0, 1)
        )

    def choose(self) -> Choice:
        return Choice(0, next(self._around), False)


class Knowing:
    """Drafts the text that it was told, each token among ``others`` wrong ones."""

    name = "knowing"

    def __init__(self, text: Sequence[int], others: int) -> None:
        self._text, self._others, self._known = list(text), others, 0

    def reset(self) -> None:
        self._known = 0

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        self._known += len(tokens)

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        tokens, parents, node = [root], [-1], 0
        for right in self._text[self._known + 1 :]:
            if len(tokens) + self._others >= nodes:
                break
            level = [(right + 1 + i) % 300 for i in range(self._others)] + [right]
            parents += [node] * len(level)
            tokens += level
            node = len(tokens) - 1
        log_probs = np.zeros(len(tokens), np.float32)
        return DraftTree(np.array(tokens), np.array(parents), log_probs)


class Setting:
    """A model in one dtype, its engine, and what plain decoding writes."""

    def __init__(self, make_model, dtype: torch.dtype) -> None:
        config = make_config(hidden_size=64, num_hidden_layers=1, max_position_embeddings=640)
        self.model = make_model(config).to(dtype)
        self.engine = TorchEngine(self.model)
        self.helper = TorchEngine(self.model)
        torch.manual_seed(0)
        head = EagleHead(eagle_config(config, 64)).to(dtype).eval().requires_grad_(False)
        self.eagle = EagleModel(self.model, head)
        self.samplers = {"greedy": Sampler(), "sampled": Sampler(temperature=0.7, seed=3)}
        self.plain = {name: self.write(sampler) for name, sampler in self.samplers.items()}

    def write(self, sampler: Sampler, **options) -> tuple[list[int], list[Tensor], int]:
        """New tokens, the cache at their places, and how many tokens were drafted."""
        steps = list(decode(self.engine, [PROMPT], NEW, sampler=sampler, **options))
        tokens = [token for step in steps for token in step.tokens]
        cache = self.engine.cache
        length = len(PROMPT) + NEW - 1  # the last token is chosen, not yet run
        stored = [t[0, :, :length].clone() for t in (*cache.keys, *cache.values)]
        return tokens, stored, sum(step.drafted for step in steps)

    def drafter(self, kind: str, text: Sequence[int]) -> Drafter:
        if kind == "ngram":
            return NGramDrafter()
        if kind == "eagle":
            return EagleDrafter(self.eagle)
        if kind == "ngram+eagle":
            return FirstOf([NGramDrafter(), EagleDrafter(self.eagle)])
        if kind == "model":
            return ModelDrafter(self.helper, depth=3, width=2)
        return Knowing(text, 0 if kind == "right chain" else 2)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def setting(request, make_model) -> Setting:
    return Setting(make_model, request.param)


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize(
    "kind", ["ngram", "eagle", "ngram+eagle", "model", "right chain", "right tree"]
)
def test_long_texts_and_their_cache(setting, kind, sampling) -> None:
    want, cache, _ = setting.plain[sampling]
    assert len(want) == NEW
    text = PROMPT + want
    tokens, stored, drafted = setting.write(
        setting.samplers[sampling],
        drafters=lambda: [setting.drafter(kind, text)],
        policy=EverySize(),
    )
    assert tokens == want
    for got, expected in zip(stored, cache, strict=True):
        assert torch.equal(got, expected)
    # Heads of random weights are right by chance; nothing is drafted from sampled noise.
    if kind.startswith("right") or (kind, sampling) == ("model", "greedy"):
        assert drafted > NEW / 3
