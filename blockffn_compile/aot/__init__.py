"""Ahead of time with TVM: a model as a bundle that runs without PyTorch.

:func:`build` makes a bundle and needs PyTorch; :func:`load` needs TVM's runtime and NumPy alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockffn_compile.aot.bundle import load
    from blockffn_compile.aot.compiler import build

__all__ = ["build", "load"]

_HOMES = {"build": "blockffn_compile.aot.compiler", "load": "blockffn_compile.aot.bundle"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
