"""Attention of a few tokens over a static cache.

Two launches.  ``attend`` cuts the slots of the cache into pieces and gives each query the softmax
over the slots of a piece that it sees; ``join`` adds the pieces up.  Queries that share a key head
share a read of keys and values, if the cache is of one sequence those of several tokens, too.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockffn_compile.schedules.triton.plan import follow

#: Slots of a product; the most queries that share them, if they belong to several tokens.
SLOTS, QUERIES = 64, 32
#: Most pieces of a cache: what they leave behind is kept in fp32.
PIECES = 64


@triton.jit(do_not_specialize=["tokens"])
def attend(
    q,
    keys,
    values,
    rows,
    context,
    ancestors,
    sums,
    stats,
    tokens,
    length,
    scale,
    q_token,
    q_head,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    D: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """A program has a piece of the cache, a key head, and the queries of some tokens.

    Args:
        q: [T, Q, D] with the strides given, and 1.
        keys: [B, G, L, D], likewise; values: [B, G, L, V].
        rows, context, ancestors: see ``step_ops.cached_attention``; TOKENS consecutive tokens
            have one row.
        sums: [T, Q, pieces, V] fp32, for sums of values, weighted by 2 ** (score - largest score).
        stats: [T, Q, pieces, 2] fp32, for the largest score and the sum of the weights.
        scale: of products to scores, which are logarithms to base 2.
        GROUP: queries of a key head.
        TOKENS: of a program.
        EACH: power of two, at least GROUP: queries of a token, those past GROUP left out.
        PIECE: slots of a piece, a multiple of SLOTS.
        COLUMNS: power of two, at least V.
        FOLLOWS: see ``plan.follow``.
    """
    if FOLLOWS:
        follow()
    DEPTH: tl.constexpr = 64
    head, piece = tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, TOKENS * EACH)
    token = tl.program_id(0) * TOKENS + n // EACH
    query = head * GROUP + n % EACH
    there = (token < tokens) & (n % EACH < GROUP)
    past = tl.load(context + token, mask=there, other=0).to(tl.int32)
    own = tl.load(ancestors + token, mask=there, other=0)
    low, high = own.to(tl.int32), (own >> 32).to(tl.int32)
    end = tl.minimum(tl.max(past, 0) + 64, length)
    if piece * PIECE < end:
        row = tl.load(rows + tl.program_id(0) * TOKENS)
        keys += row * key_row + head * key_head
        values += row * value_row + head * value_head
        shared = tl.min(tl.where(there, past, length), 0)
        column = tl.arange(0, COLUMNS)
        top = tl.full([TOKENS * EACH], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS * EACH], tl.float32)
        result = tl.zeros([TOKENS * EACH, COLUMNS], tl.float32)
        for first in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, end), SLOTS):
            slot = first + tl.arange(0, SLOTS)
            node = slot[None, :] - past[:, None]
            bits = tl.where(node < 32, low[:, None], high[:, None]) >> (node & 31)
            seen = (node < 0) | ((node < 64) & ((bits & 1) != 0))
            seen = seen & there[:, None] & (slot < length)[None, :]
            score = tl.zeros([TOKENS * EACH, SLOTS], tl.float32)
            for start in tl.static_range(0, D, DEPTH):
                d = start + tl.arange(0, DEPTH)
                part = tl.load(
                    q + token[:, None] * q_token + query[:, None] * q_head + d[None, :],
                    mask=there[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                key = tl.load(
                    keys + slot[:, None].to(tl.int64) * key_slot + d[None, :],
                    mask=(slot < length)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                score = tl.dot(part, tl.trans(key), score)
            value = tl.load(
                values + slot[:, None].to(tl.int64) * value_slot + column[None, :],
                mask=(slot < length)[:, None] & (column < V)[None, :],
                other=0.0,
            )
            score = tl.where(seen, score * scale, float("-inf"))
            now = tl.maximum(top, tl.max(score, 1))
            base = tl.where(now == float("-inf"), 0.0, now)
            weight = tl.exp2(score - base[:, None])
            before = tl.exp2(top - base)
            top, total = now, total * before + tl.sum(weight, 1)

            # A product gives what a query does not see the weight 0, which NaN and Inf survive.
            common = first + SLOTS <= shared
            finite = value.to(tl.float32) * 0 == 0
            result *= before[:, None]
            result = tl.dot(weight.to(value.dtype), tl.where(finite | common, value, 0.0), result)
            if not common:
                lost = tl.dot(
                    tl.where(seen, 1.0, 0.0).to(value.dtype),
                    tl.where(finite, 0.0, 1.0).to(value.dtype),
                )
                result = tl.where(lost > 0, float("nan"), result)
        place = token * (GROUP * tl.num_programs(1)) + query
        place = place.to(tl.int64) * tl.num_programs(2) + piece
        tl.store(stats + 2 * place, top, mask=there)
        tl.store(stats + 2 * place + 1, total, mask=there)
        tl.store(
            sums + place[:, None] * V + column[None, :],
            result,
            mask=there[:, None] & (column < V)[None, :],
        )


@triton.jit
def join(
    sums,
    stats,
    context,
    y,
    length,
    heads,
    pieces,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """A program has a query.

    Args:
        sums, stats: of :func:`attend`, for its ``length`` and PIECE.
        y: [T, Q, V], for the result.
        heads: Q.
        pieces: of the whole cache, at most PIECES, a power of two.
    """
    if FOLLOWS:
        follow()
    query = tl.program_id(0).to(tl.int64)
    past = tl.load(context + query // heads).to(tl.int32)
    used = (tl.minimum(past + 64, length) + PIECE - 1) // PIECE
    piece, column = tl.arange(0, PIECES), tl.arange(0, COLUMNS)
    place = query * pieces + piece
    top = tl.load(stats + 2 * place, mask=piece < used, other=float("-inf"))
    total = tl.load(stats + 2 * place + 1, mask=piece < used, other=0.0)
    part = tl.load(
        sums + place[:, None] * V + column[None, :],
        mask=(piece < used)[:, None] & (column < V)[None, :],
        other=0.0,
    )
    weight = tl.exp2(top - tl.max(top, 0))
    result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y + query * V + column, result.to(y.dtype.element_ty), mask=column < V)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    context: Tensor,
    ancestors: Tensor,
    out: Tensor,
    follows: bool = False,
) -> None:
    """See ``step_ops.cached_attention``; fp16 and bf16.

    Args:
        follows: see ``config.Gpu``.
    """
    q, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, keys, values))
    (tokens, heads, d), (batch, kv_heads, length, _), v = q.shape, keys.shape, values.shape[3]
    if tokens == 0:
        return
    group = heads // kv_heads
    each = triton.next_power_of_2(group)
    # Tokens of one sequence alone are known to be of one.
    together = min(triton.next_power_of_2(tokens), max(1, QUERIES // each)) if batch == 1 else 1
    each = max(each, 16 // together)  # a product has 16 rows
    piece = -(-length // (PIECES * SLOTS)) * SLOTS
    pieces = -(-length // piece)
    sums = q.new_empty(tokens * heads * pieces * v, dtype=torch.float32)
    stats = q.new_empty(tokens * heads * pieces * 2, dtype=torch.float32)
    columns = triton.next_power_of_2(v)
    # Wide heads and large groups need the shared memory and the registers of two small programs.
    large = d + v > 320 or together * each > QUERIES
    with torch.cuda.device_of(q):
        # Left to itself, the assembler gives a program few registers, and spills.
        attend[(-(-tokens // together), kv_heads, pieces)](
            q, keys, values, rows, context, ancestors, sums, stats, tokens, length,
            d**-0.5 * math.log2(math.e), *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
            D=d, V=v, GROUP=group, TOKENS=together, EACH=each, SLOTS=SLOTS, PIECE=piece,
            COLUMNS=columns, FOLLOWS=follows, launch_pdl=follows,
            num_warps=8, num_stages=1 if large else 2, maxnreg=255 if large else 168,
        )  # fmt: skip
        join[(tokens * heads,)](
            sums, stats, context, out, length, heads, pieces,
            V=v, PIECE=piece, COLUMNS=columns, PIECES=triton.next_power_of_2(pieces),
            FOLLOWS=follows, launch_pdl=follows, num_warps=4,
        )  # fmt: skip
