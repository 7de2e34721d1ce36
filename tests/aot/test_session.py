"""What a bundle computes, with nothing of this package but the session around it."""

from __future__ import annotations

import copy

import torch
from torch.utils.dlpack import from_dlpack

from blockffn_compile.aot.bundle import load
from blockffn_compile.aot.session import Session

TOKENS = [(11 * i * i + 5) % 300 for i in range(100)]


def test_prefill_is_within_eager(bundle, model):
    """Against fp64, over more than one chunk."""
    session = Session(load(bundle))
    features = [from_dlpack(chunk) for chunk in session.prefill(0, TOKENS)]
    assert [len(chunk) for chunk in features] == [64, 36]
    text = torch.tensor([TOKENS])
    exact = copy.deepcopy(model).double().model(text)[0]
    errors = [(y - exact).norm() for y in (torch.cat(features), model.model(text)[0])]
    assert errors[0] <= 1.5 * errors[1]


def test_head_of_the_last_row(bundle, model):
    session = Session(load(bundle))
    (features,) = session.prefill(0, TOKENS[:7])
    logits = from_dlpack(session.head(session.last(features)))
    every = from_dlpack(session.head(features))
    assert torch.equal(logits[0], every[6])
    expected = model.lm_head(from_dlpack(features) * model.logit_scale)
    assert logits.dtype == torch.bfloat16
    assert (every - expected).norm() <= 0.01 * expected.norm()
