"""Bundles on a real GPU: ``make test-gpu``.  Not collected by a plain ``pytest``.

They are built for the GPU that is there, whatever its compute capability.
"""

from __future__ import annotations

import copy
import platform

import pytest
import torch
import tvm

from blockffn_compile.aot import load, targets
from blockffn_compile.aot.compiler import build
from blockffn_compile.aot.gpu import load_runtime
from blockffn_compile.aot.session import Session, greedy
from blockffn_compile.engines.tvm_engine import TvmEngine
from tests.conftest import make_config
from tests.engines.contract import LENGTH, PROMPT, BitsOfPlainDecoding
from tests.engines.test_tvm_engine import entries

MODELS = {
    "gqa": make_config("gqa", hidden_size=256, expert_size=64),
    "mla": make_config("mla", qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16),
}


@pytest.fixture(scope="module", params=[("gqa", torch.bfloat16), ("mla", torch.float32)], ids=str)
def pair(request, make_model, tmp_path_factory):
    """A bundle, and the model that it was built of."""
    load_runtime()
    gpu = tvm.cuda()
    if not gpu.exist:
        pytest.fail("these tests need an NVIDIA GPU, and TVM finds none")
    name, dtype = request.param
    model = make_model(MODELS[name]).to(dtype)
    here = targets.Target(
        "here",
        {"kind": "llvm", "mtriple": f"{platform.machine()}-linux-gnu"},
        platform.machine(),
        (),
        gpu=targets.Gpu(gpu.compute_version, 2 * gpu.multi_processor_count),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(targets.TARGETS, "here", here)
        bundle = build(model, "here", tmp_path_factory.mktemp("bundle") / name)
    return load(bundle), model


@pytest.fixture(scope="module")
def engine(pair):
    return TvmEngine(pair[0], 2, LENGTH)


class TestBits(BitsOfPlainDecoding):
    entries = staticmethod(entries)


def test_error_is_within_eager(pair, engine):
    """Against fp64, over two chunks of a prompt."""
    _, model = pair
    tokens = [(11 * i * i + 5) % 300 for i in range(LENGTH)]
    text = torch.tensor([tokens])
    exact = copy.deepcopy(model).double().model(text)[0]
    output = engine.prefill(0, tokens)
    errors = [(y.double() - exact).norm() for y in (output.features, model.model(text)[0])]
    assert errors[0] <= 1.5 * errors[1]


# Near-ties of bfloat16 may fall either way.
@pytest.mark.parametrize("pair", [("mla", torch.float32)], indirect=True, ids=str)
def test_greedy_tokens_are_those_of_the_model(pair):
    bundle, model = pair
    exact, text = copy.deepcopy(model).double(), list(PROMPT)
    for token in greedy(Session(bundle, max_length=40), PROMPT):
        assert token == int(exact(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


def test_a_step_waits_for_nothing(engine):
    """Its kernels are queued behind one that is still running."""
    session = engine.session
    places = ([1], [0], [0], [0], [0], [1])
    for _ in range(3):  # allocates what it needs
        session.head(session.trunk(places))
    session.bundle.device.sync()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # of the GPU's cycles, about a second
    busy.record()
    logits = session.head(session.trunk(places))
    assert not busy.query(), "the host has waited for the GPU"
    assert session.on_cpu(logits).shape == (1, 300)
