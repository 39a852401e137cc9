"""Triton's interpreter made true to a device, so that CPU tests judge the kernel and not the interpreter.

Triton 3.6 to 3.9 keep a bfloat16 tile as ``uint16`` bit patterns: ``tl.dot`` and arithmetic work on the
patterns as if they were integers, and a cast from float32 truncates where a GPU rounds to nearest even.
:func:`patched_interpreter` mends casts and dots; any other arithmetic on a bfloat16 tile is a mistake in the
kernel (it should be done in float32), so by default it raises. Products of float32 are summed in one order, whichever
side stands left. A comparison, which the interpreter labels with the type of its operands, becomes the boolean it is:
Triton 3.9 refuses masks made from scalar ones otherwise. A tile of one element, as a loop's bound is, becomes a Python
number, which Triton 3.6 leaves to a conversion that NumPy 2 has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import triton.language as tl

_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fabs", "create_rsqrt", "create_clampf")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bit patterns (uint16, any shape) to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values (any shape) to bfloat16 bit patterns (uint16): nearest, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16).reshape(values.shape)


def float32_product(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """[m, k] times [k, n] plus [m, n] by fused multiply-adds along k, one after another.

    As on a device, the transposed product has the same bits; BLAS sums in an order that depends on the layout.
    """
    for column, row in zip(left.T.astype(np.float64), right.astype(np.float64), strict=True):
        total = (column[:, None] * row + total).astype(np.float32)
    return total


@contextmanager
def patched_interpreter(*, forbid_bf16_math: bool = True) -> Iterator[None]:
    """Within the block, kernels interpreted on CPU tensors treat bfloat16 as a device does.

    Args:
        forbid_bf16_math: raise ``TypeError`` (wrapped by Triton in its ``InterpreterError``) when a kernel
            computes on a bfloat16 tile outside ``tl.dot`` instead of converting it to float32 first.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    numpy_dtype: Any = interpreter._get_np_dtype

    original_cast = builder.cast_impl
    original_fp_to_fp = builder.create_fp_to_fp
    original_dot = builder.create_dot

    def widened(tile: Any) -> Any:
        return (
            handle(bfloat16_to_float32(tile.data), tl.float32) if tile.dtype.scalar == tl.bfloat16 else tile
        )

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return original_cast(self, src, dst_type)
        values = widened(src).data
        if target == tl.bfloat16:
            return handle(float32_to_bfloat16(values.astype(np.float32)), target)
        return handle(values.astype(numpy_dtype(target)), target)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar in (tl.bfloat16, tl.float16) and d.dtype.scalar == tl.float32:
            # Half-precision products are exact in float32; converting first also reaches the fast BLAS path.
            left, right = (widened(tile).data.astype(np.float32, copy=False) for tile in (a, b))
            return handle(np.matmul(left, right) + d.data, tl.float32)
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar, d.dtype.scalar):
            raise TypeError(f"tl.dot of {a.dtype} and {b.dtype} into {d.dtype}: accumulate in float32.")
        if a.dtype.scalar == tl.float32 and d.dtype.scalar == tl.float32 and a.data.ndim == 2:
            return handle(float32_product(a.data, b.data, d.data), tl.float32)
        return original_dot(self, a, b, d, *rest)

    original_binary = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = original_binary(self, lhs, rhs, op)
        return handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def get_bf16(self: Any, value: float) -> Any:
        return handle(float32_to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    patches: dict[str, Callable] = {
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
        "binary_op": binary_op,
        "get_bf16": get_bf16,
    }
    original_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with ExitStack() as stack:
        stack.enter_context(replaced(interpreter, _patch_lang_tensor=patch_tensor))
        if forbid_bf16_math:
            for name in _ARITHMETIC:
                own = patches[name] if name in patches else getattr(builder, name)
                patches[name] = _refuse_bfloat16(own, name)
            for ops in (interpreter.ReduceOps, interpreter.ScanOps):
                guarded = _refuse_bfloat16_reduction(ops.apply_impl)
                stack.enter_context(replaced(ops, apply_impl=guarded))
        stack.enter_context(replaced(builder, **patches))
        yield


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within the block, ``owner`` (a class, instance or module) has the given attributes and not its own."""
    own = {name: owner.__dict__[name] for name in attributes if name in owner.__dict__}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


def _refuse_bfloat16(original: Callable, name: str) -> Callable:
    def guarded(self: Any, *operands: Any) -> Any:
        # Pointers to bfloat16 pass: the scalar of their type is the pointer type.
        if any(getattr(operand, "dtype", None) == tl.bfloat16 for operand in operands):
            raise TypeError(f"{name} on a bfloat16 tile: convert it to float32 right after the load.")
        return original(self, *operands)

    return guarded


def _refuse_bfloat16_reduction(original: Callable) -> Callable:
    def guarded(self: Any, tiles: Any) -> Any:
        if any(tile.dtype.scalar == tl.bfloat16 for tile in tiles):
            raise TypeError("reduction over a bfloat16 tile: convert it to float32 right after the load.")
        return original(self, tiles)

    return guarded
