"""Compiles TIR functions for the host and keeps the results on disk.

One file a kernel, named by a hash of everything that determines its code, written under a
temporary name and renamed, so that concurrent processes never see a partial one.  Each file ends
with the SHA-256 of the library before it; a file that does not match is built again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm.target.codegen import llvm_get_system_cpu, llvm_get_system_triple

log = logging.getLogger(__name__)

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


def _intact(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def load(function: Any, target: tvm.target.Target) -> Any:
    """The compiled ``function``, from disk when it was built before.

    Args:
        function: a ``PrimFunc`` with a ``global_symbol``.
        target: what to compile for.

    Returns:
        A callable that takes tensors through DLPack.
    """
    name = str(function.attrs["global_symbol"])
    text = "\n".join((tvm.__version__, str(target), function.script(show_meta=True)))
    path = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if path.exists() and not _intact(path):
        log.warning("kernel cache entry %s is damaged; building it again", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        _build(function, target, path)
    return tvm.runtime.load_module(str(path))[name]


def _build(function: Any, target: tvm.target.Target, path: Path) -> None:
    log.info("building kernel %s", path.name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    module = tvm.IRModule({str(function.attrs["global_symbol"]): function})
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "kernel.so"
        tvm.compile(module, target=target).export_library(str(built))
        with built.open("rb+") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        built.replace(path)


def has_avx512(target: tvm.target.Target) -> bool:
    """Whether the target CPU has 512-bit vectors."""
    return bool(tvm.target.codegen.target_has_features("avx512f", target))
