"""CUDA kernels to machine code with NVIDIA's runtime compiler (NVRTC), which needs no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import tvm
import tvm_ffi

from blockffn_compile.paths import cuda_file

LIBRARY = "libnvrtc.so.13"
#: The function by which TVM has its CUDA code compiled.
CALLBACK = "tvm_callback_cuda_compile"


def context() -> tvm.transform.PassContext:
    """How TVM compiles modules with kernels of ``schedules/tir/cuda``."""
    # Left to NVRTC: unrolled by TVM, our loops take it a hundred times as long.
    return tvm.transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False}})


@contextlib.contextmanager
def compiling(architecture: str) -> Iterator[None]:
    """Within it, TVM compiles CUDA code here, for an architecture such as ``sm_87``."""
    before = tvm_ffi.get_global_func(CALLBACK)

    def compile_here(source: str) -> bytes:
        return cubin(source, architecture)

    tvm_ffi.register_global_func(CALLBACK, compile_here, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(CALLBACK, before, override=True)


def cubin(source: str, architecture: str) -> bytes:
    """The machine code of kernels.

    Raises:
        RuntimeError: NVRTC or the headers are missing, or it refuses the source.
    """
    library, include = compiler()
    options = (
        f"--gpu-architecture={architecture}",
        f"--include-path={include}",
        f"--include-path={include / 'cccl'}",
        "--device-as-default-execution-space",
    )
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"model.cu", 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            log = _take(program, "ProgramLog").decode().strip("\n\0")
            raise RuntimeError(f"CUDA code: {log}")
        return _take(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def compiler() -> tuple[ctypes.CDLL, Path]:
    """NVRTC and the folder of CUDA's headers, from NVIDIA's packages.

    Raises:
        RuntimeError: they are missing.
    """
    path, header = cuda_file(f"lib/{LIBRARY}"), cuda_file("include/cuda_fp16.h")
    if path is None or header is None:
        raise RuntimeError(f"no CUDA compiler ({LIBRARY}); install blockffn-compile[cuda]")
    # Which NVRTC looks for by its name alone, and finds when it is loaded.
    for part in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library, header.parent


def _take(program: ctypes.c_void_p, what: str) -> bytes:
    """One of the results of a compilation."""
    library, size = compiler()[0], ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, data))
    return data.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {compiler()[0].nvrtcGetErrorString(status).decode()}")
