"""Panels and their cache."""

from __future__ import annotations

import gc

import pytest
import torch

from blockffn_compile.schedules.packing import PackCache, panel_width, to_panels, unfold

SIZES = {"e": 2, "s": 3, "h": 5}


@pytest.mark.parametrize(("n", "panel"), [(2, 16), (4, 16), (33, 16), (64, 32)])
def test_panels_hold_every_weight_once(n, panel):
    weight = torch.randn(3, n, 7)
    panels = to_panels(weight, panel)
    assert panels.shape == (3, -(-n // panel), 7, panel)
    assert panels.is_contiguous()
    rows = panels.transpose(2, 3).flatten(1, 2)
    assert torch.equal(rows[:, :n], weight)
    assert (rows[:, n:] == 0).all()


@pytest.mark.parametrize(
    ("n", "width"),
    [(1, 16), (24, 32), (32, 32), (48, 48), (64, 64), (96, 48), (100, 16), (2048, 64)],
)
def test_panel_width_pads_least_then_is_widest(n, width):
    padded = [-(-n // w) * w for w in (16, 32, 48, 64)]
    assert -(-n // panel_width(n)) * panel_width(n) == min(padded)
    assert panel_width(n) == width


def test_unfold_reads_merged_axes():
    weight = torch.randn(5, 6)
    view = unfold(weight, "h,es", SIZES, "esh")
    assert view.shape == (2, 3, 5)
    assert view[1, 2, 4] == weight[4, 1 * 3 + 2]


@pytest.mark.parametrize("axes", ["h,es", "e,s,h", "es,x"])
def test_unfold_refuses_other_shapes(axes):
    with pytest.raises((ValueError, KeyError)):
        unfold(torch.randn(6, 5), axes, SIZES, "esh")


def test_cache_packs_once_and_again_after_a_write():
    cache, weight = PackCache(), torch.randn(2, 3, 5)
    first = cache.get(weight, "e,s,h", SIZES, "esh", 16)
    assert cache.get(weight, "e,s,h", SIZES, "esh", 16) is first
    weight.add_(1)
    again = cache.get(weight, "e,s,h", SIZES, "esh", 16)
    assert torch.equal(again, to_panels(weight, 16))
    weight.data = torch.zeros(2, 3, 5)
    assert (cache.get(weight, "e,s,h", SIZES, "esh", 16) == 0).all()


def test_cache_does_not_keep_weights_alive():
    cache, weight = PackCache(), torch.randn(2, 3, 5)
    cache.get(weight, "e,s,h", SIZES, "esh", 16)
    assert len(cache) == 1
    del weight
    gc.collect()
    assert len(cache) == 0


def test_inference_tensors_are_constant():
    with torch.inference_mode():
        weight = torch.randn(2, 3, 5)
    cache = PackCache()
    assert cache.get(weight, "e,s,h", SIZES, "esh", 16) is cache.get(
        weight, "e,s,h", SIZES, "esh", 16
    )


def test_rows_of_several_weights_are_packed_once_and_again_after_any_write():
    cache, weights = PackCache(), [torch.randn(3, 5), torch.randn(20, 5)]
    first = cache.rows(weights, 16)
    assert torch.equal(first, to_panels(torch.cat(weights)[None], 16))
    assert cache.rows(weights, 16) is first
    assert cache.rows(weights, 32).shape[-1] == 32
    for weight in weights:
        weight.add_(1)
        assert torch.equal(cache.rows(weights, 16), to_panels(torch.cat(weights)[None], 16))


def test_rows_tell_views_of_one_address_apart():
    cache, first, square = PackCache(), torch.randn(3, 5), torch.randn(5, 5)
    for second in (square, square.T, square[:2]):
        weights = [first, second]
        assert torch.equal(cache.rows(weights, 16), to_panels(torch.cat(weights)[None], 16))


def test_rows_live_as_long_as_the_first_weight():
    cache, weights = PackCache(), [torch.randn(3, 5), torch.randn(4, 5)]
    cache.rows(weights, 16)
    weights.pop()
    gc.collect()
    assert len(cache) == 1
    weights.clear()
    gc.collect()
    assert len(cache) == 0
