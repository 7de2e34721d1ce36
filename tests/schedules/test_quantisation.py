"""Weights as small integers: what rounding costs, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from blockffn_compile.layer import Quantisation
from blockffn_compile.schedules.quantisation import (
    as_quantisation,
    dequantised,
    quantisation_of,
    quantised,
)

BOTH = pytest.mark.parametrize("bits", [8, 4])
GROUPS = pytest.mark.parametrize("group", [32, 64, 96])


def integers(bits, shape, seed: int = 0):
    """Some of every value, and in every group the end of the range."""
    end = 127 if bits == 8 else 8
    values = torch.randint(-end, min(end, 7 if bits == 4 else end) + 1, shape)
    return values.index_fill(-1, torch.arange(0, shape[-1], 32), -end)


@BOTH
@GROUPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_integers_times_a_scale_stay(bits, group, dtype):
    torch.manual_seed(0)
    values = integers(bits, (3, 5, 192))
    scales = 2.0 ** torch.randint(-20, 20, (3, 5, 192 // group, 1))
    weight = (values.unflatten(-1, (-1, group)) * scales).flatten(-2).to(dtype)
    made = quantised(weight, Quantisation(bits, group))
    assert torch.equal(dequantised(*made, dtype), weight)


@BOTH
def test_how_they_are_stored(bits):
    torch.manual_seed(0)
    values = integers(bits, (2, 64))
    stored, scales = quantised(values.float() / 4, Quantisation(bits, 32))
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales.abs(), torch.full((2, 2), 0.25, dtype=torch.bfloat16))
    assert quantisation_of(stored, scales) == Quantisation(bits, 32)
    signs = scales.float().sign().repeat_interleave(32, -1)
    if bits == 8:
        assert stored.dtype == torch.int8
        assert torch.equal(stored, (values * signs).to(torch.int8))
        return
    assert stored.dtype == torch.uint8
    assert stored.shape == (2, 32)
    low, high = (stored & 15).int(), (stored >> 4).int()
    wanted = (values * signs).int()
    assert torch.equal(low, wanted[:, ::2] & 15)
    assert torch.equal(high, wanted[:, 1::2] & 15)


@BOTH
@GROUPS
def test_rounding_is_within_half_a_step(bits, group):
    """Of the scale, which is rounded itself; int4 may cut the largest weights for the others."""
    torch.manual_seed(0)
    weight = torch.randn(64, 192)
    error = (
        dequantised(*quantised(weight, Quantisation(bits, group)), torch.float64) - weight
    ).abs()
    largest = weight.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True)
    if bits == 8:
        step = (largest / 127 * (1 + 2**-8)).expand(-1, -1, group).flatten(1)
        inside = weight.abs() < step * 126
        assert (error <= step / 2)[inside].all()
        assert (error <= step).all()
    rms = error.square().mean().sqrt() / weight.square().mean().sqrt()
    assert rms < {8: 0.008, 4: 0.1}[bits]


def test_the_search_is_better_than_the_largest_weight_alone(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(256, 64)
    quantisation = Quantisation(4, 32)

    def error() -> float:
        return (dequantised(*quantised(weight, quantisation), torch.float32) - weight).norm().item()

    searched = error()
    monkeypatch.setattr("blockffn_compile.schedules.quantisation.SHARES", (1.0,))
    assert searched < 0.96 * error()


@BOTH
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-35, 1e-33, -3.0, 1e30])
def test_equal_weights(bits, value):
    weight = torch.full((1, 32), value)
    made = dequantised(*quantised(weight, Quantisation(bits, 32)), torch.float32)
    torch.testing.assert_close(made, weight, rtol=2**-8, atol=0)
    assert (made == 0).all() == (value == 0)


@BOTH
def test_subnormal_weights_round_to_something_finite(bits):
    weight = torch.full((1, 32), 1e-40)
    made = dequantised(*quantised(weight, Quantisation(bits, 32)), torch.float32)
    assert ((made - weight).abs() <= weight).all()


@BOTH
def test_one_large_weight_costs_its_own_group_only(bits):
    torch.manual_seed(0)
    weight = torch.randn(4, 96)
    clean = dequantised(*quantised(weight, Quantisation(bits, 32)), torch.float32)
    weight[1, 40] = 1e4
    made = dequantised(*quantised(weight, Quantisation(bits, 32)), torch.float32)
    same = torch.ones_like(weight, dtype=torch.bool)
    same[1, 32:64] = False
    assert torch.equal(made[same], clean[same])
    assert made[1, 40] == pytest.approx(1e4, rel=2**-7)


@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(bits, value):
    weight = torch.randn(2, 64)
    weight[1, 40] = value
    with pytest.raises(ValueError, match="not finite"):
        quantised(weight, Quantisation(bits, 32))


def test_pieces_make_the_whole(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(3, 7, 64)
    whole = quantised(weight, Quantisation(4, 32))
    for piece in (1, 128, 1000):
        monkeypatch.setattr("blockffn_compile.schedules.quantisation.PIECE", piece)
        for part, want in zip(quantised(weight, Quantisation(4, 32)), whole, strict=True):
            assert torch.equal(part, want)


def test_names():
    assert as_quantisation("int8", 32) == Quantisation(8, 32)
    assert as_quantisation("int4", 128) == Quantisation(4, 128)
    with pytest.raises(ValueError, match="scheme is 'int2'; choose int8 or int4"):
        as_quantisation("int2", 32)  # type: ignore[arg-type]
    for group in (0, -32, 16, 33):
        with pytest.raises(ValueError, match=f"group is {group}; it must be a multiple of 32"):
            as_quantisation("int8", group)
