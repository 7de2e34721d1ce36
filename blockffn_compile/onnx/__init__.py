"""ONNX: models out, layers of any model rewritten, and run in ONNX Runtime."""

# Functions, not the modules of the same names: those are imported first.
from blockffn_compile.onnx.rewrite import rewrite

__all__ = ["rewrite"]
