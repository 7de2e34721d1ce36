from __future__ import annotations

import dataclasses

import pytest
import torch

from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.training.presets import BUNDLED, dense_twin
from tests.conftest import make_config


def parameters(config: BlockFFNConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BlockFFNForCausalLM(config).parameters())


@pytest.mark.parametrize(
    "config",
    [BUNDLED, dataclasses.replace(BUNDLED, ffn_gated=True), make_config("mla")],
    ids=["bundled", "gated", "mla"],
)
def test_the_dense_twin_is_as_large(config) -> None:
    twin = dense_twin(config)
    assert twin.ffn_type == "vanilla"
    assert parameters(twin) == pytest.approx(parameters(config), rel=0.01)


def test_the_bundled_model_is_small_but_not_trivial() -> None:
    assert 6e6 <= parameters(BUNDLED) <= 12e6
    assert BUNDLED.num_hidden_layers >= 6
    assert BUNDLED.num_experts >= 32
