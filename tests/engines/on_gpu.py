"""The engine on a real GPU: ``make test-gpu``.  Not collected by a plain ``pytest``."""

from __future__ import annotations

import copy

import pytest
import torch

from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.speculative import cost
from blockffn_compile.speculative.generator import Generator
from blockffn_compile.speculative.tree import DraftTree
from tests.engines.contract import PROMPT, chain, equal, path_to, plain, random_tree, tree
from tests.engines.test_torch_engine import entries
from tests.test_step_ops import error

LENGTH = 200
TOKENS = [(11 * i * i + 5) % 300 for i in range(LENGTH)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one row", "two rows"])
def engine(request):
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU, and PyTorch finds none")
    engine = TorchEngine(load_model(bundled_path(), torch.bfloat16, "cuda"), request.param, LENGTH)
    list(engine.warm_up())
    return engine


@pytest.mark.parametrize("size", [1, 7, 64])
def test_error_is_within_eager(engine, size):
    text = torch.tensor([TOKENS], device="cuda")
    exact = copy.deepcopy(engine.model).double()(text)[0, -size:]
    engine.prefill(0, TOKENS[:-size])
    ours = engine.verify({0: chain(TOKENS[-size:])})[0].logits
    assert error(ours, exact) <= 1.5 * error(engine.model(text)[0, -size:], exact)


def test_nodes_of_a_tree_are_plain_decoding(engine):
    drafts = random_tree(23, seed=0)
    others = {row: DraftTree.root(3) for row in range(1, engine.rows)}
    for row in others:
        engine.prefill(row, PROMPT[:4])
    engine.prefill(0, PROMPT)
    logits = engine.verify(others | {0: drafts})[0].logits
    path = path_to(drafts, 22)
    engine.prefill(0, PROMPT)
    want = torch.stack(plain(engine, 0, drafts.tokens[path].tolist()))
    assert error(logits[path], want.double()) < 0.02


def test_commits_keep_what_plain_decoding_would_have_stored(engine):
    engine.prefill(0, PROMPT)
    last = engine.rows - 1
    if last:
        engine.prefill(last, PROMPT)
    other, text = entries(engine, last), list[int]()
    drafts = tree([9, 1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4, 4])
    for path in ([0, 2, 4, 6], [0], [0, 2], [0, 1, 3], [0, 2, 4, 5]):
        engine.verify({0: drafts})
        engine.commit(0, path)
        text += drafts.tokens[path].tolist()
    stored = entries(engine, 0)
    assert last == 0 or equal(entries(engine, last), other)
    engine.prefill(0, PROMPT)
    plain(engine, 0, text)
    for got, want in zip(stored, entries(engine, 0), strict=True):
        assert error(got, want.double()) < 0.02


def test_steps_and_commits_wait_for_nothing(engine):
    drafts = tree([9, 1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4, 4])
    engine.prefill(0, PROMPT)
    torch.cuda.synchronize()
    for debug in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(debug)
        try:
            engine.verify({0: drafts})
            engine.commit(0, [0, 2, 4, 6])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_greedy_text_has_the_largest_logits(engine, speculate):
    """In fp64, up to the rounding of bf16."""
    prompt = TOKENS[:20]
    write = Generator(engine.model, speculate, max_length=LENGTH)
    tokens = [t for step in write([prompt], max_new_tokens=64) for t in step.tokens]
    text = torch.tensor([prompt + tokens], device="cuda")
    exact = copy.deepcopy(engine.model).double()(text)[0, len(prompt) - 1 : -1]
    rounding = (engine.model(text)[0, len(prompt) - 1 : -1].double() - exact).abs().max()
    chosen = exact.gather(1, text[0, len(prompt) :, None])[:, 0]
    assert (exact.amax(1) - chosen).max() <= 3 * rounding


def test_costs_are_those_of_the_gpu(engine):
    """Not of what the host does, which returns before a step is done."""
    costs = cost.measure(engine)
    engine.prefill(0, PROMPT)
    for nodes in (1, 64):
        drafts = chain(TOKENS[:nodes])
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(20):
            first.record()
            engine.verify({0: drafts})
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        assert costs[nodes] >= 0.8 * min(times)
