from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from blockffn_compile.speculative.acceptance import Accepted, accept
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import DraftTree

#: text -> logits [V]
Target = Callable[[tuple[int, ...]], Tensor]


def random_target(vocab_size: int, seed: int) -> Target:
    """A table of random logits for each pair of last tokens."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[tuple[int, ...], Tensor] = {}

    def target(text: tuple[int, ...]) -> Tensor:
        key = text[-2:]
        if key not in table:
            table[key] = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        return table[key]

    return target


def random_tree(rng: random.Random, root: int, vocab_size: int, n: int) -> DraftTree:
    tokens, parents = [root], [-1]
    taken: defaultdict[int, set[int]] = defaultdict(set)
    while len(tokens) < n:
        parent, token = rng.randrange(len(tokens)), rng.randrange(vocab_size)
        if token not in taken[parent]:
            taken[parent].add(token)
            tokens.append(token)
            parents.append(parent)
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(n, np.float32))


def verify(target: Target, text: tuple[int, ...], tree: DraftTree) -> Tensor:
    """What a target returns: logits [N, V], each row after its node's path."""
    paths = [text]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return torch.stack([target(path) for path in paths])


def plain(target: Target, sampler: Sampler, text: tuple[int, ...], count: int) -> tuple[int, ...]:
    for _ in range(count):
        text = (*text, sampler.choose(target(text), text, len(text)))
    return text


def speculative(
    target: Target, sampler: Sampler, text: tuple[int, ...], count: int, rng: random.Random
) -> tuple[tuple[int, ...], int]:
    """The text, and the number of steps it took."""
    end, steps = len(text) + count, 0
    while len(text) < end:
        vocab_size = len(target(text))
        tree = random_tree(rng, text[-1], vocab_size, rng.randint(1, 12))
        text += tuple(accept(tree, verify(target, text, tree), sampler, text, len(text)).tokens)
        steps += 1
    return text[:end], steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.4},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.2, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_the_text_is_that_of_plain_decoding_draw_for_draw(settings) -> None:
    rng = random.Random(0)
    for seed in range(6):
        target, sampler = random_target(5, seed), Sampler(**settings, seed=seed)
        text, steps = speculative(target, sampler, (1, 2), 40, rng)
        assert text == plain(target, sampler, (1, 2), 40)
        assert steps < 40  # drafts were accepted


class Script(Sampler):
    """Chooses what it is told, then token 0, and notes how probable all choices were."""

    script: list[int]
    made: list[int]
    choices: list[list[float]]

    def follow(self, script: Sequence[int]) -> None:
        self.__dict__.update(script=list(script), made=[], choices=[])

    def choose(self, logits, history, position) -> int:
        assert position == len(history)
        made = len(self.made)
        token = self.script[made] if made < len(self.script) else 0
        self.made.append(token)
        self.choices.append(self.distribution(logits, history).tolist())
        return token


def outcomes(run: Callable[[Script], tuple[int, ...]], sampler: Script) -> dict[tuple, float]:
    """The exact distribution of what ``run`` returns: every way the draws can fall."""
    probability: defaultdict[tuple, float] = defaultdict(float)
    pending: list[list[int]] = [[]]
    while pending:
        script = pending.pop()
        sampler.follow(script)
        result = run(sampler)
        probability[result] += math.prod(
            choice[token] for choice, token in zip(sampler.choices, sampler.made, strict=True)
        )
        for i in range(len(script), len(sampler.made)):
            pending += [[*sampler.made[:i], token] for token in range(1, len(sampler.choices[i]))]
    return probability


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_distribution_is_that_of_plain_decoding(penalty, seed) -> None:
    sampler = Script(temperature=0.9, min_p=0.05, repetition_penalty=penalty)
    target = random_target(3, seed)
    expected = outcomes(lambda s: plain(target, s, (0, 1), 4), sampler)
    found = outcomes(lambda s: speculative(target, s, (0, 1), 4, random.Random(seed))[0], sampler)
    assert sum(expected.values()) == pytest.approx(1)
    for text in expected.keys() | found.keys():
        assert found[text] == pytest.approx(expected[text], abs=1e-12)


def chi_square(method: Callable[..., Accepted], draws: int = 10_000) -> float:
    """Of the first token against the target, 2 degrees of freedom; token 0 is drafted."""
    probs = torch.tensor([0.02, 0.48, 0.5], dtype=torch.float64)
    tree = DraftTree.chain(1, [0], [-0.1])
    logits, sampler = probs.log().expand(2, 3), Sampler(temperature=1.0, seed=11)
    first = Counter(
        method(tree, logits, sampler, [], position).tokens[0] for position in range(draws)
    )
    return sum((first[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(probs.tolist()))


def test_drafted_tokens_are_not_favoured_by_one_percent() -> None:
    """A drafted token that the target seldom chooses would show it: so the biased method does."""
    rng = random.Random(0)

    def biased(tree: DraftTree, *arguments) -> Accepted:
        honest = accept(tree, *arguments)
        return Accepted([0, 1], [0, honest.tokens[-1]]) if rng.random() < 0.01 else honest

    critical = 13.8  # p = 0.001
    assert chi_square(accept) < critical
    assert chi_square(biased) > critical


#   0 (5) -> 1 (3) -> 3 (4) -> 4 (3)
#         -> 2 (4)
TREE = DraftTree(
    np.array([5, 3, 4, 4, 3]), np.array([-1, 0, 0, 1, 3]), np.zeros(5, dtype=np.float32)
)


def one_hot(*tokens: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 6).float()


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1e-3)], ids=["argmax", "draws"])
@pytest.mark.parametrize(
    ("best", "path", "tokens"),
    [
        ((0, 0, 0, 0, 0), [0], [0]),
        ((4, 0, 1, 0, 0), [0, 2], [4, 1]),
        ((3, 2, 0, 0, 0), [0, 1], [3, 2]),
        ((3, 4, 0, 3, 3), [0, 1, 3, 4], [3, 4, 3, 3]),
    ],
    ids=["none", "one, the later sibling", "one", "all"],
)
def test_walks(sampler, best, path, tokens) -> None:
    assert accept(TREE, one_hot(*best), sampler, [], 0) == (path, tokens)


def test_a_bare_root_is_a_plain_step() -> None:
    assert accept(DraftTree.root(1), one_hot(2), Sampler(), [], 0) == ([0], [2])


def test_stop_tokens_end_the_walk_as_the_last_token() -> None:
    logits = one_hot(3, 4, 0, 3, 3)
    assert accept(TREE, logits, Sampler(), [], 0, stop_tokens={4}) == ([0, 1], [3, 4])
    assert accept(TREE, logits, Sampler(), [], 0, stop_tokens=[3]) == ([0], [3])
    assert accept(TREE, logits, Sampler(), [], 0, stop_tokens=(5,)).path == [0, 1, 3, 4]


@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (5,), (1, 5, 6)])
def test_other_shapes_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"5 nodes need logits \[5, V\]"):
        accept(TREE, torch.zeros(shape), Sampler(), [], 0)


def test_the_history_is_left_alone() -> None:
    history = [1, 2]
    accept(TREE, one_hot(3, 4, 0, 3, 3), Sampler(repetition_penalty=1.1), history, 2)
    assert history == [1, 2]
