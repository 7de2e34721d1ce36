"""Configurations: tuned, safe, and cut down to the problem."""

from __future__ import annotations

import json

import pytest
import torch

from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import config
from blockffn_compile.schedules.triton.config import KERNELS, LANES, Config, bucket, load_table

PROBLEM = Problem(2048, 128, 128, "silu", False, torch.bfloat16, "cuda")


@pytest.mark.parametrize("file", sorted(config.TUNED.glob("*.json")), ids=lambda file: file.stem)
def test_tables_that_ship_are_complete(file):
    for table in json.loads(file.read_text()).values():
        assert set(table) == set(KERNELS)
        for fields in table.values():
            values = Config(**fields)
            sizes = values.tokens, values.rows, values.depth
            assert all(size & (size - 1) == 0 for size in sizes)
            assert values.tokens >= 8
            assert min(values.rows, values.depth) >= 16


def test_chunk_kernels_keep_their_order_of_summation():
    """With other warps, a lane would not be one warp's own; see ``chunk.py``."""
    for file in config.TUNED.glob("*.json"):
        for table in json.loads(file.read_text()).values():
            for name, fields in table.items():
                if not name.startswith("prefill"):
                    assert fields["warps"] == LANES
                    assert fields["tokens"] <= 32


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64)]
)
def test_buckets(tokens, size):
    assert bucket(tokens) == size


def test_an_unknown_gpu_has_the_table_that_fits_everywhere():
    assert load_table("New GPU", (15, 3), PROBLEM) == load_table("", (8, 6), PROBLEM)
    assert load_table("", (9, 0), PROBLEM) != load_table("", (8, 6), PROBLEM)


def test_a_tuned_gpu_has_its_own_table_for_the_shapes_that_were_tuned(tmp_path, monkeypatch):
    for file in config.TUNED.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    entry = {"up 8": {"tokens": 8, "rows": 32, "depth": 64, "stages": 6, "warps": 4, "programs": 2}}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(
        json.dumps({"2048x128x128 bfloat16": entry})
    )
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config._read.cache_clear()
    name = "NVIDIA H100 80GB HBM3"
    assert load_table(name, (9, 0), PROBLEM) == {"up 8": Config(8, 32, 64, 6, 4, 2)}
    other = Problem(2048, 128, 128, "silu", True, torch.bfloat16, "cuda")
    assert load_table(name, (9, 0), other) == load_table("", (9, 0), other)
    config._read.cache_clear()


def test_small_axes_cut_a_configuration_down():
    problem = Problem(96, 4, 24, "relu", False, torch.float16, "cuda")
    table = load_table("", (9, 0), problem)
    assert (table["up 8"].rows, table["up 8"].depth) == (16, 16)  # a lane has 12 of H
    assert (table["prefill up"].rows, table["prefill up"].depth) == (32, 64)
    assert (table["prefill down"].rows, table["prefill down"].depth) == (128, 32)
    assert table["down 8"].depth == 32


def test_stages_are_those_that_shared_memory_holds():
    gated = Problem(2048, 128, 128, "silu", True, torch.bfloat16, "cuda")
    wanted = Config(8, 16, 128, stages=9)
    # A stage has a lane's columns of 16 rows, of 16 of the gate, and of 8 tokens: 128 or, lest
    # there be room for one stage only, 64 columns.
    for problem, name, stage, stages in (
        (PROBLEM, "up 8", 8 * 128 * (16 + 8) * 2, 3),
        (gated, "up 8", 8 * 64 * (32 + 8) * 2, 3),
        (PROBLEM, "down 8", 8 * 128 * (16 + 8) * 2, 5),
    ):
        fitted = config.fit(name, wanted, problem, 99 * 1024)
        assert fitted.stages == stages
        buffers = (stages - 1) // (2 if "down" in name else 1)
        assert buffers * stage <= 99 * 1024
