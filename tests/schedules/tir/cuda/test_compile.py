"""Every kernel at the published shapes, compiled for both GPUs: registers, memory, wide reads."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
import tvm

from blockffn_compile.aot.targets import TARGETS
from blockffn_compile.schedules.tir.cuda.attention import cached_attention
from blockffn_compile.schedules.tir.cuda.cache import move_entries, store_entries
from blockffn_compile.schedules.tir.cuda.compile import compiler, cubin
from blockffn_compile.schedules.tir.cuda.ffn import chunk_sparse_ffn
from blockffn_compile.schedules.tir.cuda.linear import panel_linear
from blockffn_compile.schedules.tir.cuda.tile import UNROLL
from tests.schedules.tir.cuda.emulator import only_writing

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
GPUS = {name: target.gpu for name, target in TARGETS.items() if target.gpu is not None}
STATIC_SHARED = 48 * 1024
#: Registers of a multiprocessor, and the threads of two blocks of 256.
MOST_REGISTERS = 65536 // 512

#: Fewest reads of 16 bytes in the code: of the first kernel of a function, and of the second.
WIDE = {
    ("ffn", False): UNROLL,
    ("ffn", True): UNROLL,
    ("linear", False): UNROLL,
    ("attention", False): 1,
}

KERNELS: dict[str, Callable[[int], Any]] = {
    "ffn_2_8B": lambda n: chunk_sparse_ffn(2048, 128, 128, "bfloat16", "silu", False, n),
    "ffn_1_2B": lambda n: chunk_sparse_ffn(1792, 56, 128, "float16", "silu", False, n),
    "ffn_gated": lambda n: chunk_sparse_ffn(1792, 56, 128, "bfloat16", "gelu", True, n),
    "ffn_fp32": lambda n: chunk_sparse_ffn(2048, 128, 128, "float32", "silu", False, n),
    "linear": lambda n: panel_linear(2048, 2560, "bfloat16"),
    "linear_fp16": lambda n: panel_linear(1792, 122753, "float16"),
    "linear_fp32": lambda n: panel_linear(2048, 128, "float32"),
    "attention_gqa": lambda n: cached_attention(16, 2, 128, 128, "bfloat16"),
    "attention_mla": lambda n: cached_attention(16, 16, 192, 128, "float16"),
    "store": lambda n: store_entries(2, 128, "bfloat16"),
    "move": lambda n: move_entries(2, 128, "bfloat16"),
}


class Usage(NamedTuple):
    """Of a kernel: registers, bytes of stack and of static shared memory."""

    registers: int
    stack: int
    shared: int


@pytest.fixture(scope="module", params=GPUS)
def compiled(request, tmp_path_factory):
    """Usage of every kernel, and the instructions of each, by name: all in one compilation."""
    gpu = GPUS[request.param]
    module = tvm.IRModule(
        {
            name: make(gpu.programs).with_attr("global_symbol", name)
            for name, make in KERNELS.items()
        }
    )
    with only_writing():
        host = tvm.compile(module, TARGETS[request.param].tvm).mod
    file = tmp_path_factory.mktemp("code") / "kernels.cubin"
    file.write_bytes(cubin(host.imports[0].inspect_source(), gpu.architecture))

    def ask(option: str) -> str:
        command = [CUOBJDUMP, option, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    usages = {
        name: Usage(*map(int, numbers)) for name, *numbers in re.findall(pattern, ask("-res-usage"))
    }
    _, *parts = re.split(r"Function : (\w+)\n", ask("-sass"))
    return usages, dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_published_shapes(name, compiled):
    usages, instructions = compiled
    kernels = [key for key in usages if re.fullmatch(rf"{name}_kernel(_\d)?", key)]
    assert len(kernels) == (2 if name.startswith(("ffn", "attention")) else 1)
    for kernel in kernels:
        usage = usages[kernel]
        assert usage.stack == 0, "spills"
        assert usage.registers <= MOST_REGISTERS
        assert usage.shared <= STATIC_SHARED
        assert not re.search(r"\b(STL|LDL)\b", instructions[kernel])
        # Weights and keys come in pieces of 16 bytes.
        wide = len(re.findall(r"\bLDG\.E\S*\.128", instructions[kernel]))
        assert wide >= WIDE.get((name.split("_")[0], kernel[-2:] == "_1"), 0)


def test_code_that_is_none():
    with pytest.raises(RuntimeError, match=r"CUDA code: .*no storage class"):
        cubin("nonsense", "sm_90")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr("blockffn_compile.schedules.tir.cuda.compile.cuda_file", lambda _: None)
    compiler.cache_clear()
    with pytest.raises(RuntimeError, match=r"install blockffn-compile\[cuda\]"):
        compiler()
    compiler.cache_clear()
