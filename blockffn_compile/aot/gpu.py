"""TVM's CUDA runtime, which TVM loads by itself only where CUDA is installed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

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
    _load(_packaged(CUDART) or CUDART, os.RTLD_NOW | os.RTLD_GLOBAL)
    # Lazily: without a GPU, nothing of the driver is ever called.
    _load(str(Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"), os.RTLD_LAZY)


def load_runtime_for_building() -> None:
    """The same on a machine without NVIDIA's driver, for TVM writes CUDA modules with its runtime.

    Raises:
        CudaError: CUDA's runtime is missing, or there is no C++ compiler.
    """
    with contextlib.suppress(CudaError):
        _load(DRIVER, os.RTLD_LAZY | os.RTLD_GLOBAL)
        load_runtime()
        return
    # An empty library of the driver's name is all that loading the runtime needs.
    from tvm.support import cc

    compiler = cc.get_cc()
    if compiler is None:
        raise CudaError("no C++ compiler; install g++ or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / DRIVER
        command = [compiler, "-shared", "-nostdlib", f"-Wl,-soname,{DRIVER}", "-o", str(empty)]
        subprocess.run([*command, "-x", "c++", "/dev/null"], check=True, capture_output=True)
        _load(str(empty), os.RTLD_LAZY | os.RTLD_GLOBAL)
    load_runtime()


def _packaged(library: str) -> str | None:
    """The path of a library in NVIDIA's packages."""
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / "cu13/lib" / library).is_file():
            return str(path)
    return None


def _load(library: str, mode: int) -> None:
    """Loads a library for good.  ``ctypes.CDLL`` cannot load lazily."""
    system = ctypes.CDLL(None)
    system.dlopen.restype = ctypes.c_void_p
    system.dlerror.restype = ctypes.c_char_p
    if not system.dlopen(library.encode(), ctypes.c_int(mode)):
        raise CudaError(system.dlerror().decode())
