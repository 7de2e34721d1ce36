"""The on-disk kernel cache."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from blockffn_compile.schedules import cache as disk
from blockffn_compile.schedules.tir import build
from blockffn_compile.schedules.tir.cpu import chunk_sparse_ffn
from blockffn_compile.schedules.tir.tile import Registers, Tiling


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path))
    return tmp_path


def entries(cache):
    """Kernels in the cache; the launcher on PyTorch's thread pool lies beside them."""
    return cache.glob("chunk_sparse_ffn-*.so")


def load():
    function = chunk_sparse_ffn(
        16, 2, 16, "float32", "relu", False, Tiling(16, 16, Registers(16, 1))
    )
    return build.load(function, build.host_target())


def check(kernel):
    x, scores = torch.ones(1, 16), torch.tensor([[0.0, 2.0]])
    up, down, y = torch.ones(2, 1, 16, 16), torch.ones(2, 1, 16, 16), torch.empty(1, 16)
    kernel(x, scores, up, down, y)
    assert (y == 2 * 16 * 16).all()


def test_built_once(cache, caplog):
    caplog.set_level(logging.INFO)
    check(load())
    (entry,) = entries(cache)
    written = entry.stat().st_mtime_ns
    check(load())
    assert [f.stat().st_mtime_ns for f in entries(cache)] == [written]
    assert caplog.text.count("making chunk_sparse_ffn") == 1


@pytest.mark.parametrize("damage", ["truncated", "bit flip", "empty", "garbage"])
def test_damaged_entry_is_built_again(cache, caplog, damage):
    load()
    (entry,) = entries(cache)
    data = bytearray(entry.read_bytes())
    if damage == "bit flip":
        data[len(data) // 2] ^= 1
    entry.unlink()  # a new file: this process has the old one mapped
    entry.write_bytes(
        {"truncated": data[: len(data) // 2], "bit flip": data, "empty": b"", "garbage": b"x" * 99}[
            damage
        ]
    )
    check(load())
    assert "damaged" in caplog.text
    assert disk._intact(entry)


def test_concurrent_processes(cache):
    code = "from tests.schedules.tir.test_build import load, check; check(load())"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    (entry,) = entries(cache)
    assert disk._intact(entry)
