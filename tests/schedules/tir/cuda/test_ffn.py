"""The chunk-sparse FFN for CUDA, on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockffn_compile.schedules.packing import to_panels
from blockffn_compile.schedules.tir import DTYPES
from blockffn_compile.schedules.tir.cuda.ffn import chunk_sparse_ffn
from blockffn_compile.schedules.tir.cuda.tile import PANEL
from tests.schedules.tir.cuda.emulator import emulate
from tests.schedules.triton.problems import (
    PROBLEMS,
    eager,
    error,
    inputs,
    oracle,
    weights,
)

EVERY = PROBLEMS | {"one expert": replace(PROBLEMS["one expert"], dtype=torch.float32)}


class Kernel:
    """The kernel of a problem, and its weights."""

    def __init__(self, problem: Any, folder: Any) -> None:
        self.problem, self.w = problem, weights(problem)
        p = problem
        self.function = emulate(
            chunk_sparse_ffn(
                p.hidden_size, p.num_experts, p.expert_size, DTYPES[p.dtype], p.act, p.gated, 3
            ),
            folder,
        )

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        names = ("w_up", *(["w_gate"] if self.problem.gated else []), "w_down")
        panels = [to_panels(self.w[name], PANEL) for name in names]
        y = torch.full_like(x, math.nan)
        self.function(x, scores, *panels, y)
        return y


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return functools.cache(lambda name: Kernel(EVERY[name], tmp_path_factory.mktemp("ffn")))


@pytest.fixture(scope="module", params=EVERY)
def kernel(request, make):
    return make(request.param)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_error_is_within_eager(kernel, density):
    for tokens in (1, 2, 7, 8, 33, 64):
        x, scores = inputs(kernel.problem, tokens, density, seed=tokens)
        y = kernel(x, scores)
        if not (scores != 0).any():
            assert torch.equal(y, torch.zeros_like(x))
            continue
        want = oracle(kernel.problem, x, scores, kernel.w)
        # Few values can be lucky: a unit in the last place of the result is allowed.
        least = torch.finfo(x.dtype).eps
        assert error(y, want) <= max(
            1.5 * error(eager(kernel.problem, x, scores, kernel.w), want), least
        ), tokens


def test_one_expert_of_all(kernel):
    x, scores = inputs(kernel.problem, 9, 1.0)
    scores[:, 1:] = 0
    want = oracle(kernel.problem, x, scores, kernel.w)
    assert error(kernel(x, scores), want) <= 4 * torch.finfo(x.dtype).eps


def test_rows_do_not_depend_on_company(kernel):
    x, scores = inputs(kernel.problem, 64, 0.3)
    together = kernel(x, scores)
    order = torch.randperm(64)
    assert torch.equal(kernel(x[order], scores[order]), together[order])
    for part in (slice(0, 1), slice(63, 64), slice(5, 14), slice(20, 53)):
        assert torch.equal(kernel(x[part].clone(), scores[part].clone()), together[part])


def test_nan_is_active_and_minus_zero_is_not(kernel):
    x, scores = inputs(kernel.problem, 5, 1.0)
    scores[2], scores[3] = -0.0, -0.0
    scores[3, 0] = math.nan
    y = kernel(x, scores)
    assert torch.equal(y[2], torch.zeros_like(y[2]))
    assert y[3].isnan().all()


def test_non_finite_values_stay_in_their_row(kernel):
    for value, where in itertools.product((math.nan, math.inf), ("x", "scores", "no expert")):
        x, scores = inputs(kernel.problem, 12, 0.5)
        scores[9] = 0
        if where != "no expert":
            scores[9, :2] = 0.5
        clean = kernel(x, scores)
        (scores if where == "scores" else x)[9, 0] = value
        y = kernel(x, scores)
        assert not y[9].isfinite().all()
        assert value == math.inf or y[9].isnan().all()
        rest = torch.arange(12) != 9
        assert torch.equal(y[rest], clean[rest])


def test_inf_in_the_expert_of_another_token_is_ignored(make):
    kernel = make("even")
    x, scores = inputs(kernel.problem, 9, 0.5)
    scores[:, 2] = 0
    clean = kernel(x, scores)
    before, kernel.w = kernel.w, weights(kernel.problem)
    kernel.w["w_up"][2], kernel.w["w_down"][2] = math.inf, math.inf
    scores[4, 2] = 1
    y = kernel(x, scores)
    kernel.w = before
    rest = torch.arange(9) != 4
    assert torch.equal(y[rest], clean[rest])


def test_more_experts_than_threads(tmp_path):
    kernel = Kernel(replace(PROBLEMS["odd"], num_experts=300), tmp_path)
    x, scores = inputs(kernel.problem, 3, 0.05)
    want = oracle(kernel.problem, x, scores, kernel.w)
    assert error(kernel(x, scores), want) <= 4 * torch.finfo(x.dtype).eps
