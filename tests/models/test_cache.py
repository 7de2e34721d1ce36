from __future__ import annotations

import pytest
import torch

from blockffn_compile.models.cache import StaticCache


def test_shapes_and_dtype(tiny_config) -> None:
    cache = StaticCache(tiny_config, batch=2, max_len=10, dtype=torch.bfloat16)
    key, value = ((4, 12), (4, 6)) if tiny_config.attention_type == "mla" else ((2, 8), (2, 8))
    assert len(cache.keys) == len(cache.values) == 2
    assert cache.keys[0].shape == (2, key[0], 10, key[1])
    assert cache.values[0].shape == (2, value[0], 10, value[1])
    assert cache.keys[0].dtype == torch.bfloat16


def test_update_writes_the_slots_in_place(tiny_config) -> None:
    cache = StaticCache(tiny_config, batch=1, max_len=10)
    before = cache.keys[1]
    key, value = torch.randn_like(before[:, :, :2]), torch.randn_like(cache.values[1][:, :, :2])
    keys, values = cache.update(1, key, value, torch.tensor([7, 3]))
    assert keys is before
    assert torch.equal(keys[:, :, [7, 3]], key)
    assert torch.equal(values[:, :, [7, 3]], value)
    assert keys.count_nonzero() == key.numel()
    assert cache.keys[0].count_nonzero() == 0


@pytest.mark.parametrize("length", [0, 129])
def test_length_is_checked(tiny_config, length) -> None:
    with pytest.raises(ValueError, match=r"not within 1\.\.128"):
        StaticCache(tiny_config, batch=1, max_len=length)
