"""The tuner's search and its files; timing needs a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn_compile.schedules import tuner
from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import config
from blockffn_compile.schedules.triton.config import Config, load_table

PROBLEM = Problem(2048, 128, 128, "silu", False, torch.bfloat16, "cuda")
LIMIT = config.shared_bytes((9, 0))


@pytest.mark.parametrize("name", load_table("", (9, 0), PROBLEM))
def test_candidates_are_legal_and_different(name):
    found = tuner.candidates(name, PROBLEM, LIMIT)
    assert len(found) == len(set(found)) > 10
    for candidate in found:
        assert candidate == config.fit(name, candidate, PROBLEM, LIMIT)
        if not name.startswith("prefill"):
            # The order of summation of the chunk kernels stands on this.
            assert candidate.warps == config.LANES
            assert candidate.tokens <= 32


def test_finds_the_fastest_of_every_kernel():
    best = {
        name: tuner.candidates(name, PROBLEM, LIMIT)[3] for name in load_table("", (9, 0), PROBLEM)
    }

    def measure(name: str, table: config.Table) -> float:
        return 1.0 if table[name] == best[name] else math.inf if table[name].stages == 2 else 2.0

    start = load_table("", (9, 0), PROBLEM)
    tables = list(tuner.tune(PROBLEM, start, LIMIT, measure, list(start)))
    assert tables[-1] == best
    assert tables[0] == start | {"up 8": best["up 8"]}
    assert list(tuner.tune(PROBLEM, start, LIMIT, measure, ["up 8"])) == tables[:1]


def test_what_is_written_is_read(tmp_path, monkeypatch):
    table = dict.fromkeys(load_table("", (9, 0), PROBLEM), Config(8, 16, 64, 3))
    other = Problem(1280, 40, 128, "silu", False, torch.float16, "cuda")
    tuner.write("NVIDIA RTX", PROBLEM, table, tmp_path)
    path = tuner.write("NVIDIA RTX", other, table | {"up 8": Config(8, 32, 64, 3)}, tmp_path)
    assert path.name == "nvidia-rtx.json"
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config._read.cache_clear()
    assert load_table("NVIDIA RTX", (8, 9), PROBLEM) == table
    assert load_table("NVIDIA RTX", (8, 9), other)["up 8"].rows == 32
    config._read.cache_clear()


@pytest.mark.parametrize("tokens", [1, 32, 512])
def test_routing_has_the_published_densities(tokens):
    scores = tuner.routing(tokens, 4096, torch.Generator().manual_seed(0))
    assert (scores != 0).float().mean() == pytest.approx(tuner.PAIRS, rel=0.2)
    union = {1: 0.125, 32: 0.31, 512: 0.458}[tokens]
    assert (scores != 0).any(0).float().mean() == pytest.approx(union, rel=0.1)
