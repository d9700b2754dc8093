"""Triton's interpreter as these tests want it: quick, rounding as GPUs do, the same products on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np


def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter replaces the whole language anew at every call of a helper, most of its time: here it is
    replaced when a kernel is launched and put back when the launch ends."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scopes: list[Any] = []

    class Launch:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()

    class Helper:
        def restore(self) -> None:
            pass

    def once(function: Any) -> Any:
        if scopes:
            return Helper()
        scopes.append(patch(function))
        scopes.append(patch(tl.standard.max.fn))  # the library's own helpers reach the language as `core`
        return Launch()

    interpreter._patch_lang = once


def multiply_in_one_order() -> None:
    """The interpreter multiplies with NumPy's BLAS, whose order of sums depends on the processor and, on some, on the
    rows beside a row: here term by term, each product and each sum rounded once."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        kind = d.data.dtype
        left, right = a.data.astype(kind), b.data.astype(kind)
        total = np.zeros_like(d.data)
        for i in range(left.shape[-1]):
            total += left[..., :, i, None] * right[..., i, None, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def round_bfloat16_to_nearest() -> None:
    """The interpreter cuts float32 to bfloat16 (a softmax of 1 - 2^-24 becomes 0.996); GPUs round to nearest even."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if given != tl.float32 or wanted != tl.bfloat16:
            return convert(data, given, wanted, mode)
        exact = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return exact.to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = rounded
