"""Every kernel, with every configuration that ships, compiled for every architecture.

No GPU is needed: a stand-in for the driver names the target, and a launch stops before it runs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from blockffn_compile.schedules.plan import Problem
from blockffn_compile.schedules.triton import ChunkKernel, PrefillKernel
from blockffn_compile.schedules.triton.attention import cached_attention
from blockffn_compile.schedules.triton.config import SHARED, Gpu, load_table
from tests.schedules.triton.device import Driver

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
PUBLISHED = Problem(2048, 128, 128, "silu", False, torch.bfloat16, "cuda")
TOKENS = (1, 16, 32, 64, 100)
WIDE_COPY = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects what is compiled where kernels would be launched."""
    compiled: list[Any] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", only_compile)
    yield compiled
    driver._active = None


def compile_all(problem: Problem, architecture: int, tokens: int) -> None:
    """Launches the kernels of a call on tensors of the right shapes and alignment."""
    driver.set_active(Driver(architecture))
    table = load_table("", divmod(architecture, 10), problem)
    gpu = Gpu(table, 4, cache=1 << 25, follows=architecture >= 90)
    kernel = (ChunkKernel if tokens <= 64 else PrefillKernel)(problem, gpu)
    e, h, s = problem.num_experts, problem.hidden_size, problem.expert_size

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=problem.dtype)

    x, scores, up, down = empty(tokens, h), empty(tokens, e), empty(e, s, h), empty(e, h, s)
    kernel(x, scores, up, down, up if problem.gated else None, "e,s,h", "e,h,s", empty(tokens, h))


def resources(kernel: Any, tmp_path: Path) -> SimpleNamespace:
    """Registers and bytes of stack, of static and of dynamic shared memory of a program."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    output = subprocess.run(
        [CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{w}:(\d+)", output)[1]) for w in ("REG", "STACK"))  # type: ignore[index]
    return SimpleNamespace(registers=registers, stack=stack, shared=kernel.metadata.shared)


def check(kernel: Any, architecture: int, tmp_path: Path) -> None:
    used, ptx = resources(kernel, tmp_path), kernel.asm["ptx"]
    name = (kernel.name, architecture)
    assert used.stack == 0, f"{name} spills"
    assert used.registers <= 255
    assert used.registers * 32 * kernel.metadata.num_warps <= 65536, name
    assert used.shared <= SHARED[architecture] * 1024, name
    if kernel.name != "plan":
        assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx), name
        # Weights come in pieces of 16 bytes.
        assert re.search(WIDE_COPY, ptx), name


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_published_shape(architecture, tokens, launches, tmp_path):
    compile_all(PUBLISHED, architecture, tokens)
    assert [k.name for k in launches] == (["plan"] if tokens > 64 else []) + ["up", "down"]
    for kernel in launches:
        check(kernel, architecture, tmp_path)
        if tokens <= 64:
            # One instruction, and one warp to a lane: the order of summation is that of chunk.py.
            instructions = set(re.findall(r"\w*mma\.[\w.]*", kernel.asm["ptx"]))
            assert instructions == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
            assert "warpsPerCTA = [8, 1, 1], instrShape = [1, 16, 8]" in kernel.asm["ttgir"]


#: Other dtypes, gates, activations and published shapes, each once where there is least room.
OTHERS = [
    (Problem(2048, 128, 128, "silu", True, torch.float16, "cuda"), 89),
    (Problem(2048, 128, 128, "gelu", True, torch.bfloat16, "cuda"), 90),
    (Problem(768, 48, 64, "relu", False, torch.float16, "cuda"), 87),
    (Problem(1792, 56, 128, "silu", False, torch.bfloat16, "cuda"), 120),
    (Problem(4096, 512, 32, "silu", True, torch.bfloat16, "cuda"), 86),
]


@pytest.mark.parametrize(("problem", "architecture"), OTHERS)
@pytest.mark.parametrize("tokens", [1, 32, 100])
def test_other_problems(problem, architecture, tokens, launches, tmp_path):
    compile_all(problem, architecture, tokens)
    for kernel in launches:
        check(kernel, architecture, tmp_path)


#: Queries, key heads, and sizes of a key and a value of the published attentions.
ATTENTIONS = {
    "GQA": (16, 2, 128, 128),
    "MLA": (16, 16, 192, 128),
    "wide": (16, 2, 256, 256),
    "large group": (64, 1, 128, 128),
}


def compile_attention(name: str, architecture: int, tokens: int) -> None:
    driver.set_active(Driver(architecture))
    heads, kv_heads, d, v = ATTENTIONS[name]
    q, keys, values, out = (
        torch.empty(size, dtype=torch.bfloat16)
        for size in (
            (tokens, heads, d),
            (1, kv_heads, 1088, d),
            (1, kv_heads, 1088, v),
            (tokens, heads, v),
        )
    )
    place = torch.zeros(tokens, dtype=torch.int64)
    cached_attention(q, keys, values, place, place, place, out, follows=architecture >= 90)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention(architecture, tokens, name, launches, tmp_path):
    compile_attention(name, architecture, tokens)
    assert [kernel.name for kernel in launches] == ["attend", "join"]
    for kernel in launches:
        used = resources(kernel, tmp_path)
        assert used.stack == 0, f"{name} spills"
        assert used.registers <= 255
        assert used.shared <= SHARED[architecture] * 1024
    attend = launches[0].asm["ptx"]
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", attend)
    # Keys and values come in pieces of 16 bytes.
    asynchronous = re.search(WIDE_COPY, attend)
    if name in ("GQA", "MLA"):
        assert asynchronous
    else:  # which have no room for a pipeline
        assert asynchronous or re.search(r"ld\.global\.v4\.b32", attend)


@pytest.mark.parametrize("architecture", [89, 90, 120])
def test_kernels_wait_before_they_touch_memory(architecture, launches):
    """What is launched before its time; see ``plan.follow``."""
    compile_all(PUBLISHED, architecture, 1)
    compile_attention("GQA", architecture, 1)
    assert len(launches) == 4
    for kernel in launches:
        ptx = kernel.asm["ptx"]
        wait, launch = (
            ptx.find(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents")
        )
        if architecture < 90:
            assert wait == launch == -1
            continue
        touched = re.search(r"\b(ld|st|cp|prefetch)\.[\w.]*(global|async)|\bbra\b", ptx)
        assert touched is not None
        assert 0 < wait < launch < touched.start()


def test_up_fetches_for_down(launches):
    compile_all(PUBLISHED, 80, 1)
    assert ["prefetch.global.L2" in kernel.asm["ptx"] for kernel in launches] == [True, False]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 32])
def test_programs_of_up_are_all_there_at_once(architecture, tokens, launches, tmp_path):
    """Only then do those of ``down`` start before the last of ``up`` ends."""
    compile_all(PUBLISHED, architecture, tokens)
    config = load_table("", divmod(architecture, 10), PUBLISHED)[f"up {8 if tokens == 1 else 32}"]
    used = resources(launches[0], tmp_path)
    assert config.programs * used.shared <= SHARED[architecture] * 1024
    assert config.programs * used.registers * 32 * config.warps <= 65536


def test_another_token_count_is_the_same_kernel(launches):
    for tokens in (17, 31, 32):
        compile_all(PUBLISHED, 90, tokens)
    assert len({kernel.hash for kernel in launches}) == 2
