"""Weights as small integers with a scale for every group of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from blockffn_compile.layer import Quantisation, Scheme

#: Parts of the names of weights that stay as they are: routers decide which experts run.
EXACT = ("router",)


def stays(weight: str, parts: Sequence[str] = EXACT) -> bool:
    """Whether a weight of this name is not to be quantised."""
    return any(part in weight for part in parts)


#: Shares of the largest weight of a group that are tried as the end of four bits: rounding a few
#: large weights down may cost less than coarser steps for all (normal weights: 5.5 % less error).
SHARES = tuple(1.1 - i / 20 for i in range(8))

#: Weights that are quantised at a time.
PIECE = 1 << 18


def as_quantisation(scheme: Scheme, group: int) -> Quantisation:
    """The quantisation of a name, ``int8`` or ``int4``.

    Raises:
        ValueError: another name, or a group that is no multiple of 32.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; choose int8 or int4")
    if group < 32 or group % 32:
        raise ValueError(f"group is {group}; it must be a multiple of 32")
    return Quantisation(8 if scheme == "int8" else 4, group)


def quantised(weight: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """The integers and scales nearest to a weight, by the squared error of each group.

    Args:
        weight: [..., K], K the summed axis, a multiple of the group.
        quantisation: bits and group.

    Returns:
        int8 [..., K] or uint8 [..., K/2], and the scales, bfloat16 [..., K/group].

    Raises:
        ValueError: a weight is not finite.
    """
    depth = weight.shape[-1]
    rows = weight.detach().reshape(-1, depth)
    # In pieces that caches hold: several copies in fp32 are made of each.
    pieces = [_quantised(piece, quantisation) for piece in rows.split(max(1, PIECE // depth))]
    values, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = weight.shape[:-1]
    return values.view(*shape, -1), scales.view(*shape, -1)


def _quantised(rows: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    bits, group = quantisation
    groups = rows.float().unflatten(-1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # By a power of two, which changes no digit: squares neither overflow nor vanish.
    if not torch.isfinite(largest).all():
        raise ValueError("weights that are not finite cannot be quantised")
    exponent = torch.frexp(largest).exponent.clamp_(min=-100)
    groups, largest = torch.ldexp(groups, -exponent), torch.ldexp(largest, -exponent)
    if bits == 8:
        least, most, largest = -127, 127, largest.abs()
    else:
        # There is one more negative number: the largest weight becomes it, by a scale's sign.
        least, most, largest = -8, 7, -largest
    end = 127 if bits == 8 else 8
    best = torch.full_like(largest, torch.inf)
    values, scales = torch.zeros_like(groups), torch.zeros_like(largest)
    for share in SHARES if bits == 4 else (1.0,):
        scale = (largest * share / end).to(torch.bfloat16).float()
        steps = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(least, most)
        if bits == 4:  # the best scale for these steps
            squares = steps.square().sum(-1, keepdim=True).clamp_(min=1)
            scale = ((groups * steps).sum(-1, keepdim=True) / squares).to(torch.bfloat16).float()
        error = (steps * scale - groups).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        values, scales = torch.where(better, steps, values), torch.where(better, scale, scales)
    integers = values.flatten(-2).to(torch.int8)
    if bits == 4:
        low, high = integers.unflatten(-1, (-1, 2)).unbind(-1)
        integers = ((low & 15) | (high << 4)).view(torch.uint8)
    return integers, torch.ldexp(scales, exponent).squeeze(-1).to(torch.bfloat16)


def dequantised(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that integers and scales stand for, [..., K], rounded to ``dtype`` once."""
    integers = values
    if values.dtype == torch.uint8:
        signed = values.view(torch.int8)
        integers = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = integers.unflatten(-1, (scales.shape[-1], -1)).to(wide)
    return (groups * scales.unsqueeze(-1).to(wide)).flatten(-2).to(dtype)


def quantisation_of(values: Tensor, scales: Tensor) -> Quantisation:
    """How they are stored, from their shapes."""
    per_byte = 2 if values.dtype == torch.uint8 else 1
    return Quantisation(4 if per_byte == 2 else 8, values.numel() * per_byte // scales.numel())
