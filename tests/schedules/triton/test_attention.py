"""Attention over a cache in Triton's interpreter, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blockffn_compile.schedules.triton import attention
from tests.test_step_ops import HEADS, LIMITS, SHAPES, TREE, Case, chain, error


def run(case: Case, batch: slice = slice(None)) -> Tensor:
    q, keys, values, rows, context, ancestors = case.arguments()
    out = torch.full((*q.shape[:2], values.shape[3]), math.nan, dtype=q.dtype)
    attention.cached_attention(q, keys[batch], values[batch], rows, context, ancestors, out)
    return out


#: All heads and all shapes, not all pairs: the interpreter is slow.
PAIRS = [*((heads, "tree") for heads in HEADS), *(("groups of two", shape) for shape in SHAPES)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "shape"), PAIRS)
def test_error_against_fp64(heads, shape, dtype):
    case = Case(heads, dtype, SHAPES[shape])
    assert error(run(case), case.exact()) <= 2 * LIMITS[dtype]
    # One sequence: its tokens share reads.
    if not case.rows.any():
        assert error(run(case, slice(1)), case.exact()) <= 2 * LIMITS[dtype]


def test_few_long_pieces(monkeypatch):
    monkeypatch.setattr(attention, "PIECES", 2)
    case = Case("one group", torch.float16, SHAPES["rows"])
    assert error(run(case), case.exact()) <= 2 * LIMITS[torch.float16]


@pytest.mark.parametrize("group", [16, 100])
def test_large_groups(group, monkeypatch):
    monkeypatch.setitem(HEADS, "large", (group, 1, 40, 72))
    case = Case("large", torch.bfloat16, [(0, 20, mask) for mask in TREE[:3]])
    assert error(run(case, slice(1)), case.exact()) <= 2 * LIMITS[torch.bfloat16]


def test_the_last_ancestor_bit():
    case = Case("one group", torch.float16, chain(64, 3))
    before = run(case, slice(1))
    case.values[0, :, 3 + 63] += 1
    after = run(case, slice(1))
    assert torch.equal(after[:63], before[:63])
    assert not torch.isclose(after[63], before[63]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("slot", [72, 68, 5, 90])
def test_is_poisoned_by_what_it_sees_alone(where, value, slot):
    """An ancestor of some, slots of the context of all, beside those and not, one nobody sees."""
    case = Case("groups of two", torch.bfloat16, [(0, 70, mask) for mask in TREE])
    clean = run(case, slice(1))
    getattr(case, where)[0, :, slot] = value
    y = run(case, slice(1))
    seeing = torch.tensor([slot in case.seen(t) for t in range(len(TREE))])
    assert torch.equal(y[~seeing], clean[~seeing])
    if where == "values" or value != value:
        assert not y[seeing].isfinite().any()
    elif seeing.any():
        # A key of Inf takes all weight, or none: its score has the sign of the query.
        assert not torch.equal(y[seeing], clean[seeing])


def test_a_query_of_nan_stays_alone():
    case = Case("groups of two", torch.bfloat16, chain(5, 17))
    clean = run(case, slice(1))
    case.q[2, 1, 31] = math.nan
    y = run(case, slice(1))
    assert y[2, 1].isnan().all()
    y[2, 1] = clean[2, 1]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_one_key_far_above_the_others(scale):
    case = Case("groups of two", torch.bfloat16, chain(5, 17))
    case.q *= scale
    torch.testing.assert_close(run(case).double(), case.exact(), rtol=2e-2, atol=2e-2)


def test_views():
    """Queries arrive heads first; a cache may be a part of another."""
    case = Case("groups of two", torch.bfloat16, SHAPES["rows"])
    want = run(case)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("keys", "values"):
        stored = getattr(case, name)
        apart = torch.full((3, stored.shape[1] + 1, stored.shape[2] + 7, stored.shape[3]), math.nan)
        view = apart.to(stored.dtype)[:, 1:, : stored.shape[2]]
        view.copy_(stored)
        setattr(case, name, view)
    assert torch.equal(run(case), want)
