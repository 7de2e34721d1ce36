"""The drafter's trees against trees grown without a cache, over texts of every length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from blockffn_compile.models.eagle import EagleHead, eagle_config
from blockffn_compile.speculative.eagle import DEPTH, WIDTH, EagleDrafter, EagleModel
from blockffn_compile.speculative.tree import BEST_CHILD, DraftTree
from tests.buckets import few_buckets
from tests.conftest import make_config

LENGTH = 250
#: Catching up with more tokens than this leaves out the oldest.
MOST = 64


@pytest.fixture(scope="module", params=[None, 50], ids=["all tokens", "fifty tokens"])
def model(request, make_model):
    target = make_model(make_config(hidden_size=64, max_position_embeddings=LENGTH))
    torch.manual_seed(0)
    token_map = None if request.param is None else torch.randperm(300)[: request.param]
    head = EagleHead(eagle_config(target.config, 64), token_map).eval().requires_grad_(False)
    for parameter in head.parameters():
        if parameter.dim() == 2:  # trees with more than one shape
            parameter.mul_(2)
    with few_buckets(1):
        yield EagleModel(target, head)


class Text:
    """A text with features at random, and what the head knows of it: pairs, oldest first."""

    def __init__(self, drafter: EagleDrafter, seed: int = 0) -> None:
        self.drafter, self._generator = drafter, torch.Generator().manual_seed(seed)
        self.root = self._token()
        self.tokens: list[int] = []  # the token after each feature but the last
        self.features = torch.zeros(0, 64)
        drafter.reset()

    def _token(self) -> int:
        return int(torch.randint(300, (), generator=self._generator))

    def grow(self, *counts: int) -> None:
        """The root and what follows it are observed, ``counts`` tokens at a time."""
        for count in counts:
            tokens = [self.root, *(self._token() for _ in range(count - 1))]
            features = torch.randn(count, 64, generator=self._generator)
            self.drafter.observe(tokens, features)
            self.root = self._token()
            self.tokens += [*tokens[1:], self.root]
            self.features = torch.cat([self.features, features])

    def forget(self, start: int, end: int) -> None:
        """What the head has left out."""
        del self.tokens[start:end]
        self.features = torch.cat([self.features[:start], self.features[end:]])


def predict(
    model: EagleModel, tokens: Sequence[Sequence[int]], features: Tensor
) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Next features [N, H] of N texts, and their best tokens with log-probabilities."""
    target = model.target
    embeddings = target.model.embed_tokens(torch.tensor(tokens)) * target.config.scale_emb
    positions = torch.arange(features.shape[1])
    predicted = model.head(embeddings, features, positions, None, None)[:, -1]
    logits = target.lm_head(predicted * target.logit_scale)
    ids = torch.arange(300) if model.token_map is None else model.token_map
    best = logits[:, ids].log_softmax(-1).topk(WIDTH)
    rows = zip(ids[best.indices].tolist(), best.values.tolist(), strict=True)
    return predicted, [list(zip(*row, strict=True)) for row in rows]


def brute_force(model: EagleModel, text: Text, nodes: int) -> dict[tuple[int, ...], float]:
    """Paths of tokens with their log-probabilities, as EAGLE-2 chooses them."""
    found: dict[tuple[int, ...], float] = {(): 0.0}
    frontier: dict[tuple[int, ...], Tensor] = {
        (): text.features
    }  # features of the text and of the path
    for _ in range(min(DEPTH, nodes - 1)):
        before = torch.stack(list(frontier.values()))
        predicted, guesses = predict(model, [[*text.tokens, *path] for path in frontier], before)
        after = torch.cat([before, predicted[:, None]], dim=1)
        level: dict[tuple[int, ...], float] = {}
        features: dict[tuple[int, ...], Tensor] = {}
        for path, feature, best in zip(frontier, after, guesses, strict=True):
            for token, log_prob in best:
                level[*path, token] = found[path] + log_prob
                features[*path, token] = feature
        found |= level
        kept = sorted(level, key=level.__getitem__, reverse=True)[:WIDTH]
        frontier = {path: features[path] for path in kept}
    chosen = sorted(found, key=found.__getitem__, reverse=True)[:nodes]
    return {path: found[path] for path in chosen}


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return dict(zip(found, tree.log_probs.tolist(), strict=True))


def check(model: EagleModel, text: Text, nodes: int) -> DraftTree:
    tree = text.drafter.propose(text.root, nodes)
    want = brute_force(model, text, nodes)
    got = paths(tree)
    assert tree.tokens[0] == text.root
    assert set(got) == set(want)
    for path, log_prob in want.items():
        assert got[path] == pytest.approx(log_prob, abs=1e-3)
    return tree


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("prompt", [1, 9])
def test_tree_after_a_prompt(model, prompt, nodes):
    text = Text(EagleDrafter(model), seed=nodes)
    text.grow(prompt)
    tree = check(model, text, nodes)
    assert len(tree) == nodes
    assert tree.depths.max() <= min(DEPTH, nodes - 1)
    if nodes == 64:
        assert tree.depths.max() == DEPTH


@pytest.mark.parametrize("level_ms", [0.0, 0.001, 0.02, 0.3, 2.0])
def test_levels_that_do_not_pay_are_not_drafted(model, monkeypatch, level_ms):
    """A level pays while the best node that it grows from is probable enough."""
    monkeypatch.setattr(model, "level_ms", level_ms)
    trees = []
    for rate in (0.0, 0.3):
        text = Text(EagleDrafter(model), seed=3)
        text.grow(9)
        trees.append(text.drafter.propose(text.root, 64, rate))
    whole, tree = trees
    levels = [np.exp(whole.log_probs[whole.depths == depth]) for depth in range(1, DEPTH + 1)]
    worth = [BEST_CHILD * max(probs) for probs in levels]
    stop = next((i for i, p in enumerate(worth, 1) if p < 0.3 * level_ms), DEPTH)
    assert tree.depths.max() == stop
    assert set(paths(tree)) <= set(paths(whole))


def test_trees_after_every_step(model):
    """Nodes of earlier trees are forgotten, kept or not; some steps do not draft."""
    text = Text(EagleDrafter(model))
    text.grow(7)
    for i, counts in enumerate([(), (1,), (3,), (1, 1, 5), (6,), (2, 2)]):
        text.grow(*counts)
        check(model, text, 4 + 9 * i)


@pytest.mark.parametrize("prompt", [64, 65, 66, 129, 200])
def test_long_prompts(model, prompt):
    text = Text(EagleDrafter(model), seed=prompt)
    text.grow(prompt)
    check(model, text, 8)
    text.grow(2)
    check(model, text, 8)


@pytest.mark.parametrize(
    "counts", [(MOST,), (40, 24), (MOST + 1,), (50, 50), (90, 30, 29)], ids=str
)
def test_after_long_not_drafting_the_latest_tokens_count(model, counts):
    text = Text(EagleDrafter(model))
    text.grow(20)
    check(model, text, 4)
    text.grow(*counts)
    text.forget(20, 20 + max(0, sum(counts) - MOST))
    check(model, text, 8)
    text.grow(1)
    check(model, text, 8)


def test_a_full_cache_drafts_nothing(model):
    drafter = EagleDrafter(model)
    text = Text(drafter)
    text.grow(200)
    check(model, text, 8)
    text.grow(28)  # 228 pairs leave room for a level and more
    tree = drafter.propose(text.root, 64)
    assert tree.depths.max() == LENGTH - 228 - WIDTH * DEPTH
    for count in (2, 1, 30, 1, 64, 200):
        text.grow(count)
        assert len(drafter.propose(text.root, 64)) == 1
    again = Text(drafter)
    again.grow(5)
    check(model, again, 16)


def test_a_prompt_longer_than_the_cache(model):
    text = Text(EagleDrafter(model))
    text.grow(LENGTH + 50)
    for _ in range(3):
        assert len(text.drafter.propose(text.root, 8)) == 1
        text.grow(1)


def test_two_texts_of_one_model(model):
    first, second = (Text(EagleDrafter(model), seed) for seed in (1, 2))
    first.grow(8)
    second.grow(13)
    for text in (first, second, first):
        text.grow(3)
        check(model, text, 16)


def test_features_are_needed(model):
    with pytest.raises(ValueError, match="features"):
        EagleDrafter(model).observe([1], None)


@pytest.mark.parametrize("length", [0, -1])
def test_lengths_without_room_for_a_token(model, length):
    with pytest.raises(ValueError, match=rf"max_length {length} is not within 1\.\.{LENGTH}"):
        EagleModel(model.target, model.head, length)
    assert EagleModel(model.target, model.head, LENGTH + 1).max_length == LENGTH
