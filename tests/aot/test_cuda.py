"""Bundles for NVIDIA GPUs, on a machine without one."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blockffn_compile.aot import bundle as bundles
from blockffn_compile.aot import compiler, load
from blockffn_compile.aot.bundle import check_gpu
from blockffn_compile.aot.compiler import build
from blockffn_compile.aot.manifest import BundleError, read_manifest
from blockffn_compile.aot.session import Session, greedy
from blockffn_compile.aot.targets import get_target
from blockffn_compile.engines.tvm_engine import TvmEngine
from blockffn_compile.schedules.tir.cuda import compile as cuda
from tests.engines.contract import PROMPT, chain, equal, tree
from tests.schedules.tir.cuda.emulator import install
from tests.schedules.tir.cuda.test_compile import CUOBJDUMP

EM_CUDA = 190


@pytest.fixture(scope="module")
def jetson(model, tmp_path_factory) -> Path:
    return build(model, "cuda-sm87", tmp_path_factory.mktemp("jetson") / "bundle")


@pytest.fixture(scope="module")
def emulated(model, tmp_path_factory):
    """A bundle whose kernels run on the CPU, with the real code around them."""
    folder = tmp_path_factory.mktemp("emulated")
    original = compiler.executable

    def executable(*args: Any) -> Any:
        made = original(*args)
        (host,) = made.mod.imports
        install(host, folder / "kernels.so")
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "executable", executable)
        patch.setattr(bundles, "check_gpu", lambda *_: None)
        patch.setattr(cuda, "cubin", lambda *_: b"")
        path = build(model, "cuda-sm90", folder / "bundle")
        yield load(path)


def device_code(library: Path) -> bytes:
    """From the machine code for NVIDIA GPUs in a file on."""
    data = library.read_bytes()
    (start,) = (
        match.start()
        for match in re.finditer(rb"\x7fELF\x02\x01", data)
        if int.from_bytes(data[match.start() + 18 :][:2], "little") == EM_CUDA
    )
    return data[start:]


def test_the_bundle_says_what_it_needs(jetson):
    manifest = read_manifest(jetson)
    assert (manifest.target, manifest.compute_capability) == ("cuda-sm87", "8.7")
    assert (manifest.architecture, manifest.cpu_features) == ("aarch64", ["asimd"])


def test_the_code_is_for_the_gpu_and_nothing_spills(jetson, tmp_path):
    """Kernels that TVM schedules included."""
    code = device_code(jetson / "model.so")
    assert code[49] == 87  # of the flags in the header
    (tmp_path / "code.cubin").write_bytes(code)
    command = [CUOBJDUMP, "-res-usage", tmp_path / "code.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "chunk_sparse_ffn_kernel_1" in usage
    assert set(re.findall(r"STACK:(\d+)", usage)) == {"0"}


def test_the_same_model_gives_the_same_bytes(model, jetson, tmp_path):
    again = build(model, "cuda-sm87", tmp_path / "again")
    for file in jetson.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_machines_without_a_gpu_are_refused(emulated, tmp_path):
    """In a process of its own, where TVM has not been told that the CPU is a GPU."""
    code = "import sys; from blockffn_compile.aot import load; load(sys.argv[1])"
    command = [sys.executable, "-c", code, str(emulated.path)]
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=blind, capture_output=True, text=True, check=False)
    assert "BundleError" in result.stderr
    assert "built for an NVIDIA GPU of compute capability 9.0; " in result.stderr


def test_other_gpus_are_refused(emulated, monkeypatch):
    class Gpu:
        exist, compute_version = True, "8.9"

    monkeypatch.setattr("tvm.cuda", Gpu)
    with pytest.raises(BundleError, match=r"capability 9\.0; this one has 8\.9: build the bundle"):
        check_gpu(emulated.path, emulated.manifest)


@pytest.fixture
def engine(emulated):
    return TvmEngine(emulated, 2, 80)


def test_error_is_within_eager(engine, model):
    """Against fp64, over two chunks of a prompt."""
    tokens = [(11 * i * i + 5) % 300 for i in range(70)]
    output = engine.prefill(0, tokens)
    text = torch.tensor([tokens])
    exact = copy.deepcopy(model).double().model(text)[0]
    errors = [(y.double() - exact).norm() for y in (output.features, model.model(text)[0])]
    assert errors[0] <= 1.5 * errors[1]
    (token,) = itertools.islice(greedy(Session(engine.session.bundle, max_length=80), tokens), 1)
    assert token == output.logits.float().argmax()


def test_trees_have_the_bits_of_plain_decoding(engine):
    """Of a tree whose path is committed: entries move together on the device."""
    drafts = tree([1, 2, 3, 4, 5], [-1, 0, 0, 2, 3])
    engine.prefill(1, PROMPT)
    logits = engine.verify({1: drafts})[1].logits
    assert not logits.is_cuda
    engine.commit(1, [0, 2, 3, 4])
    after = engine.verify({1: chain([7, 8])})[1].logits
    engine.prefill(1, PROMPT)
    plain = engine.verify({1: chain([1, 3, 4, 5, 7, 8])})[1].logits
    assert equal(list(logits[[0, 2, 3, 4]]), list(plain[:4]))
    assert equal(list(after), list(plain[4:]))


def test_an_unknown_gpu():
    with pytest.raises(ValueError, match=r"known are native, .*, cuda-sm87, cuda-sm90"):
        get_target("cuda-sm20")
