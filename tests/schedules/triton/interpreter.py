"""What Triton's interpreter lacks: products and roundings of bfloat16, and an order of summation.

NumPy's products sum in an order that depends on the shapes.  A tensor core's do not, and the
kernels promise the same bits for a token in any company; to test that, products here add one term
after the other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

#: Addresses of 16-bit values that were loaded and stored, when a test asks for them by assigning
#: lists.
loads: Any = None
stores: Any = None
#: The same for what the level 2 cache is asked to fetch.
fetches: Any = None


def widen(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Values as fp32; bfloat16 arrives as uint16."""
    if dtype.scalar == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bfloat16: to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    left, right = widen(a.data, a.dtype), widen(b.data, b.dtype)
    total = d.data
    with np.errstate(all="ignore"):
        for k in range(left.shape[-1]):
            total = total + left[..., :, k, None] * right[..., k, None, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


def be_exact() -> None:
    """Patches the interpreter."""
    builder = interpreter.InterpreterBuilder
    cast, load, store = builder.cast_impl, builder.create_masked_load, builder.create_masked_store

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def note(accesses: Any, ptrs: Any, mask: Any) -> None:
        if accesses is not None and ptrs.get_element_ty().primitive_bitwidth == 16:
            accesses += ptrs.data[mask.data.astype(bool)].tolist()

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        note(loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def create_inline_asm(
        self: Any, assembly: str, constraints: str, values: Any, *rest: Any
    ) -> Any:
        assert "prefetch.global.L2 [$1]" in assembly
        pointers, wanted = values
        note(fetches, pointers, wanted)
        nothing = interpreter.TensorHandle(np.zeros(wanted.data.shape, np.int32), tl.int32)
        return SimpleNamespace(get_result=lambda index: nothing)

    builder.create_dot = dot
    builder.create_inline_asm = create_inline_asm
    builder.cast_impl = cast_impl
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, cast_impl)
    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
