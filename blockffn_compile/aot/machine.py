"""What this machine's CPU can do, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

#: The levels of the x86-64 psABI, above what every 64-bit CPU has.
X86_64_V3 = (
    "abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "movbe", "popcnt", "sse4_1",
    "sse4_2", "ssse3",
)  # fmt: skip
X86_64_V4 = (*X86_64_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

#: Beginnings of the names of x86 instruction sets that a compiler uses by itself.
_INSTRUCTION_SETS = (
    "abm", "adx", "amx", "avx", "bmi", "cx16", "f16c", "fma", "gfni", "movbe", "popcnt", "sse",
    "ssse3", "vaes", "vpclmul",
)  # fmt: skip


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Names of the features that every core has; none where the system does not tell."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return frozenset()
    cores = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*cores) if cores else frozenset()


def instruction_sets(features: frozenset[str]) -> tuple[str, ...]:
    """Those features that compiled code may depend on, sorted."""
    arm = "asimd" in features
    return tuple(sorted(f for f in features if arm or f.startswith(_INSTRUCTION_SETS)))
