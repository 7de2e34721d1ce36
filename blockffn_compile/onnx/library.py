"""The library that gives ONNX Runtime a kernel for ``com.blockffn::ChunkSparseFFN``.

One library serves every model: its kernels take shapes and activation from the node.  It needs
neither TVM nor PyTorch to run, only an ONNX Runtime at least as new as the headers.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn_compile.onnx.headers import find_headers
from blockffn_compile.schedules.cache import cached

if TYPE_CHECKING:
    from blockffn_compile.schedules.tir.tile import Registers

NATIVE = Path(__file__).with_name("native")


class LibraryError(RuntimeError):
    """The library cannot be built."""


def build_library(target: str = "native", headers: str | Path | None = None) -> Path:
    """Builds the custom-op library, unless the cache has it.

    Register it with ``SessionOptions.register_custom_ops_library``.

    Args:
        target: what to build for, by its name in :mod:`blockffn_compile.aot.targets`; ``native`` is
            this machine.
        headers: folder of ONNX Runtime's C++ headers, version 1.21 or newer; see
            :func:`~blockffn_compile.onnx.headers.find_headers` for the default.

    Returns:
        The shared library.

    Raises:
        ValueError: there is no such target.
        HeadersError: there are no headers.
        LibraryError: there is no compiler for the target, or it fails.
    """
    import tvm
    import tvm_ffi

    from blockffn_compile.aot.targets import get_target
    from blockffn_compile.schedules.tir import build
    from blockffn_compile.schedules.tir.tile import ACTIVATIONS

    machine = get_target(target)
    functions = _kernels(machine.registers)
    includes = find_headers(headers)
    compiler = [machine.linker] if machine.linker else shlex.split(os.environ.get("CXX") or "g++")
    options = [
        *("-std=c++17", "-O2", "-shared", "-fPIC"),
        f"-DBLOCKFFN_PANEL={machine.registers.widest}",
        "-DBLOCKFFN_ACTIVATIONS=" + ", ".join(f'"{name}"' for name in ACTIVATIONS),
    ]

    def make(path: Path) -> None:
        if shutil.which(compiler[0]) is None:
            way_out = f"install it to build for {target}" if machine.linker else "set CXX to one"
            raise LibraryError(f"there is no C++ compiler {compiler[0]}; {way_out}")
        kernels = path.with_suffix(".o")
        build.compiled(functions, machine.tvm).mod.write_to_file(str(kernels), "o")
        headers = (includes, tvm.libinfo.find_include_path(), tvm_ffi.libinfo.find_include_path())
        command = [
            *(*compiler, *options),
            *(f"-I{folder}" for folder in headers),
            *map(str, (*sorted(NATIVE.glob("*.cc")), kernels)),
            # Symbols that are missing show now, and those of the library show nowhere else.
            *(f"-Wl,--version-script={NATIVE / 'exports.map'}", "-Wl,-z,defs"),
            *("-o", str(path)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LibraryError(f"{compiler[0]} failed:\n{result.stderr.strip()}")

    files = (*sorted(NATIVE.iterdir()), *sorted(includes.glob("*.h")))
    contents = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    source = (*compiler, *options, *contents, build.identity(functions, machine.tvm))
    return cached("onnxruntime", "\n".join(source), make)


def _kernels(registers: Registers) -> list[Any]:
    """The FFN for every dtype, plain and gated, under the names that ``native/`` expects."""
    from blockffn_compile.schedules.tir import DTYPES
    from blockffn_compile.schedules.tir.cpu import chunk_sparse_ffn
    from blockffn_compile.schedules.tir.tile import Tiling

    tiling = Tiling(registers.widest, registers.widest, registers)
    return [
        chunk_sparse_ffn(None, None, None, dtype, None, gated, tiling).with_attr(
            "global_symbol", f"chunk_sparse_ffn_{dtype}" + ("_gated" if gated else "")
        )
        for dtype in DTYPES.values()
        for gated in (False, True)
    ]
