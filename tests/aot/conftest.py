"""A small model and its bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blockffn_compile.aot import compiler
from blockffn_compile.aot.compiler import build
from blockffn_compile.aot.export import export
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from tests.conftest import make_config


@pytest.fixture(scope="package", autouse=True)
def _quick(tmp_path_factory):
    """One export serves all builds; what loading remembers goes where it does not stay."""
    known: dict[object, object] = {}

    def once(model: BlockFFNForCausalLM) -> object:
        key = model.config, model.lm_head.weight.dtype
        if key not in known:
            known[key] = export(model)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "export", once)
        patch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def model(make_model: Callable[..., BlockFFNForCausalLM]) -> BlockFFNForCausalLM:
    return make_model(make_config("gqa", hidden_size=64, expert_size=16)).to(torch.bfloat16)


@pytest.fixture(scope="package")
def bundle(model: BlockFFNForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this machine."""
    return build(model, "native", tmp_path_factory.mktemp("bundles") / "native")
