"""Stand-ins for a GPU: enough of one to compile for, not to run on."""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


class Driver:
    """What compilation asks of Triton's driver."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # each architecture has a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0
