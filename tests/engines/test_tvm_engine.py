"""The engine on a bundle: a token's bits in any company, commits, and the decoding loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from blockffn_compile.aot.bundle import load
from blockffn_compile.aot.compiler import build
from blockffn_compile.engines.tvm_engine import TvmEngine
from blockffn_compile.quantisation import quantize
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.tree import DraftTree
from tests.conftest import make_config
from tests.engines.contract import LENGTH, PROMPT, ROWS, BitsOfPlainDecoding, chain, equal, plain
from tests.engines.test_torch_engine import MODELS as PLAIN
from tests.quantised import SIZES, exact
from tests.speculative.tables import Always

MODELS = {**PLAIN, "quantised": make_config(**SIZES)}


@pytest.fixture(
    scope="module",
    params=[
        ("gqa", torch.bfloat16, None),
        ("mla", torch.float32, None),
        ("quantised", torch.bfloat16, "int4"),
    ],
    ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}",
)
def pair(request, make_model, tmp_path_factory):
    """The engine, with two rows, and the model it was built of."""
    name, dtype, scheme = request.param
    model = make_model(MODELS[name]).to(dtype)
    out = tmp_path_factory.mktemp("bundle") / name
    bundle = build(model, "native", out, quantize=scheme)
    if scheme is not None:
        quantize(model, scheme)
    return TvmEngine(load(bundle), ROWS, LENGTH), model


@pytest.fixture(scope="module")
def engine(pair):
    return pair[0]


def entries(engine: TvmEngine, row: int, start: int = 0, end: int | None = None) -> list[Tensor]:
    """Bytes of the cache at some slots, up to the text's end."""
    end = engine.length(row) if end is None else end
    cache = [engine.session.on_cpu(t) for t in engine.session.cache]
    caches = [from_dlpack(t).view(torch.uint8) for t in cache]
    return [t[row, :, start:end].clone() for t in caches]


class TestBits(BitsOfPlainDecoding):
    entries = staticmethod(entries)


def test_error_is_within_eager(pair):
    """Against fp64, the root mean square over a prompt of two chunks and a tree's chain."""
    engine, model = pair
    tokens = [(11 * i * i + 5) % 300 for i in range(LENGTH)]
    text = torch.tensor([tokens])
    reference: Any = exact(model)
    want = reference(text)[0]
    output = engine.prefill(0, tokens[:70])
    assert output.logits.shape == (1, 300)
    rest = engine.verify({0: chain(tokens[70:])})[0]
    ours = torch.cat((output.logits, rest.logits))
    errors = [(y.double() - want[69:]).norm() for y in (ours, model(text)[0, 69:])]
    assert errors[0] <= 1.5 * errors[1]
    features = torch.cat((output.features, rest.features))
    want = reference.model(text)[0]
    errors = [(y.double() - want).norm() for y in (features, model.model(text)[0])]
    assert errors[0] <= 1.5 * errors[1]


def test_a_chain_has_the_bits_of_plain_decoding_at_every_size(engine):
    """Logits and cache entries."""
    tokens = [(7 * i * i + 3) % 300 for i in range(64)]
    engine.prefill(0, PROMPT)
    past = len(PROMPT)
    logits = plain(engine, 0, tokens)
    stored = entries(engine, 0)
    for size in range(1, 65):
        engine.prefill(0, PROMPT)
        output = engine.verify({0: chain(tokens[:size])})[0]
        assert torch.equal(output.logits, torch.stack(logits[:size])), size
        want = [t[:, : past + size] for t in stored]
        assert equal(entries(engine, 0, 0, past + size), want), size


def test_a_prompt_has_the_bits_of_plain_decoding(engine):
    """Of any length, one token, a whole chunk and one more included."""
    tokens = [(7 * i * i + 3) % 300 for i in range(LENGTH)]
    engine.prefill(0, tokens[:1])
    logits = plain(engine, 0, tokens[1:])
    stored = entries(engine, 0)
    for size in (2, 63, 64, 65, LENGTH):
        output = engine.prefill(0, tokens[:size])
        assert output.features.shape[0] == size
        assert torch.equal(output.logits[0], logits[size - 2])
        assert equal(entries(engine, 0), [t[:, :size] for t in stored])


def test_the_context_is_used_to_its_end(engine):
    tokens = [i % 300 for i in range(LENGTH)]
    engine.prefill(0, tokens[:-3])
    last = engine.verify({0: chain(tokens[-3:])})[0].logits[-1].clone()
    engine.commit(0, [0, 1, 2])
    with pytest.raises(ValueError, match=f"1 nodes behind {LENGTH} tokens"):
        engine.verify({0: DraftTree.root(0)})
    assert torch.equal(engine.prefill(0, tokens).logits[0], last)


def test_the_loop_writes_the_same_text_with_and_without_drafts(engine):
    greedy = [token for step in decode(engine, [PROMPT], 60) for token in step.tokens]
    assert len(greedy) == 60
    drafting = decode(engine, [PROMPT], 60, drafters=lambda: [NGramDrafter()], policy=Always(8))
    steps = list(drafting)
    assert [token for step in steps for token in step.tokens] == greedy
    assert any(step.nodes > 1 for step in steps)


@pytest.mark.parametrize("length", [0, -1, 129])
def test_lengths_that_the_model_does_not_have(engine, length):
    with pytest.raises(ValueError, match=rf"max_length {length} is not within 1\.\.128"):
        TvmEngine(engine.session.bundle, max_length=length)
