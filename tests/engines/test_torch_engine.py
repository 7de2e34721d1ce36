"""The engine: a token's bits in any company, commits, and that nothing compiles once warm."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from blockffn_compile.engines import torch_engine
from blockffn_compile.engines.engine import BUCKETS
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.speculative.tree import DraftTree
from tests.conftest import make_config
from tests.engines.contract import (
    LENGTH,
    PROMPT,
    ROWS,
    BitsOfPlainDecoding,
    chain,
    equal,
    path_to,
    plain,
    random_tree,
    tree,
)

#: Of the difference to the eager model, relative to the norm.  Both differ from fp64 by as much:
#: random weights amplify rounding.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.15}
MODELS = {
    "gqa": make_config("gqa", hidden_size=64, expert_size=16),
    "mla": make_config(
        "mla", num_hidden_layers=1, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16
    ),
    "no attention kernel": make_config("mla", num_hidden_layers=1),
}


@pytest.fixture(
    scope="module",
    params=[("gqa", torch.bfloat16), ("mla", torch.float32)],
    ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}",
)
def engine(request, make_model):
    """Warm, with two rows."""
    return make_engine(make_model, *request.param)


@pytest.fixture(scope="module")
def quick(make_model):
    """Two small graphs only, for what is not about numbers."""
    engine = make_engine(make_model, "no attention kernel", torch.float32, buckets=())
    assert list(engine.warm_up((1, 8))) == [1, 8]
    return engine


def make_engine(make_model, name, dtype, buckets: Sequence[int] = BUCKETS) -> TorchEngine:
    model = make_model(MODELS[name]).to(dtype)
    engine = TorchEngine(model, ROWS, LENGTH)
    assert list(engine.warm_up(buckets)) == list(buckets)
    return engine


def entries(engine: TorchEngine, row: int, start: int = 0, end: int | None = None) -> list[Tensor]:
    """Copies of the cache at some slots, up to the text's end."""
    end = engine.length(row) if end is None else end
    return [t[row, :, start:end].clone() for t in (*engine.cache.keys, *engine.cache.values)]


class TestBits(BitsOfPlainDecoding):
    entries = staticmethod(entries)


def close(got: Tensor, want: Tensor) -> bool:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return bool((got - want).norm() <= LIMITS[want.dtype] * want.norm())


# --- Numbers --------------------------------------------------------------------------------------


def test_prefill_and_steps_follow_the_eager_model(engine):
    tokens = [*PROMPT, 8, 200, 31]
    features = engine.model.model(torch.tensor([tokens]))[0]
    logits = engine.model(torch.tensor([tokens]))[0]
    past = len(PROMPT)
    output = engine.prefill(0, PROMPT)
    assert close(output.logits, logits[past - 1 : past])
    assert close(output.features, features[:past])
    output = engine.verify({0: chain(tokens[past:])})[0]
    assert close(output.logits, logits[past:])
    assert close(output.features, features[past:])


def test_error_is_within_eager(engine):
    """Against fp64, the root mean square over many tokens."""
    tokens = [(11 * i * i + 5) % 300 for i in range(LENGTH)]
    text = torch.tensor([tokens])
    exact = copy.deepcopy(engine.model).double()(text)[0]
    engine.prefill(0, tokens[:-64])
    ours = engine.verify({0: chain(tokens[-64:])})[0].logits
    eager = engine.model(text)[0, -64:]
    errors = [(y.double() - exact[-64:]).norm(dim=1).norm() for y in (ours, eager)]
    assert errors[0] <= 1.5 * errors[1]


def test_a_chain_has_the_bits_of_plain_decoding_in_every_bucket(engine):
    """Logits and cache entries, at each bucket's full size, one above the half, and between."""
    tokens = [(7 * i * i + 3) % 300 for i in range(64)]
    engine.prefill(0, PROMPT)
    past = len(PROMPT)
    logits = plain(engine, 0, tokens)
    stored = entries(engine, 0)
    for size in sorted({1, 3, 5, 13, *BUCKETS, *(b // 2 + 1 for b in BUCKETS)}):
        engine.prefill(0, PROMPT)
        output = engine.verify({0: chain(tokens[:size])})[0]
        assert len(output.logits) == len(output.features) == size
        assert torch.equal(output.logits, torch.stack(logits[:size])), size
        want = [t[:, : past + size] for t in stored]
        assert equal(entries(engine, 0, 0, past + size), want), size


def test_what_is_not_committed_leaves_no_trace(engine):
    engine.prefill(0, PROMPT)
    engine.prefill(1, PROMPT[:2])
    want = engine.verify({0: DraftTree.root(8)})[0].logits.clone()
    text, other = entries(engine, 0), entries(engine, 1)
    for seed in range(3):
        engine.verify({0: random_tree(40, seed), 1: random_tree(9, seed)})
        assert equal(entries(engine, 0), text)
        assert equal(entries(engine, 1), other)
    assert engine.length(0) == len(PROMPT)
    assert torch.equal(engine.verify({0: DraftTree.root(8)})[0].logits, want)


def test_another_row_is_not_written(engine):
    engine.prefill(1, PROMPT)
    other = entries(engine, 1, 0, LENGTH)
    engine.prefill(0, PROMPT[:3])
    engine.verify({0: random_tree(11, 0)})
    engine.commit(0, [0])
    assert equal(entries(engine, 1, 0, LENGTH), other)


def test_the_context_is_used_to_its_end(engine):
    tokens = [i % 300 for i in range(LENGTH)]
    engine.prefill(0, tokens[: LENGTH - 3])
    output = engine.verify({0: chain(tokens[LENGTH - 3 :])})[0]
    want = engine.model(torch.tensor([tokens]))[0, -3:]
    assert close(output.logits, want)
    engine.commit(0, [0, 1, 2])
    assert engine.length(0) == LENGTH
    with pytest.raises(ValueError, match=f"1 nodes behind {LENGTH} tokens"):
        engine.verify({0: DraftTree.root(0)})
    assert close(engine.prefill(0, tokens).logits, want[-1:])


def test_moves_at_once_are_moves_one_by_one(engine, monkeypatch):
    """What a GPU does in a commit: all moves as one graph, filled up with repetitions."""
    drafts = random_tree(40, 3)
    path = path_to(drafts, 39)
    assert path != list(range(len(path)))
    engine.prefill(1, PROMPT)
    results = []
    monkeypatch.setattr(torch_engine, "capture", lambda *_: None)
    for gpu in (False, True):
        engine.prefill(0, PROMPT)
        engine.verify({0: drafts})
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_gpu", gpu)
            engine.commit(0, path)
        results.append(entries(engine, 0) + entries(engine, 1))
    assert equal(*results)


# --- Compilation ----------------------------------------------------------------------------------


def test_nothing_compiles_once_warm(engine, monkeypatch):
    def refuse(*_):
        raise AssertionError("compiles")

    monkeypatch.setattr(torch_engine, "compile_once", refuse)
    for row in range(ROWS):
        engine.prefill(row, PROMPT)
    engine.prefill(0, PROMPT[:1])
    counters.clear()
    for row, length in ((1, 2), (0, 1), (1, 70), (0, LENGTH), (0, 9)):
        engine.prefill(row, [3] * length)
    engine.prefill(1, [3] * 20)
    for size in (1, 2, 3, 17, 33, 64):
        engine.verify({0: chain(list(range(size)))})
        engine.commit(0, [0])
    engine.verify({row: chain([1, 2, 3]) for row in range(ROWS)})
    assert not counters["stats"]
    assert not counters["inductor"]


def test_warm_up_of_short_contexts(make_model):
    """Graphs that no step can need are left out; those that several rows need together are not."""
    model = make_model(MODELS["no attention kernel"])
    engine = TorchEngine(model, rows=2, max_length=3)
    assert list(engine.warm_up((8, 16))) == [8, 16]
    assert set(engine._steps) == {8}
    assert [engine.length(row) for row in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="no verified tree"):
        engine.commit(0, [0])


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -1, 129])
def test_lengths_that_the_model_does_not_have(make_model, length):
    with pytest.raises(ValueError, match=rf"max_length {length} is not within 1\.\.128"):
        TorchEngine(make_model(MODELS["gqa"]), max_length=length)


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_none(quick, row):
    with pytest.raises(ValueError, match=rf"row {row}: this engine has the rows 0\.\.1"):
        quick.prefill(row, PROMPT)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "a text of 0 tokens"),
        ([1] * (LENGTH + 1), f"a text of {LENGTH + 1} tokens"),
        ([1, 300], r"token 300 is outside the vocabulary 0\.\.299"),
        ([-1], "token -1"),
    ],
    ids=["empty", "long", "large token", "negative token"],
)
def test_wrong_prompts_leave_the_text_as_it_was(quick, tokens, message):
    quick.prefill(0, PROMPT)
    stored = entries(quick, 0)
    with pytest.raises(ValueError, match=message):
        quick.prefill(0, tokens)
    assert quick.length(0) == len(PROMPT)
    assert equal(entries(quick, 0), stored)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "0 nodes in one step"),
        ({0: 33, 1: 32}, "65 nodes in one step"),
        ({0: 1, 1: 6}, f"6 nodes behind {LENGTH - 5} tokens"),
    ],
    ids=["none", "many", "context"],
)
def test_wrong_trees(quick, sizes, message):
    quick.prefill(0, PROMPT)
    quick.prefill(1, [1] * (LENGTH - 5 if 6 in sizes.values() else 1))
    with pytest.raises(ValueError, match=message):
        quick.verify({row: chain(range(size)) for row, size in sizes.items()})
    assert quick.length(0) == len(PROMPT)


@pytest.mark.parametrize("token", [-1, 300])
def test_drafts_outside_the_vocabulary(quick, token):
    quick.prefill(0, PROMPT)
    with pytest.raises(ValueError, match=f"token {token}"):
        quick.verify({0: chain([3, token])})


@pytest.mark.parametrize(
    "path",
    [[], [1], [0, 3], [0, 2, 3], [0, 0], [0, 5], [0, -1], [0, 1, 1]],
    ids=str,
)
def test_paths_that_are_none(quick, path):
    quick.prefill(0, PROMPT)
    quick.verify({0: tree([9, 1, 2, 3, 4], [-1, 0, 0, 1, 2])})
    with pytest.raises(ValueError, match="not a path from the root"):
        quick.commit(0, path)
    assert quick.length(0) == len(PROMPT)


def test_commit_needs_a_tree_of_its_own(quick):
    quick.prefill(0, PROMPT)
    quick.prefill(1, PROMPT)
    quick.verify({0: DraftTree.root(1)})
    for row in (1, 2):
        with pytest.raises(ValueError, match=f"row {row} has no verified tree"):
            quick.commit(row, [0])
    quick.commit(0, [0])
    with pytest.raises(ValueError, match="row 0 has no verified tree"):
        quick.commit(0, [0])
    quick.verify({0: DraftTree.root(1)})
    quick.prefill(0, PROMPT)
    with pytest.raises(ValueError, match="row 0 has no verified tree"):
        quick.commit(0, [0])
