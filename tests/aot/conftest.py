"""A small model and its bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tvm

from blockffn_compile.aot import compiler
from blockffn_compile.aot.compiler import build
from blockffn_compile.aot.export import export
from blockffn_compile.aot.kernels import StepKernels
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from tests.aot.running import make_runner
from tests.conftest import make_config


@pytest.fixture(scope="package", autouse=True)
def _quick(tmp_path_factory):
    """One export serves all builds; what loading remembers goes where it does not stay."""
    known: dict[object, object] = {}

    def once(model: BlockFFNForCausalLM, kernels: StepKernels) -> object:
        key = model.config, model.lm_head.weight.dtype, type(kernels)
        if key not in known:
            known[key] = export(model, kernels)
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


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture
def _no_code(monkeypatch):
    """Whatever is wrong must be found before the code is loaded."""

    def refuse(*_):
        raise AssertionError("loads code")

    monkeypatch.setattr(tvm.runtime, "load_module", refuse)


def edit(path: Path, **changes: object) -> None:
    """Changes fields of a manifest; None removes one."""
    fields = json.loads((path / "manifest.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (path / "manifest.json").write_text(json.dumps(fields))


@pytest.fixture(scope="package")
def arm_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm64")
    return make_runner(folder, "-DCMAKE_TOOLCHAIN_FILE=arm64.cmake")
