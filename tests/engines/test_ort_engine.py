"""The engine on ONNX Runtime: numbers, commits, rows, growth, and the loop on top of it."""

from __future__ import annotations

import pytest
import torch

import blockffn_compile.onnx
from blockffn_compile.engines import ort_engine
from blockffn_compile.engines.ort_engine import OrtEngine
from blockffn_compile.generation import generate
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.onnx.files import ModelError, save
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.tree import DraftTree
from tests.engines.contract import chain, path_to, random_tree, tree
from tests.onnx.test_files import make_model
from tests.speculative.tables import Always

ROWS, LENGTH = 3, 100
PROMPT = [5, 17, 3, 250, 17, 99, 4, 61, 12]


@pytest.fixture(params=["gqa", "mla"])
def decoder(request, onnx_decoder):
    return onnx_decoder(request.param)


@pytest.fixture
def model(decoder):
    return decoder[0]


@pytest.fixture
def path(decoder):
    return decoder[1]


@pytest.fixture
def engine(path):
    return OrtEngine(path, ROWS, LENGTH, portable=True, threads=1)


def logits_of(model, tokens):
    return model(torch.tensor([tokens]))[0]


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 2e-5 * expected.norm()


def test_prefill_and_steps_follow_pytorch(engine, model):
    """A prompt longer than one pass, then a chain to the context's end."""
    tokens = [(11 * i * i + 5) % 300 for i in range(LENGTH)]
    want, features = logits_of(model, tokens), model.model(torch.tensor([tokens]))[0]
    output = engine.prefill(0, tokens[:70])
    assert_close(output.logits, want[69:70])
    assert_close(output.features, features[:70])
    output = engine.verify({0: chain(tokens[70:])})[0]
    assert_close(output.logits, want[70:])
    assert_close(output.features, features[70:])
    engine.commit(0, list(range(30)))
    assert engine.length(0) == LENGTH
    with pytest.raises(ValueError, match=f"1 nodes behind {LENGTH} tokens"):
        engine.verify({0: DraftTree.root(0)})


def test_every_node_of_trees_in_several_rows(engine, model):
    """Of different sizes, a row between them left out; and in the other order."""
    prompts = {0: PROMPT, 2: PROMPT[:4]}
    trees = {0: random_tree(23, 0), 2: random_tree(9, 1)}
    for row, prompt in prompts.items():
        engine.prefill(row, prompt)
    for order in ((0, 2), (2, 0)):
        outputs = engine.verify({row: trees[row] for row in order})
        for row, drafts in trees.items():
            for node in range(len(drafts)):
                path = path_to(drafts, node)
                want = logits_of(model, [*prompts[row], *drafts.tokens[path].tolist()])[-1]
                assert_close(outputs[row].logits[node], want)


def test_commits_keep_a_path_and_forget_the_rest(engine, model):
    engine.prefill(1, PROMPT)
    text = list(PROMPT)
    drafts = tree([9, 1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4, 4])
    for path in ([0, 2, 4, 6], [0], [0, 2], [0, 1, 3]):
        engine.verify({1: drafts})
        engine.commit(1, path)
        text += drafts.tokens[path].tolist()
        assert engine.length(1) == len(text)
        output = engine.verify({1: DraftTree.root(77)})[1]
        assert_close(output.logits, logits_of(model, [*text, 77])[-1:])


def test_rows_do_not_disturb_each_other(engine):
    engine.prefill(0, PROMPT)
    engine.prefill(2, PROMPT[:5])
    before = engine.verify({0: DraftTree.root(8)})[0].logits
    stored = [t[0].clone() for t in engine.cache]
    engine.prefill(1, PROMPT[::-1])
    engine.verify({1: random_tree(20, 0), 2: random_tree(40, 0)})
    engine.commit(1, [0])
    assert all(torch.equal(a, b[0]) for a, b in zip(stored, engine.cache, strict=True))
    assert torch.equal(engine.verify({0: DraftTree.root(8)})[0].logits, before)


def test_the_cache_is_written_in_place_and_grows(path, model, monkeypatch):
    monkeypatch.setattr(ort_engine, "_SLOTS", 16)
    engine = OrtEngine(path, 1, LENGTH, portable=True, threads=1)
    engine.prefill(0, PROMPT)
    first = engine.cache[0]
    zeros = (first[0, 0] == 0).all(-1)
    assert zeros.tolist() == [False] * len(PROMPT) + [True] * (17 - len(PROMPT))
    address = first.data_ptr()
    engine.verify({0: chain([1, 2])})
    assert engine.cache[0].data_ptr() == address
    assert (first[0, 0, len(PROMPT) : len(PROMPT) + 2] != 0).any(-1).all()
    engine.commit(0, [0, 1])
    more = list(range(40))
    output = engine.verify({0: chain(more)})[0]
    assert engine.cache[0].shape[2] == 65
    assert_close(output.logits, logits_of(model, [*PROMPT, 1, 2, *more])[-40:])


def test_a_new_text_sees_nothing_of_an_old_one(engine):
    engine.prefill(0, PROMPT[:3])
    want = engine.verify({0: DraftTree.root(7)})[0].logits
    engine.prefill(0, PROMPT * 5)
    for stored in engine.cache:
        stored[0, :, :60] = torch.nan
    engine.prefill(0, PROMPT[:3])
    assert torch.equal(engine.verify({0: DraftTree.root(7)})[0].logits, want)


def test_results_of_a_step_survive_the_next(engine):
    engine.prefill(0, PROMPT)
    first = engine.verify({0: chain([1, 2])})[0]
    kept = first.logits.clone(), first.features.clone()
    engine.verify({0: chain([3, 4])})
    assert torch.equal(first.logits, kept[0])
    assert torch.equal(first.features, kept[1])


def test_float16(onnx_decoder):
    model, path, _ = onnx_decoder("float16")
    output = OrtEngine(path).prefill(0, PROMPT)
    want = logits_of(model, PROMPT)[-1:]
    assert output.logits.dtype == torch.float16
    assert (output.logits - want).float().norm() <= 0.03 * want.float().norm()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "a text of 0 tokens"),
        ([1] * (LENGTH + 1), f"a text of {LENGTH + 1} tokens"),
        ([1, 300], r"token 300 is outside the vocabulary 0\.\.299"),
    ],
    ids=["empty", "long", "vocabulary"],
)
def test_wrong_prompts_leave_the_text_as_it_was(engine, tokens, message):
    engine.prefill(0, PROMPT)
    with pytest.raises(ValueError, match=message):
        engine.prefill(0, tokens)
    assert engine.length(0) == len(PROMPT)


def test_wrong_trees_and_paths(engine):
    engine.prefill(0, PROMPT)
    for trees, message in (({}, "0 nodes"), ({0: chain([3, 300])}, "token 300")):
        with pytest.raises(ValueError, match=message):
            engine.verify(trees)
    engine.prefill(1, PROMPT)
    with pytest.raises(ValueError, match="65 nodes in one step"):
        engine.verify({0: chain(range(33)), 1: chain(range(32))})
    with pytest.raises(ValueError, match="row 0 has no verified tree"):
        engine.commit(0, [0])


def test_models_that_are_no_decoders(tmp_path):
    save(make_model(), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"not a decoder with a cache; write one"):
        OrtEngine(tmp_path / "model.onnx")


@pytest.mark.parametrize("length", [0, -1, 257])
def test_lengths_that_the_model_does_not_have(path, length):
    with pytest.raises(ValueError, match=rf"max_length {length} is not within 1\.\.256"):
        OrtEngine(path, max_length=length)


# --- The bundled model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    model = load_model(bundled_path(), dtype=torch.float32)
    path = tmp_path_factory.mktemp("bundled") / "model.onnx"
    blockffn_compile.onnx.export(model, path)
    return model, path


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "native"])
def test_greedy_tokens_of_the_bundled_model_are_those_of_pytorch(bundled, portable):
    """Plain, and drafted from n-grams."""
    model, path = bundled
    prompt = [(7 * i * i + 3) % 4096 for i in range(12)]
    want = list(generate(model, prompt, 128, backend="eager"))
    assert len(want) == 128
    engine = OrtEngine(path, portable=portable)
    assert engine.session.flavour == ("portable" if portable else "native")
    plain = [t for step in decode(engine, [prompt], 128) for t in step.tokens]
    drafting = decode(engine, [prompt], 128, drafters=lambda: [NGramDrafter()], policy=Always(8))
    steps = list(drafting)
    assert plain == want
    assert [t for step in steps for t in step.tokens] == want
    assert any(step.drafted for step in steps)
