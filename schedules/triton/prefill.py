"""Prefill: any number of tokens, as grouped products over the active pairs.

Three launches.  ``plan`` lists each expert's tokens, and for each tile of up to 64 tokens the
experts; ``up`` multiplies each expert with its tokens, gathered into tiles; ``down`` gives each
tile of tokens the sum over the experts of their union.  That union is two to three times the
pairs, but a product over pairs would write and read a row of H for every one of them, which costs
more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blockffn_compile.schedules.triton.chunk import activate
from blockffn_compile.schedules.triton.plan import LANES, nonzero, poison, publish, token_sets


@triton.jit(do_not_specialize=["tokens"])
def plan(
    x,
    scores,
    lists,
    counts,
    plans,
    poisons,
    tokens,
    H: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Programs 0 to E - 1 list an expert's tokens, all others plan a tile of tokens.

    Args:
        x: [T, H].
        scores: [T, E].
        lists: [E, T] int32; the first counts[e] of a row are the expert's tokens, ascending.
        counts: [E] int32.
        plans: [T / TOKENS, 2 * LANES * COLUMNS + 1] int64, see ``plan.publish``.
        poisons: [T] fp32, see ``plan.poison``.
        tokens: T.
        TOKENS: of a tile, at most 64: a set of tokens is one word.
    """
    BLOCK: tl.constexpr = 1024
    program = tl.program_id(0)
    if program < E:
        count = 0
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.load(scores + token * E + program, mask=token < tokens, other=0.0)
            on = nonzero(score).to(tl.int32)
            place = program * tokens + count + tl.cumsum(on, 0) - 1
            tl.store(lists + place, token, mask=on != 0)
            count += tl.sum(on, 0)
        tl.store(counts + program, count)
    else:
        first = (program - E) * TOKENS
        last = tl.minimum(first + TOKENS, tokens)
        sets = token_sets(scores, first, last, E, COLUMNS, 16)
        publish(sets, plans + (program - E) * (2 * LANES * COLUMNS + 1), COLUMNS)
        for token in range(first, last):
            tl.store(poisons + token, poison(x, scores, token, H, E, COLUMNS))


@triton.jit(do_not_specialize=["tokens"])
def up(
    x,
    scores,
    w_up,
    w_gate,
    mid,
    lists,
    counts,
    tokens,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``mid[e, t] = act(x[t] @ w_up[e].T) * scores[t, e]`` for active pairs.

    Args:
        x, scores, w_up, w_gate, mid, tokens: as for ``chunk.up``, any T.
        lists, counts: of :func:`plan`.
        TOKENS: pairs of a work item, of one expert.
        ROWS: rows of its weights of a work item.
        DEPTH: how much of H is in one product.
    """
    TILES: tl.constexpr = (S + ROWS - 1) // ROWS
    expert_of = tl.arange(0, COLUMNS * LANES)
    count_of = tl.load(counts + expert_of, mask=expert_of < E, other=0)
    tiles = (count_of + TOKENS - 1) // TOKENS
    ends = tl.cumsum(tiles, 0)
    k = tl.arange(0, DEPTH)
    for item in range(tl.program_id(0), tl.sum(tiles, 0) * TILES, tl.num_programs(0)):
        index = item // TILES
        expert = tl.sum((ends <= index).to(tl.int32), 0)
        chosen = expert_of == expert
        count = tl.sum(tl.where(chosen, count_of, 0), 0)
        pair = (index - tl.sum(tl.where(chosen, ends - tiles, 0), 0)) * TOKENS
        pair += tl.arange(0, TOKENS)
        used = pair < count
        token = tl.load(lists + expert * tokens + pair, mask=used, other=0)
        row = item % TILES * ROWS + tl.arange(0, ROWS)
        weight = expert.to(tl.int64) * stride_e + row[None, :] * stride_n
        inputs = x + token[:, None].to(tl.int64) * H
        sums = tl.zeros([TOKENS, ROWS], tl.float32)
        gates = tl.zeros([TOKENS, ROWS], tl.float32)
        for start in range(0, H, DEPTH):
            h = start + k
            known = (h < H)[:, None] & (row < S)[None, :]
            part = tl.load(inputs + h[None, :], mask=used[:, None] & (h < H)[None, :], other=0.0)
            sums = tl.dot(
                part, tl.load(w_up + weight + h[:, None] * stride_k, mask=known, other=0.0), sums
            )
            if GATED:
                gates = tl.dot(
                    part,
                    tl.load(w_gate + weight + h[:, None] * stride_k, mask=known, other=0.0),
                    gates,
                )
        if GATED:
            value = sums * activate(gates, ACT)
        else:
            value = activate(sums, ACT)
        score = tl.load(scores + token * E + expert, mask=used, other=0.0).to(tl.float32)
        pairs = (expert.to(tl.int64) * tokens + token[:, None]) * S
        value = (value * score[:, None]).to(mid.dtype.element_ty)
        tl.store(mid + pairs + row[None, :], value, mask=used[:, None] & (row < S)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def down(
    mid,
    w_down,
    plans,
    poisons,
    y,
    tokens,
    stride_e,
    stride_n,
    stride_k,
    H: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``y[t] = sum_e mid[e, t] @ w_down[e].T`` over active pairs; a program has [TOKENS, ROWS].

    Args: as for ``chunk.down``, any T; plans: of :func:`plan`.
    """
    BLOCKS: tl.constexpr = (S + DEPTH - 1) // DEPTH
    TILES: tl.constexpr = (H + ROWS - 1) // ROWS
    tile = tl.program_id(0) // TILES
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    its_plan = plans + tile * (2 * LANES * COLUMNS + 1)
    mid += tile.to(tl.int64) * TOKENS * S
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    longest = tl.load(its_plan + 2 * LANES * COLUMNS).to(tl.int32)
    for step in range(longest * LANES * BLOCKS):
        column = step // BLOCKS // LANES
        place = its_plan + (step // BLOCKS - column * LANES) * COLUMNS + column
        expert = tl.load(place)
        its_tokens = tl.load(place + LANES * COLUMNS)
        used = ((its_tokens >> token) & 1) != 0
        s = step % BLOCKS * DEPTH + tl.arange(0, DEPTH)
        inputs = tl.load(
            mid + (expert * tokens + token)[:, None] * S + s[None, :],
            mask=used[:, None] & (s < S)[None, :],
            other=0.0,
        )
        weight = tl.load(
            w_down + expert * stride_e + row[None, :] * stride_n + s[:, None] * stride_k,
            mask=(its_tokens != 0) & (row < H)[None, :] & (s < S)[:, None],
            other=0.0,
        )
        sums += tl.where(used[:, None], tl.dot(inputs, weight), 0.0)
    token += tile * TOKENS
    there = token < tokens
    value = sums + tl.load(poisons + token, mask=there, other=0.0)[:, None]
    place = token[:, None].to(tl.int64) * H + row[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=there[:, None] & (row < H)[None, :])
