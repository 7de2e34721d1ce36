"""What a bundle can be built for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import tvm

from blockffn_compile.aot.machine import X86_64_V3, X86_64_V4, cpu_features, instruction_sets
from blockffn_compile.schedules.tir.build import host_target, registers
from blockffn_compile.schedules.tir.tile import Registers


@dataclass(frozen=True)
class Gpu:
    """A kind of NVIDIA GPU.

    Attributes:
        capability: compute capability, such as ``8.7``; the code is for this one alone.
        programs: how many blocks of 256 threads run at once, two on a multiprocessor.
    """

    capability: str
    programs: int

    @property
    def architecture(self) -> str:
        """In NVIDIA's words, such as ``sm_87``."""
        return "sm_" + self.capability.replace(".", "")


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: on the command line.
        llvm: TVM's description of its CPU.
        architecture: as ``platform.machine()`` says there.
        features: that its CPU must have, in the words of Linux's ``/proc/cpuinfo``.
        linker: makes the shared library; None for the host's C++ compiler.
        gpu: that runs the model; None for the CPU.
    """

    name: str
    llvm: dict[str, Any]
    architecture: str
    features: tuple[str, ...]
    linker: str | None = None
    gpu: Gpu | None = None

    @property
    def tvm(self) -> tvm.target.Target:
        if self.gpu is None:
            return tvm.target.Target(self.llvm)
        return tvm.target.Target({"kind": "cuda", "arch": self.gpu.architecture, "host": self.llvm})

    @property
    def registers(self) -> Registers:
        return registers(self.tvm)


_X86: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}

TARGETS = {
    target.name: target
    for target in (
        Target("x86-64-v3", {**_X86, "mcpu": "x86-64-v3"}, "x86_64", X86_64_V3),
        Target(
            "x86-64-v4",
            # LLVM splits 512-bit vectors unless told otherwise.
            {**_X86, "mcpu": "x86-64-v4", "mattr": ["-prefer-256-bit"]},
            "x86_64",
            X86_64_V4,
        ),
        Target(
            "arm64",
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
            "aarch64",
            ("asimd",),
            "aarch64-linux-gnu-g++",
        ),
        Target(
            "arm64-bf16",  # Armv8.6, and many of Armv8.2 on
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+bf16"]},
            "aarch64",
            ("asimd", "bf16"),
            "aarch64-linux-gnu-g++",
        ),
        Target(
            "cuda-sm87",  # Jetson Orin: 16 multiprocessors at most
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
            "aarch64",
            ("asimd",),
            "aarch64-linux-gnu-g++",
            Gpu("8.7", 32),
        ),
        Target("cuda-sm90", _X86, "x86_64", (), gpu=Gpu("9.0", 264)),  # H100: 132
    )
}
NAMES = ("native", *TARGETS)


def get_target(name: str) -> Target:
    """A target by its name; ``native`` is the CPU of this machine, with all its features.

    Raises:
        ValueError: there is no such target.
    """
    if name == "native":
        known, architecture = host_target(), platform.machine()
        llvm: dict[str, Any] = {
            "kind": "llvm",
            "mtriple": f"{architecture}-linux-gnu",
            "mcpu": str(known.attrs["mcpu"]),
        }
        if "mattr" in known.attrs:
            llvm["mattr"] = [str(attr) for attr in known.attrs["mattr"]]
        return Target(name, llvm, architecture, instruction_sets(cpu_features()))
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known are {', '.join(NAMES)}")
    return TARGETS[name]
