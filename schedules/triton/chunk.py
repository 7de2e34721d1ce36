"""Decode and chunk: up to 64 tokens, each active expert's weights read once.

Two launches.  ``up`` finds the union of the tokens' experts, runs ``act(x @ up) * score``, and has
the level 2 cache fetch what ``down``, which adds the experts up, will read.  Products run on tensor
cores with the weights as the left operand, so that few tokens waste little of them.

One output is the sum of LANES partial sums, and each of those one chain of products in ascending
order of k (up), or of experts and then of k (down).  A token that an expert is not for leaves the
chain as it is.  So a token's row has the same bits whatever the other tokens are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockffn_compile.schedules.triton.plan import (
    LANES,
    fetch,
    follow,
    nonzero,
    poison,
    publish,
    token_sets,
)


@triton.jit
def activate(value, ACT: tl.constexpr):
    """The activation of fp32 values."""
    if ACT == "silu":
        result = value / (1 + tl.exp(-value))
    elif ACT == "relu":
        result = tl.where(value < 0, 0.0, value)  # keeps NaN
    else:
        tl.static_assert(ACT == "gelu")
        result = value * 0.5 * (1 + tl.erf(value * 0.7071067811865476))
    return result


@triton.jit(do_not_specialize=["tokens"])
def up(
    x,
    scores,
    w_up,
    w_gate,
    w_down,
    mid,
    plan,
    poisons,
    tokens,
    stride_e,
    stride_n,
    stride_k,
    down_e,
    down_h,
    H: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    FETCH: tl.constexpr,
    FOLLOWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``mid[e, t] = act(x[t] @ w_up[e].T) * scores[t, e]`` for active pairs, and the plan.

    A work item is ROWS rows of an expert's weights for a group of TOKENS tokens, if any is in it.

    Args:
        x: [T, H].
        scores: [T, E].
        w_up: [E, S, H] with the strides given; w_gate: the same, or anything if not GATED.
        w_down: [E, H, S] with the strides given, and 1.
        mid: [E, T, S]; only active pairs are written.
        plan: see ``plan.publish``.
        poisons: [T] fp32, see ``plan.poison``.
        tokens: T, at most 64.
        FETCH: experts, at most, whose ``w_down`` is fetched.
        FOLLOWS: see ``plan.follow``.
        DEPTH: how much of a lane's k is in one product.
    """
    if FOLLOWS:
        follow()
    PART: tl.constexpr = (H + 16 * LANES - 1) // (16 * LANES) * 16
    TILES: tl.constexpr = (S + ROWS - 1) // ROWS
    SECTORS: tl.constexpr = (S + 15) // 16  # of 32 bytes, in a row of w_down
    BLOCK: tl.constexpr = 512
    SHARE: tl.constexpr = (H * SECTORS + TILES - 1) // TILES
    program, programs = tl.program_id(0), tl.num_programs(0)
    sets = token_sets(scores, 0, tokens, E, COLUMNS, min(TOKENS, 16))
    # The last programs have the least to do below.
    if program == programs - 1:
        publish(sets, plan, COLUMNS)
    for lone in range(programs - 1 - program, tokens, programs):
        tl.store(poisons + lone, poison(x, scores, lone, H, E, COLUMNS))

    on = sets != 0
    rank, active = tl.cumsum(on.to(tl.int32), 0), tl.sum(on.to(tl.int32), 0)
    expert_of = tl.arange(0, COLUMNS * LANES)
    lane = tl.arange(0, LANES)[:, None, None]
    k = tl.arange(0, DEPTH)[None, None, :]
    groups = (tokens + TOKENS - 1) // TOKENS
    for item in range(program, active * TILES * groups, programs):
        # The groups of tokens run side by side, so that memory is asked once for the weights.
        group, part = item % groups * TOKENS, item // groups
        token = group + tl.arange(0, TOKENS)
        expert = tl.sum(tl.where(on & (rank == part // TILES + 1), expert_of, 0), 0)
        score = tl.load(scores + token * E + expert, mask=token < tokens, other=0.0)
        used = nonzero(score)
        depth = PART
        if groups > 1:
            depth = tl.max(used.to(tl.int32), 0) * PART
        row = part % TILES * ROWS + tl.arange(0, ROWS)
        first = expert.to(tl.int64) * stride_e
        sums = tl.zeros([LANES, ROWS, TOKENS], tl.float32)
        gates = tl.zeros([LANES, ROWS, TOKENS], tl.float32)
        for start in range(0, depth, DEPTH):
            h = lane * PART + start + k
            there = (h < H) & (start + k < PART)
            weight = first + row[None, :, None] * stride_n + h * stride_k
            known = there & (row < S)[None, :, None]
            tile = tl.load(w_up + weight, mask=known, other=0.0)
            inputs = tl.load(
                x + token[None, :, None] * H + h, mask=there & used[None, :, None], other=0.0
            )
            inputs = tl.permute(inputs, 0, 2, 1)
            sums = tl.dot(tile, inputs, sums)
            if GATED:
                tile = tl.load(w_gate + weight, mask=known, other=0.0)
                gates = tl.dot(tile, inputs, gates)
        # Behind this item's own reads, its share of the expert's down projection.
        if (group == 0) & (part // TILES < FETCH):
            last = tl.minimum(part % TILES * SHARE + SHARE, H * SECTORS)
            for start in range(part % TILES * SHARE, last, BLOCK):
                sector = start + tl.arange(0, BLOCK)
                column = sector // SECTORS * down_h + sector % SECTORS * 16
                fetch(w_down + expert.to(tl.int64) * down_e + column, sector < last)
        value = tl.sum(sums, 0)
        if GATED:
            value = value * activate(tl.sum(gates, 0), ACT)
        else:
            value = activate(value, ACT)
        place = (expert.to(tl.int64) * tokens + token[None, :]) * S + row[:, None]
        value = (value * score.to(tl.float32)[None, :]).to(mid.dtype.element_ty)
        tl.store(mid + place, value, mask=used[None, :] & (row < S)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def down(
    mid,
    w_down,
    plan,
    poisons,
    y,
    tokens,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    S: tl.constexpr,
    FOLLOWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``y[t] = sum_e mid[e, t] @ w_down[e].T`` over active pairs.

    A program has ROWS outputs of a group of TOKENS tokens.

    Args:
        mid, plan, poisons: of :func:`up`.
        w_down: [E, H, S] with the strides given.
        y: [T, H], for the result.
        tokens: T, at most 64.
        FOLLOWS: see ``plan.follow``.
        DEPTH: how much of S is in one product.
    """
    if FOLLOWS:
        follow()
    BLOCKS: tl.constexpr = (S + DEPTH - 1) // DEPTH
    GROUP: tl.constexpr = (1 << TOKENS) - 1
    groups = (tokens + TOKENS - 1) // TOKENS
    group = tl.program_id(0) % groups * TOKENS
    lane = tl.arange(0, LANES)
    token = group + tl.arange(0, TOKENS)
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([LANES, ROWS, TOKENS], tl.float32)
    longest = tl.load(plan + 2 * LANES * COLUMNS).to(tl.int32)
    for step in range(longest * BLOCKS):
        place = plan + lane * COLUMNS + step // BLOCKS
        expert = tl.load(place)
        its_tokens = tl.load(place + LANES * COLUMNS) >> group
        used = ((its_tokens[:, None] >> tl.arange(0, TOKENS)[None, :]) & 1) != 0
        needed = (its_tokens & GROUP) != 0
        s = (step % BLOCKS * DEPTH + tl.arange(0, DEPTH))[None, None, :]
        tile = tl.load(
            (w_down + expert * stride_e)[:, None, None]
            + (row[None, :, None] * stride_n + s * stride_k),
            mask=needed[:, None, None] & (row < H)[None, :, None] & (s < S),
            other=0.0,
        )
        inputs = tl.load(
            (mid + expert * tokens * S)[:, None, None] + (token[None, :, None] * S + s),
            mask=used[:, :, None] & (s < S),
            other=0.0,
        )
        more = tl.dot(tile, tl.permute(inputs, 0, 2, 1), sums)
        sums = tl.where(used[:, None, :], more, sums)
    there = token < tokens
    value = tl.sum(sums, 0) + tl.load(poisons + token, mask=there, other=0.0)[None, :]
    place = token[None, :] * H + row[:, None]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=there[None, :] & (row < H)[:, None])
