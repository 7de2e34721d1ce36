"""Plans in Triton's interpreter, against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from blockffn_compile.schedules.triton.config import LANES
from blockffn_compile.schedules.triton.plan import poison, publish, token_sets


@triton.jit
def write_plan(
    scores, plan, first, last, E: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr
):
    publish(token_sets(scores, first, last, E, COLUMNS, UNROLLED), plan, COLUMNS)


@triton.jit
def write_poison(x, scores, out, H: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    tl.store(out + token, poison(x, scores, token, H, E, COLUMNS))


@pytest.mark.parametrize("experts", [1, 5, 40, 512])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize(("density", "unrolled"), [(0.0, 8), (0.1, 16), (0.1, 32), (1.0, 8)])
def test_plans(experts, tokens, density, unrolled):
    dtype = torch.float16 if experts % 2 else torch.bfloat16
    g = torch.Generator().manual_seed(experts + tokens)
    on = torch.rand(tokens, experts, generator=g) < density
    # Subnormal, negative and NaN scores count; -0 does not.
    values = torch.tensor([1e-7 if dtype is torch.float16 else 1e-39, -2.0, math.nan])
    values = values[torch.randint(3, on.shape, generator=g)]
    scores = torch.where(on, values, torch.tensor(-0.0)).to(dtype)
    columns = triton.next_power_of_2(-(-experts // LANES))
    plan = torch.full((2 * LANES * columns + 1,), -7)
    write_plan[(1,)](scores, plan, 0, tokens, E=experts, COLUMNS=columns, UNROLLED=unrolled)
    numbers, sets = plan[:-1].view(2, LANES, columns).tolist()
    longest = 0
    for lane in range(LANES):
        wanted = [
            (e, sum(1 << t for t in range(tokens) if on[t, e]))
            for e in range(lane, experts, LANES)
            if on[:, e].any()
        ]
        # The highest bit is a sign.
        wanted = [(e, bits - (1 << 64) if bits >> 63 else bits) for e, bits in wanted]
        count = len(wanted)
        assert list(zip(numbers[lane], sets[lane], strict=True))[:count] == wanted
        assert not any(sets[lane][count:])
        longest = max(longest, count)
    assert plan[-1] == longest


def test_a_range_of_tokens():
    scores = torch.zeros(100, 3).half()
    scores[40, 1] = scores[70, 1] = scores[99, 2] = 1
    plan = torch.zeros(2 * LANES + 1, dtype=torch.int64)
    write_plan[(1,)](scores, plan, 40, 99, E=3, COLUMNS=1, UNROLLED=16)
    assert plan.tolist() == [*range(LANES), 0, 1 | 1 << 30, *[0] * (LANES - 2), 1]


def test_poison_is_nan_without_experts_and_with_a_non_finite_x():
    x = torch.ones(4, 1500).half()
    x[0, 1400], x[1, 3], x[3, 0] = math.nan, math.inf, math.nan
    scores = torch.zeros(4, 5).half()
    scores[3, 4] = 1
    out = torch.full((4,), -7.0)
    write_poison[(4,)](x, scores, out, H=1500, E=5, COLUMNS=2)
    torch.testing.assert_close(out, torch.tensor([math.nan, math.nan, 0, 0]), equal_nan=True)
