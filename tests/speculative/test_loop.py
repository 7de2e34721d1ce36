"""Speculative decoding writes what plain decoding writes, whatever the drafts."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from itertools import islice

import pytest
import torch

from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.models.eagle import EagleHead, eagle_config
from blockffn_compile.speculative.eagle import EagleDrafter, EagleModel
from blockffn_compile.speculative.loop import Step, decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.policy import TreePolicy
from blockffn_compile.speculative.sampling import Sampler
from blockffn_compile.speculative.tree import DraftTree
from tests.buckets import few_buckets
from tests.conftest import make_config
from tests.speculative.tables import Always, Oracle, TableEngine, plain

PROMPT = [3, 1, 4, 1, 5]
PROMPTS = [PROMPT, [9], [2, 6, 5, 3, 5, 8, 9, 7]]
#: Costs under which drafts of any use pay, whatever the time that they take on a busy machine.
CHEAP = {1: 1.0e6, 2: 1.01e6, 4: 1.02e6, 8: 1.05e6, 16: 1.1e6, 32: 1.2e6, 64: 1.4e6}


def run(engine, prompts, count, **kwargs) -> tuple[list[list[int]], list[Step]]:
    """The new tokens of each text, and all steps."""
    steps = list(decode(engine, prompts, count, **kwargs))
    texts: list[list[int]] = [[] for _ in prompts]
    done = set()
    for step in steps:
        assert step.row not in done
        texts[step.row] += step.tokens
        if step.done:
            done.add(step.row)
    return texts, steps


def drafting(make=Oracle, nodes: int = 8) -> dict:
    """Arguments of decode for one drafter that is asked in every step."""
    return {"drafters": lambda: [make()], "policy": Always(nodes)}


def first(tokens: Sequence[int], token: int) -> list[int]:
    """The tokens before one."""
    return list(tokens[: tokens.index(token)]) if token in tokens else list(tokens)


# --- The same tokens ------------------------------------------------------------------------------


def test_without_drafters():
    engine = TableEngine()
    (text,), steps = run(engine, [PROMPT], 50)
    assert text == plain(PROMPT, 50)
    assert set(engine.sizes) == {1}
    assert [step.done for step in steps] == [False] * 49 + [True]


MAKERS = {
    "right": Oracle,
    "right among others": lambda: Oracle(others=2),
    "wrong": lambda: Oracle(shift=1),
    "ngram": NGramDrafter,
}
drafters = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@drafters
@pytest.mark.parametrize("nodes", [2, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_greedy(make, nodes, count):
    engine = TableEngine()
    (text,), _ = run(engine, [PROMPT], count, **drafting(make, nodes))
    assert text == plain(PROMPT, count)


@drafters
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(temperature=0.7, top_p=0.9, seed=3),
        Sampler(temperature=1.5, top_k=4, repetition_penalty=1.3, seed=2**64 - 1),
        Sampler(repetition_penalty=1.5, seed=0),
    ],
    ids=["top-p", "top-k", "penalty"],
)
def test_sampling(make, sampler):
    (want,), _ = run(TableEngine(), [PROMPT], 200, sampler=sampler)
    assert want != plain(PROMPT, 200)
    (text,), _ = run(TableEngine(), [PROMPT], 200, sampler=sampler, **drafting(make))
    assert text == want


def test_under_the_policy_with_two_drafters():
    policy = TreePolicy(CHEAP, [0.0, 0.0])
    makers = {"drafters": lambda: [Oracle(shift=1), Oracle()], "policy": policy}
    engine = TableEngine()
    (text,), steps = run(engine, [PROMPT], 900, **makers)
    assert text == plain(PROMPT, 900)
    assert sum(step.drafted for step in steps) > 600
    # What the policy has learnt serves the next text.
    engine.sizes.clear()
    run(engine, [PROMPTS[1]], 100, **makers)
    assert len(engine.sizes) < 15


def test_a_right_drafter_fills_its_trees():
    engine = TableEngine()
    _, steps = run(engine, [PROMPT], 41, **drafting(nodes=8))
    assert engine.sizes == [8] * 5
    assert [step.tokens for step in steps[1:]] == [
        plain(PROMPT, 41)[1 + i : 9 + i] for i in range(0, 40, 8)
    ]


# --- Where texts end ------------------------------------------------------------------------------


def test_no_new_tokens():
    assert list(decode(TableEngine(), PROMPTS[:1], 0)) == []


def test_no_prompts():
    assert list(decode(TableEngine(), [], 5)) == []


@pytest.mark.parametrize("length", range(len(PROMPT), len(PROMPT) + 20))
@pytest.mark.parametrize("others", [0, 2])
def test_the_context_ends_inside_a_tree(length, others):
    engine = TableEngine(max_length=length)
    (text,), _ = run(engine, [PROMPT], 100, **drafting(lambda: Oracle(others=others)))
    assert text == plain(PROMPT, length - len(PROMPT))


@pytest.mark.parametrize("position", range(10))
def test_stop_tokens_inside_an_accepted_path(position):
    whole = plain(PROMPT, 60)
    token = whole[position]
    (text,), steps = run(TableEngine(), [PROMPT], 60, stop_tokens={token, -1}, **drafting())
    assert text == first(whole, token)
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(step.drafted <= len(step.tokens) for step in steps)


@pytest.mark.parametrize("position", range(12))
def test_stop_is_seen_in_the_middle_of_a_step(position):
    """Ends a text before the first occurrence of a pair, as a search for a string does."""
    whole = plain(PROMPT, 60)
    pair = whole[position : position + 2]
    seen: list[list[int]] = []

    def stop(tokens: Sequence[int]) -> int | None:
        seen.append(list(tokens))
        places = range(len(tokens) - 1)
        return next((i for i in places if list(tokens[i : i + 2]) == pair), None)

    want = whole[: next(i for i in range(60) if whole[i : i + 2] == pair)]
    (text,), steps = run(TableEngine(), [PROMPT], 60, stop=stop, **drafting())
    # What had been yielded before the pair was complete cannot be taken back.
    assert text[: len(want)] == want
    assert len(text) <= len(want) + 1
    assert steps[-1].done
    assert all(tokens == whole[: len(tokens)] for tokens in seen)
    (alone,), _ = run(TableEngine(), [PROMPT], 60, stop=stop)
    assert alone == whole[: len(want) + 1]


def test_stop_at_once():
    (text,), steps = run(TableEngine(), [PROMPT], 9, stop=lambda _: 0)
    assert text == []
    assert [step.done for step in steps] == [True]


# --- Several texts --------------------------------------------------------------------------------


@drafters
def test_several_texts_are_each_alone(make):
    engine = TableEngine(rows=4)
    texts, steps = run(engine, PROMPTS, 80, **drafting(make, 64))
    assert texts == [plain(prompt, 80) for prompt in PROMPTS]
    assert max(engine.sizes) <= 64
    assert {step.row for step in steps} == {0, 1, 2}


def test_a_text_that_ends_leaves_the_others_alone():
    whole = [plain(prompt, 80) for prompt in PROMPTS]
    token = whole[0][10]
    texts, _ = run(TableEngine(rows=3), PROMPTS, 80, stop_tokens=[token], **drafting())
    assert texts == [first(text, token) for text in whole]
    assert len({len(text) for text in texts}) > 1


def test_texts_draw_from_streams_of_their_own():
    """Row i draws as a text alone does with the seed i higher, around the end of the seeds."""
    sampler = Sampler(temperature=1.0, seed=2**64 - 2)
    texts, _ = run(TableEngine(rows=3), [PROMPT] * 3, 60, sampler=sampler, **drafting())
    for row, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = Sampler(temperature=1.0, seed=seed)
        assert run(TableEngine(), [PROMPT], 60, sampler=alone)[0] == [texts[row]]
    assert len({tuple(text) for text in texts}) == 3


def test_as_many_texts_as_an_engine_takes():
    prompts = [[i % 12, i // 12] for i in range(64)]
    texts, _ = run(TableEngine(rows=64), prompts, 5, **drafting())
    assert texts == [plain(prompt, 5) for prompt in prompts]


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        (1, PROMPTS, "3 prompts for an engine of 1 rows"),
        (100, [[1]] * 65, "65 prompts"),
        (1, [[]], "0 tokens"),
        (1, [[1] * 1001], "1001 tokens"),
        (1, [[12]], "outside the vocabulary"),
    ],
    ids=["rows", "nodes", "empty", "long", "vocabulary"],
)
def test_wrong_prompts(rows, prompts, message):
    with pytest.raises(ValueError, match=message):
        list(decode(TableEngine(rows=rows), prompts, 5))


def test_a_dropped_iterator_leaves_the_engine_reusable():
    engine = TableEngine()
    for taken in (1, 2, 5):
        assert len(list(islice(decode(engine, [PROMPTS[2]], 90, **drafting()), taken))) == taken
        assert run(engine, [PROMPT], 50, **drafting())[0] == [plain(PROMPT, 50)]


# --- Drafters that fail ---------------------------------------------------------------------------


class Bad(Oracle):
    """Fails in one way at the third proposal; right before."""

    name = "bad"
    calls = 0

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        self.calls += 1
        return super().propose(root, nodes) if self.calls < 3 else self.fail(root, nodes)

    def fail(self, root: int, nodes: int) -> DraftTree:
        raise RuntimeError("lost my way")


class WrongRoot(Bad):
    def fail(self, root, nodes):
        return Oracle.propose(self, (root + 1) % 12, nodes)


class OutOfRange(Bad):
    def fail(self, root, nodes):
        return DraftTree.chain(root, [12], [-1.0])


class TooLarge(Bad):
    def fail(self, root, nodes):
        return Oracle.propose(self, root, nodes + 1)


class NoTree(Bad):
    def fail(self, root, nodes):
        return None


class Malformed(Bad):
    def fail(self, root, nodes):
        return DraftTree.chain(root, [1], [1.0])


class Deaf(Bad):
    def fail(self, root, nodes):
        return DraftTree.root(root)

    def observe(self, tokens, features):
        super().observe(tokens, features)
        if len(self.text) > 12:
            raise OverflowError("too much")


FAILURES = {
    Bad: "lost my way",
    WrongRoot: "root",
    OutOfRange: r"outside 0\.\.11",
    TooLarge: "the tree has 9 nodes, at most 8",
    NoTree: "NoneType",
    Malformed: "log-probability",
    Deaf: "too much",
}


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_a_drafter_that_fails_is_left_out(kind, caplog):
    drafters: list[Bad] = []

    def make() -> list[Oracle]:
        drafters.append(kind())
        return [drafters[-1], Oracle()]

    with caplog.at_level(logging.WARNING, "blockffn_compile"):
        (text,), steps = run(TableEngine(), [PROMPT], 200, drafters=make, policy=Always(8, 2))
    assert text == plain(PROMPT, 200)
    (record,) = caplog.records
    assert "drafter bad failed" in record.message
    assert re.search(FAILURES[kind], record.message)
    assert drafters[0].calls <= 3
    # The other one goes on, and the next text may try the first again.
    assert {step.drafter for step in steps[-4:]} >= {"oracle"}
    assert sum(step.drafted for step in steps[-4:]) > 0
    assert run(TableEngine(), [PROMPT], 20, drafters=make, policy=Always(8, 2))[0][0] == text[:20]
    assert drafters[1].calls > 0


def test_engines_without_features():
    (text,), steps = run(TableEngine(features=False), [PROMPT], 50, **drafting())
    assert text == plain(PROMPT, 50)
    assert sum(step.drafted for step in steps) > 30


# --- What drafters see, and what steps say --------------------------------------------------------


@pytest.mark.parametrize("others", [0, 3])
def test_drafters_observe_the_text_and_its_features(others):
    made: list[Oracle] = []

    def make() -> list[Oracle]:
        made.append(Oracle(others=others))
        return made[-1:]

    run(TableEngine(), [PROMPT], 60, drafters=make, policy=Always(9))
    (oracle,) = made
    whole = PROMPT + plain(PROMPT, 80)
    assert len(oracle.text) >= len(PROMPT) + 59
    assert oracle.text == whole[: len(oracle.text)]
    assert oracle.features == [[token, i] for i, token in enumerate(oracle.text)]


def test_steps_account_for_every_token():
    engine = TableEngine()
    (text,), steps = run(engine, [PROMPT], 60, **drafting(lambda: Oracle(others=2), 10))
    start, *steps = steps
    assert (start.nodes, start.drafted, start.drafter, len(start.tokens)) == (0, 0, None, 1)
    assert [step.nodes for step in steps] == engine.sizes
    for step in steps[:-1]:
        assert step.row == 0
        assert not step.done
        assert step.drafter == "oracle"
        assert step.drafted == len(step.tokens) - 1
        assert step.drafted <= (step.nodes - 1) / 3
        assert step.draft_ms > 0
        assert step.verify_ms > 0
    assert steps[-1].done
    assert 1 + sum(len(step.tokens) for step in steps) == len(text)


def test_a_plain_step_names_no_drafter():
    _, steps = run(TableEngine(), [PROMPT], 20, **drafting(nodes=1))
    assert {(step.drafter, step.drafted, step.draft_ms) for step in steps} == {(None, 0, 0.0)}


# --- With models ----------------------------------------------------------------------------------

TEXT = [5, 17, 3, 250, 17, 99, 4, 61, 12]


@pytest.fixture(scope="module")
def engines(make_model):
    """Two engines of one model; graphs of up to eight nodes."""
    model = make_model(make_config(hidden_size=64, num_hidden_layers=1, max_position_embeddings=80))
    pair = [TorchEngine(model, rows=2) for _ in range(2)]
    for engine in pair:
        list(engine.warm_up((1, 2, 4, 8)))
    return pair


@pytest.fixture(scope="module")
def eagle(engines):
    target = engines[0].model
    torch.manual_seed(0)
    head = EagleHead(eagle_config(target.config, 64)).eval().requires_grad_(False)
    return EagleModel(target, head)


@pytest.fixture
def _few_graphs():
    with few_buckets(1, 2, 4, 8):
        yield


@pytest.mark.usefixtures("_few_graphs")
@pytest.mark.parametrize(
    "sampler", [Sampler(seed=0), Sampler(temperature=0.2, seed=7)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("kind", ["ngram", "eagle"])
def test_a_model_writes_the_same_with_drafts(engines, eagle, kind, sampler):
    """To the end of its context, and two texts at once."""
    make = NGramDrafter if kind == "ngram" else lambda: EagleDrafter(eagle)
    prompts = [TEXT, TEXT[2:6]]
    want, _ = run(engines[0], prompts, 500, sampler=sampler)
    assert [len(text) for text in want] == [80 - 9, 80 - 4]
    texts, steps = run(engines[0], prompts, 500, sampler=sampler, **drafting(make, 4))
    assert texts == want
    assert any(step.nodes > 1 for step in steps)
    # A head of random weights is right by chance only.
    assert kind == "eagle" or any(step.drafted for step in steps)
    (alone,), _ = run(engines[0], prompts[:1], 500, sampler=sampler, **drafting(make))
    assert alone == want[0]


@pytest.mark.usefixtures("_few_graphs")
def test_two_loops_in_two_threads(engines):
    want = [run(engines[0], [prompt], 60)[0] for prompt in (TEXT, TEXT[::-1])]
    got: list = [None, None]

    def work(i: int, prompt: list[int]) -> None:
        got[i] = [run(engines[i], [prompt], 60, **drafting(NGramDrafter))[0] for _ in range(3)]

    threads = [
        threading.Thread(target=work, args=(i, prompt))
        for i, prompt in enumerate((TEXT, TEXT[::-1]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[text] * 3 for text in want]
