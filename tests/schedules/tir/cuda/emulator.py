"""CUDA kernels on a CPU: what TVM generates, compiled as C++ (see ``emulator.h``).

TVM's device ``cuda`` is the CPU's memory then.  The host part of a function, which allocates and
launches, is the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi
from torch import Tensor
from tvm.support import cc

from blockffn_compile.aot.gpu import load_runtime_for_building
from blockffn_compile.schedules.tir.cuda import compile as cuda

HEADER = Path(__file__).with_name("emulator.h")
TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_90", "host": {"kind": "llvm"}})
KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\((.*)\);$', re.M
)

_numbers = itertools.count()


@contextlib.contextmanager
def only_writing() -> Iterator[None]:
    """Within it, TVM writes CUDA C++, which nobody compiles."""
    load_runtime_for_building()
    with (
        pytest.MonkeyPatch.context() as patch,
        cuda.compiling("no architecture"),
        cuda.context(),
    ):
        patch.setattr(cuda, "cubin", lambda *_: b"")
        yield


def emulate(function: Any, folder: Path) -> Callable[..., None]:
    """A function of ``schedules/tir/cuda`` that takes tensors of PyTorch, on the CPU."""
    name = f"emulated_{next(_numbers)}"  # its kernels are found by their names
    function = function.with_attr("global_symbol", name)
    with only_writing():
        host = tvm.compile(tvm.IRModule({name: function}), TARGET).mod
    install(host, folder / f"{name}.so")

    def call(*tensors: Tensor) -> None:
        ours = [tvm.runtime.from_dlpack(tensor) for tensor in tensors]
        device = [tensor.copyto(tvm.cuda()) for tensor in ours]
        host[name](*device)
        for tensor, result in zip(ours, device, strict=True):
            result.copyto(tensor)

    return call


def install(host: Any, path: Path) -> None:
    """Compiles the kernels that a host module imports, and has them found by their names."""
    memory = tvm_ffi.get_global_func("device_api.cpu")
    tvm_ffi.register_global_func("device_api.cuda", lambda: memory(), override=True)
    (device,) = host.imports
    source = device.inspect_source()
    host.clear_imports()
    declared = KERNEL.findall(source)
    launchers = []
    for name, parameters in declared:
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        launchers.append(
            f'extern "C" void launch_{name}({parameters}, int blocks, int threads) {{\n'
            f"  emulator::launch(blocks, threads, [=] {{ {name}({names}); }});\n}}\n"
        )
    kernels = source[source.index('extern "C" __global__') :]
    kernels = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", kernels)  # as C++ has it
    code = path.with_suffix(".cc")
    code.write_text(f'#include "{HEADER}"\n{kernels}\n{"".join(launchers)}')
    command = [cc.get_cc(), "-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    command += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-w", "-o", str(path), str(code)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    for name, parameters in declared:
        launch = getattr(library, f"launch_{name}")
        launch.restype = None
        launch.argtypes = [_type(p) for p in (*parameters.split(","), "int blocks", "int threads")]
        tvm_ffi.register_global_func(name, launch, override=True)


def _type(parameter: str) -> Any:
    if "*" in parameter:
        return ctypes.c_void_p
    return {"int": ctypes.c_int, "int64_t": ctypes.c_int64}[parameter.split()[0]]
