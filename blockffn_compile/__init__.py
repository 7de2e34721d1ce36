"""A compiler backend that makes BlockFFN models fast: it runs only the experts that are on.

Public names load what they need when they are first used, so importing the package is free.
``torch.compile(model, backend="blockffn")`` works without importing it at all: PyTorch finds the
backend through the package's entry point.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockffn_compile.explain import explain
    from blockffn_compile.generation import generate
    from blockffn_compile.models.checkpoint import load_model
    from blockffn_compile.models.eagle import load_eagle
    from blockffn_compile.quantisation import quantize
    from blockffn_compile.speculative.generator import Generator

__version__ = "0.1.0"
__all__ = ["Generator", "explain", "generate", "load_eagle", "load_model", "quantize"]

_HOMES = {
    "explain": "blockffn_compile.explain",
    "generate": "blockffn_compile.generation",
    "load_model": "blockffn_compile.models.checkpoint",
    "load_eagle": "blockffn_compile.models.eagle",
    "quantize": "blockffn_compile.quantisation",
    "Generator": "blockffn_compile.speculative.generator",
}


class _Package(ModuleType):
    """Keeps ``explain`` the function: importing the module of that name must not rebind it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


#: Packages that are loaded when they are first used.
_PACKAGES = ("aot", "onnx")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
