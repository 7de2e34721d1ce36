"""TVM's CUDA runtime, which TVM loads by itself only where CUDA is installed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

from blockffn_compile.paths import cuda_file

CUDART = "libcudart.so.13"
DRIVER = "libcuda.so.1"


class CudaError(RuntimeError):
    """CUDA cannot be used; the message says what is missing."""


def load_runtime() -> None:
    """Makes TVM's device ``cuda`` known.

    Raises:
        CudaError: CUDA's runtime or NVIDIA's driver is missing.
    """
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    _load(str(cuda_file(f"lib/{CUDART}") or CUDART), os.RTLD_NOW | os.RTLD_GLOBAL)
    # Lazily: without a GPU, nothing of the driver is ever called.
    _load(str(Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"), os.RTLD_LAZY)


def load_runtime_for_building() -> None:
    """The same on a machine without NVIDIA's driver, for TVM writes CUDA modules with its runtime.

    Raises:
        CudaError: CUDA's runtime is missing, or there is no C++ compiler.
    """
    try:
        _load(DRIVER, os.RTLD_LAZY | os.RTLD_GLOBAL)
    except CudaError:
        _load_empty_driver()
    load_runtime()


def _load_empty_driver() -> None:
    """Loads a library of the driver's name: to load the runtime, it needs to be no more."""
    from tvm.support import cc

    compiler = cc.get_cc()
    if compiler is None:
        raise CudaError("no C++ compiler; install g++ or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / DRIVER
        command = [compiler, "-shared", "-nostdlib", f"-Wl,-soname,{DRIVER}", "-o", str(empty)]
        subprocess.run([*command, "-x", "c++", "/dev/null"], check=True, capture_output=True)
        _load(str(empty), os.RTLD_LAZY | os.RTLD_GLOBAL)


def _load(library: str, mode: int) -> None:
    """Loads a library for good.  ``ctypes.CDLL`` cannot load lazily."""
    system = ctypes.CDLL(None)
    system.dlopen.restype = ctypes.c_void_p
    system.dlerror.restype = ctypes.c_char_p
    if not system.dlopen(library.encode(), ctypes.c_int(mode)):
        raise CudaError(system.dlerror().decode())
