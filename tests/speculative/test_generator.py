"""The generator over a tiny model, and stop strings."""

from __future__ import annotations

import itertools
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from blockffn_compile.generation import generate
from blockffn_compile.models.eagle import EagleHead, eagle_config
from blockffn_compile.speculative.generator import Generator, stop_at
from blockffn_compile.speculative.sampling import Sampler
from tests.buckets import few_buckets
from tests.conftest import make_config

PROMPT = [5, 17, 3, 250, 17]
PROMPTS = [PROMPT, [9], [8, 6, 4, 2, 0, 1, 3]]
BUCKETS = (1, 8)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_buckets(*BUCKETS):
        yield


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(make_config())


@pytest.fixture(scope="module")
def made(model):
    """A drafting generator of three rows, and what it told of its progress."""
    calls: list[tuple[int, int]] = []
    generator = Generator(model, rows=3, progress=lambda done, total: calls.append((done, total)))
    assert set(generator._cost) == set(BUCKETS)
    # So dear that no draft takes time worth mentioning, however busy the machine.
    generator._cost = {1: 1e6, 8: 1.1e6}
    return generator, calls


@pytest.fixture
def generator(made) -> Generator:
    return made[0]


def texts(generator: Generator, prompts, count: int, **options) -> list[list[int]]:
    new: list[list[int]] = [[] for _ in prompts]
    for step in generator(prompts, count, **options):
        new[step.row] += step.tokens
    return new


# --- The generator --------------------------------------------------------------------------------


def test_progress_counts_every_graph(made, model) -> None:
    assert made[1] == [(1, 2), (2, 2)]
    calls: list[tuple[int, int]] = []
    Generator(model, "off", progress=lambda *call: calls.append(call))
    assert calls == [(1, 1)]
    calls.clear()
    head = EagleHead(eagle_config(model.config, 24)).eval().requires_grad_(False)
    generator = Generator(model, head=head, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total in calls} == {len(calls)} == {len(BUCKETS) + 2}
    assert texts(generator, [PROMPT], 20) == [list(generate(model, PROMPT, 20, backend="eager"))]


def test_drafts_change_nothing(generator, model) -> None:
    steps = list(generator([PROMPT], 60))
    new = [token for step in steps for token in step.tokens]
    assert new == list(generate(model, PROMPT, 60, backend="eager"))
    assert any(step.drafted for step in steps)


def test_several_prompts_are_each_as_alone(generator) -> None:
    together = texts(generator, PROMPTS, 30)
    assert together == [texts(generator, [prompt], 30)[0] for prompt in PROMPTS]
    assert len({tuple(new) for new in together}) == 3


def test_sampled_rows_draw_from_streams_of_their_own(generator) -> None:
    sampler = Sampler(temperature=1.0, seed=7)
    together = texts(generator, [PROMPT, PROMPT], 30, sampler=sampler)
    assert together[0] == texts(generator, [PROMPT], 30, sampler=sampler)[0]
    assert together[0] != together[1]


def test_no_prompts_and_no_new_tokens(generator) -> None:
    assert list(generator([], 5)) == []
    assert list(generator([PROMPT], 0)) == []


def test_what_was_learnt_is_kept_for_each_number_of_texts(generator) -> None:
    texts(generator, [PROMPT], 30)
    alone = generator._policies[1]
    steps = alone._steps + alone._plain
    texts(generator, [PROMPT], 30)
    assert generator._policies[1] is alone
    assert alone._steps + alone._plain > steps
    texts(generator, PROMPTS, 3)
    assert generator._policies[3] is not alone
    assert generator._policies[1] is alone


def test_a_drafter_belongs_to_one_text(generator, caplog) -> None:
    """A text that was left in the middle leaves nothing behind."""
    expected = texts(generator, [PROMPT], 30)
    with caplog.at_level(logging.WARNING, "blockffn_compile"):
        list(itertools.islice(generator(PROMPTS, 30), 7))
        assert texts(generator, [PROMPT], 30) == expected
    assert not caplog.records


def test_stop_tokens_and_strings(generator) -> None:
    (new,) = texts(generator, [PROMPT], 30)
    at = next(i for i, token in enumerate(new) if token not in new[:i] and i > 2)
    assert texts(generator, [PROMPT], 30, stop_tokens=[new[at]]) == [new[:at]]

    def stop(tokens):
        return at + 1 if len(tokens) > at else None

    assert texts(generator, [PROMPT], 30, stop=stop) == [new[: at + 1]]


@pytest.mark.parametrize("speculate", ["", "on", "Eagle", None])
def test_unknown_ways_to_speculate(model, speculate) -> None:
    with pytest.raises(ValueError, match=f"speculate is {speculate!r}; choose auto"):
        Generator(model, speculate)


def test_errors(generator, model) -> None:
    with pytest.raises(ValueError, match="needs a draft head"):
        Generator(model, "eagle")
    with pytest.raises(ValueError, match=r"within 1\.\.128"):
        Generator(model, "off", max_length=129)
    with pytest.raises(ValueError, match="4 prompts for an engine of 3 rows"):
        list(generator([PROMPT] * 4, 5))
    with pytest.raises(ValueError, match="a text of 0 tokens"):
        list(generator([[]], 5))
    with pytest.raises(ValueError, match="token 300"):
        list(generator([[300]], 5))


# --- Stop strings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and a few tokens of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def kept(tokenizer: Tokenizer, pieces: list[str], strings: list[str]) -> int | None:
    """How many tokens are kept when one after the other arrives."""
    tokens: list[int] = []
    stop = stop_at(tokenizer, strings)
    for piece in pieces:
        tokens += tokenizer.encode(piece).ids
        if (found := stop(tokens)) is not None:
            assert found <= len(tokens)
            return found
    return None


@pytest.mark.parametrize(
    ("pieces", "strings", "expected"),
    [
        (["x", "y", "z"], ["y"], 2),
        (["x", "ab", "cd", "z"], ["bc"], 3),
        (["x", "abcd", "z"], ["bc"], 2),
        (["x", "a", "b", "c", "d", "z"], ["abcd"], 5),
        (["d", "e", "f"], ["\n\n", "ef"], 3),
        (["q", "\n\n", "def"], ["\ndef"], 5),
        (["abcd"], ["a"], 1),
        (["x", "y"], ["z"], None),
        (["x", "y"], [], None),
        ([], ["z"], None),
        (["a", "b", "a", "c"], ["ac"], 4),
    ],
    ids=str,
)
def test_ends_with_the_token_that_completes_a_string(tokenizer, pieces, strings, expected) -> None:
    assert kept(tokenizer, pieces, strings) == expected


def test_many_tokens_at_once(tokenizer) -> None:
    """The first of several matches counts, however many tokens a step brings."""
    stop = stop_at(tokenizer, ["cd"])
    tokens = tokenizer.encode("x.ab.cd.y.cd").ids
    assert tokenizer.decode(tokens[: stop(tokens)]) == "x.ab.cd"
    tokens = tokenizer.encode("0" * 30 + "cd").ids
    assert stop(tokens[:30]) is None
    assert stop(tokens) == 31


@pytest.mark.parametrize("string", ["é", "→", "🙂", "🙂!", "naïve λ"])
def test_characters_of_several_tokens(tokenizer, string) -> None:
    text = "x" + string + "y"
    tokens = tokenizer.encode(text).ids
    stop = stop_at(tokenizer, [string])
    ends = [stop(tokens[:count]) for count in range(len(tokens) + 1)]
    first = 1 + len(tokenizer.encode(string).ids)
    assert ends[:first] == [None] * first
    assert ends[first] == first
    assert tokenizer.decode(tokens[:first]) == "x" + string


def test_half_a_character_is_no_match(tokenizer) -> None:
    euro, cent = tokenizer.encode("€").ids, tokenizer.encode("¢").ids
    assert stop_at(tokenizer, ["€"])([*euro[:-1], *cent]) is None


@pytest.mark.parametrize("strings", [[""], ["a", ""]])
def test_an_empty_string_would_stop_everything(tokenizer, strings) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        stop_at(tokenizer, strings)


def test_stops_a_generator(generator, checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    (new,) = texts(generator, [PROMPT], 30)
    text = tokenizer.decode(new)
    string = text[len(text) // 2 :][:3]
    assert "�" not in string
    (stopped,) = texts(generator, [PROMPT], 30, stop=stop_at(tokenizer, [string]))
    assert stopped == new[: len(stopped)]
    assert string in tokenizer.decode(stopped)
    assert string not in tokenizer.decode(stopped[:-1])
