"""Compiles TIR functions for the host; the libraries are kept on disk."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.support import cc
from tvm.target.codegen import llvm_get_system_cpu, llvm_get_system_triple

from blockffn_compile.schedules.cache import cached
from blockffn_compile.schedules.tir.tile import Registers

log = logging.getLogger(__name__)

POOL = "__TVMBackendParallelLaunch"


def host_target() -> tvm.target.Target:
    """LLVM target of this CPU, with 512-bit vectors where it has them."""
    target: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": llvm_get_system_triple(),
        "mcpu": llvm_get_system_cpu(),
    }
    if "x86_64" in target["mtriple"]:
        # LLVM splits 512-bit vectors on many Intel CPUs unless told otherwise.
        target["mattr"] = ["-prefer-256-bit"]
    return tvm.target.Target(target)


def registers(target: tvm.target.Target) -> Registers:
    """What the target's vector registers hold: the sums of so many outputs and tokens."""
    # 32 registers of 512 bits hold 6 x 64 sums and a panel; other CPUs have a quarter (AVX2: 16 of
    # 256 bits; NEON: 32 of 128 bits), which hold 6 x 16.
    has = tvm.target.codegen.target_has_features
    if "aarch64" in str(target.attrs["mtriple"]):
        return Registers(16, 6, streams=2, dot=bool(has("bf16", target)))
    return Registers(64, 6) if has("avx512f", target) else Registers(16, 6, streams=2)


def context() -> tvm.transform.PassContext:
    """How TVM compiles modules with our kernels."""
    # The buffers are as small as they can be; proving it takes most of the time.
    return tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"])


def compiled(functions: Sequence[Any], target: tvm.target.Target) -> Any:
    """One TVM executable of ``functions``, each a ``PrimFunc`` with a ``global_symbol``."""
    module = tvm.IRModule({str(f.attrs["global_symbol"]): f for f in functions})
    with context():
        return tvm.compile(module, target=target)


def identity(functions: Sequence[Any], target: tvm.target.Target) -> str:
    """All that determines the code of ``functions``, as a text."""
    scripts = (function.script(show_meta=True) for function in functions)
    return "\n".join((tvm.__version__, str(target), *scripts))


def load(function: Any, target: tvm.target.Target) -> Any:
    """The compiled ``function``, from disk when it was built before.

    Args:
        function: a ``PrimFunc`` with a ``global_symbol``.
        target: what to compile for.

    Returns:
        A callable that takes tensors through DLPack.
    """
    name = str(function.attrs["global_symbol"])

    def build(path: Path) -> None:
        compiled([function], target).export_library(str(path))

    path = cached(name, identity([function], target), build)
    module = tvm.runtime.load_module(str(path))
    library = ctypes.CDLL(str(path))
    # Absent from a kernel that has nothing to run in parallel.
    if hasattr(library, POOL) and (launch := _openmp_launch()) is not None:
        # The library calls its thread pool through this pointer, which loading has just set.
        ctypes.c_void_p.in_dll(library, POOL).value = launch
    return module[name]


@functools.cache
def _openmp_launch() -> int | None:
    """Address of the launcher on PyTorch's OpenMP pool; None keeps TVM's own pool."""
    source = Path(__file__).with_name("openmp_launch.cc")

    def build(path: Path) -> None:
        command = [cc.get_cc(), "-O2", "-shared", "-fPIC", "-o", str(path), str(source)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        library = ctypes.CDLL(str(cached("openmp_launch", source.read_text(), build)))
    except (OSError, TypeError, subprocess.CalledProcessError) as error:
        log.warning("kernels keep a thread pool of their own beside PyTorch's: %s", error)
        return None
    return ctypes.cast(library.blockffn_parallel_launch, ctypes.c_void_p).value
