"""The bundled model: what its card promises, and the same tokens through the backend."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from blockffn_compile import load_model
from blockffn_compile.explain import explain
from blockffn_compile.generation import compile_step, generate, new_cache
from blockffn_compile.models import bundled_path
from blockffn_compile.training import corpus
from blockffn_compile.training.metrics import mean_cls, measure_sparsity
from blockffn_compile.training.trainer import perplexity

PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
NEW_TOKENS = 256


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return torch.from_numpy(corpus.encode(tokenizer, held_out=True).astype(np.int64))


def test_size():
    weights = bundled_path() / "model.safetensors"
    assert weights.stat().st_size < 40e6
    parameters = sum(p.numel() for p in load_model(bundled_path()).parameters())
    assert 6e6 <= parameters <= 12e6


def test_held_out_figures(held_out):
    """TLS and CLS_8 reach 80 % and 70 %, and the card's perplexity is the model's."""
    model = load_model(bundled_path(), dtype=torch.float32)
    card = json.loads((bundled_path() / "figures.json").read_text())
    layers = measure_sparsity(model, held_out[: 1 << 15], (8,))
    assert mean_cls(layers, 1) >= 0.80
    assert mean_cls(layers, 8) >= 0.70
    # The library's sources differ a little from one patch release of Python to the next.
    measured = perplexity(model, held_out, 512)
    assert math.isclose(measured, card["blockffn"]["perplexity"], rel_tol=0.03)
    assert card["blockffn"]["perplexity"] <= 1.05 * card["dense twin"]["perplexity"]


def test_every_layer_is_rewritten():
    model = load_model(bundled_path())
    report = explain(model, torch.zeros(1, 4, dtype=torch.long))
    assert [layer.status for layer in report.layers] == ["rewritten"] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_tokens_equal_eager(tokenizer, dtype):
    """Every step of 256 chooses eager's token, or one that fp64 cannot tell from it.

    Both backends read eager's text, so that one near-tie does not hide the steps after it.
    """
    model = load_model(bundled_path(), dtype=dtype)
    prompt = tokenizer.encode(PROMPT).ids
    text = prompt + list(generate(model, prompt, NEW_TOKENS, backend="eager"))
    text += [0] * (len(prompt) + NEW_TOKENS - len(text))  # the model may have ended the text
    tokens = torch.tensor(text)
    exact = load_model(bundled_path(), dtype=torch.float64)
    with torch.no_grad():
        oracle = exact(tokens[None])[0]
        logits = {}
        for backend in ("eager", "blockffn"):
            step, cache = compile_step(model, backend), new_cache(model, len(text))
            runs = [tokens[: len(prompt)], *tokens[len(prompt) :].split(1)]
            rows, position = [], 0
            for run in runs:
                positions = torch.arange(position, position + len(run))
                rows.append(step(run.clone(), positions, cache).clone())
                position += len(run)
            logits[backend] = torch.stack(rows)
    oracle = oracle[len(prompt) - 1 :]
    noise = (logits["eager"].double() - oracle).abs().amax(1)
    ours = (logits["blockffn"].double() - oracle).abs().amax(1)
    assert ours.norm() <= 1.5 * noise.norm()
    choices = {backend: rows.argmax(1) for backend, rows in logits.items()}
    for i in (choices["eager"] != choices["blockffn"]).nonzero().flatten():
        gap = oracle[i, choices["eager"][i]] - oracle[i, choices["blockffn"][i]]
        assert gap.abs() <= 2 * noise[i], f"step {i}: {gap:.2e} apart in fp64"
    if dtype is torch.float32:
        assert torch.equal(choices["eager"], choices["blockffn"])
