"""Compiles TIR functions for the host and keeps the results on disk.

One file a kernel, named by a hash of everything that determines its code, written under a
temporary name and renamed, so that concurrent processes never see a partial one.  Each file ends
with the SHA-256 of the library before it; a file that does not match is built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm.support import cc
from tvm.target.codegen import llvm_get_system_cpu, llvm_get_system_triple

log = logging.getLogger(__name__)

POOL = "__TVMBackendParallelLaunch"
DIGEST_BYTES = hashlib.sha256().digest_size


def cache_dir() -> Path:
    """``$BLOCKFFN_CACHE_DIR``, else ``blockffn`` under the user's cache folder."""
    if path := os.environ.get("BLOCKFFN_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockffn"


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


def has_avx512(target: tvm.target.Target) -> bool:
    """Whether the target CPU has 512-bit vectors."""
    return bool(tvm.target.codegen.target_has_features("avx512f", target))


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
        module = tvm.IRModule({name: function})
        tvm.compile(module, target=target).export_library(str(path))

    source = "\n".join((tvm.__version__, str(target), function.script(show_meta=True)))
    path = _cached(name, source, build)
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
        library = ctypes.CDLL(str(_cached("openmp_launch", source.read_text(), build)))
    except (OSError, TypeError, subprocess.CalledProcessError) as error:
        log.warning("kernels keep a thread pool of their own beside PyTorch's: %s", error)
        return None
    return ctypes.cast(library.blockffn_parallel_launch, ctypes.c_void_p).value


def _cached(name: str, source: str, build: Callable[[Path], None]) -> Path:
    """The library that ``build(path)`` makes from ``source``, built unless it is on disk."""
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    path = cache_dir() / f"{name}-{key}.so"
    if path.exists() and not _intact(path):
        log.warning("kernel cache entry %s is damaged; building it again", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        log.info("building kernel %s", path.name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "kernel.so"
            build(built)
            with built.open("rb+") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
            built.replace(path)
    return path


def _intact(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]
