"""Which experts run for which tokens, found on the device.

Launch sizes never depend on it: programs loop over the work that there is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockffn_compile.schedules.triton import config

LANES = tl.constexpr(config.LANES)


@triton.jit
def nonzero(scores):
    """Whether 16-bit floats are neither +0 nor -0; NaN is not zero."""
    return (scores.to(tl.int16, bitcast=True) & 0x7FFF) != 0


@triton.jit
def token_sets(scores, first, last, E: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr):
    """Tokens of each expert, as bits: [COLUMNS * LANES] int64.

    Args:
        scores: [T, E].
        first: token of bit 0.
        last: token behind the last one, at most ``first + 64``.
        COLUMNS: power of two, at least E / LANES.
        UNROLLED: power of two, at most 64: tokens whose scores are asked for at a time.
    """
    expert = tl.arange(0, COLUMNS * LANES)
    sets = tl.zeros([COLUMNS * LANES], tl.int64)
    for start in range(first, last, UNROLLED):
        for ahead in tl.static_range(UNROLLED):
            token = start + ahead
            there = (expert < E) & (token < last)
            score = tl.load(scores + token * E + expert, mask=there, other=0.0)
            sets |= nonzero(score).to(tl.int64) << (token - first)
    return sets


@triton.jit
def fetch(pointers, wanted):
    """Asks the level 2 cache for the 32 bytes at each pointer, if wanted, and waits for nothing."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        @wanted prefetch.global.L2 [$1];
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [pointers, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def follow():
    """Waits for the kernel before this one and lets the next one start; see ``config.Gpu``.

    Nothing may be read or written before.  By then the kernels before that have ended as well, as
    each of them waited, or was launched when all was done.
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def publish(sets, plan, COLUMNS: tl.constexpr):
    """Writes the active experts of each lane, ascending, for the down projection.

    Args:
        sets: of :func:`token_sets`.
        plan: int64 [2 * LANES * COLUMNS + 1], for the result: expert numbers
            [LANES, COLUMNS], those of inactive experts last; their token sets, in the same
            order; the most active experts of a lane.
    """
    lane, column = tl.arange(0, LANES)[None, :], tl.arange(0, COLUMNS)[:, None]
    sets = tl.reshape(sets, [COLUMNS, LANES])
    on = (sets != 0).to(tl.int32)
    rank, count = tl.cumsum(on, 0), tl.sum(on, 0)
    place = lane * COLUMNS + tl.where(on != 0, rank - 1, count[None, :] + column - rank)
    tl.store(plan + place, (column * LANES + lane).to(tl.int64))
    tl.store(plan + LANES * COLUMNS + place, sets)
    tl.store(plan + 2 * LANES * COLUMNS, tl.max(count, 0).to(tl.int64))


@triton.jit
def poison(x, scores, token, H: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr):
    """NaN for a token without experts whose x has a NaN or Inf, else zero.

    The dense form has 0 * x there.
    """
    BLOCK: tl.constexpr = 1024
    expert = tl.arange(0, COLUMNS * LANES)
    score = tl.load(scores + token * E + expert, mask=expert < E, other=0.0)
    total = 0.0
    if tl.max(nonzero(score).to(tl.int32), 0) == 0:
        h = tl.arange(0, BLOCK)
        parts = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H, BLOCK):
            row = tl.load(x + token * H + start + h, mask=start + h < H, other=0.0)
            parts += row.to(tl.float32) * 0.0
        total = tl.sum(parts, 0)
    return total
