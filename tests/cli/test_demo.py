from __future__ import annotations

import re

import pytest
import torch

from blockffn_compile.cli.common import Backend
from blockffn_compile.cli.demo import disagreement
from tests.conftest import make_config


def test_completes_and_compares(blockffn, checkpoint) -> None:
    options = ["--prompt", "def add(a, b):", "--max-new-tokens", 24, "--repeats", 1]
    result = blockffn("demo", checkpoint, *options)
    assert result.exit_code == 0, result.output
    output = result.stdout
    assert "def add(a, b):" in output
    assert re.search(r"layers rewritten\W+2 of 2", output)
    assert re.search(r"TLS\)\W+\d+\.\d %", output)
    assert re.search(r"CLS_8\)\W+\d+\.\d %", output)
    for backend in ("eager", "inductor", "blockffn"):
        assert re.search(rf"{backend}, tokens/s\W+\d+  \(\d+\.\d\dx eager\)", output)
    assert re.search(r"same tokens\W+yes, 24 of 24", output)


def test_missing_checkpoint(refused, tmp_path) -> None:
    assert "no such directory" in refused("demo", tmp_path / "absent")


def test_disagreement_is_the_gap_between_the_choices(make_model) -> None:
    model, text = make_model(make_config()), torch.arange(1, 9)
    logits = model(text[None])[0, 4:]
    best, worst = logits.argmax(1).tolist(), logits.argmin(1).tolist()
    assert disagreement(model, text, 4, {Backend.eager: best, Backend.inductor: best}) == 0
    second = [*best[:2], worst[2], best[3]]
    gap = disagreement(model, text, 4, {Backend.eager: best, Backend.inductor: second})
    assert gap == pytest.approx((logits[2].max() - logits[2].min()).item(), rel=1e-4)
