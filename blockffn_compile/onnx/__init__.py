"""ONNX: models out, layers of any model rewritten, and run in ONNX Runtime."""

# Functions, not the modules of the same names: those are imported first.
from blockffn_compile.onnx.export import export
from blockffn_compile.onnx.library import build_library
from blockffn_compile.onnx.rewrite import rewrite
from blockffn_compile.onnx.session import session

__all__ = ["build_library", "export", "rewrite", "session"]
