"""Builds of tree attention to compile without a GPU: kernels, specialisations, launch configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tuna_kernels.attention.triton.config import candidates
from tuna_kernels.gpu.static_case import ARCHITECTURES, StaticCase

_SIDES = ("batch", "head", "row")
_LISTS = {"end_ptr": "*i32", "rows_ptr": "*i32", "order_ptr": "*i32", "depth_ptr": "*i32"} | {
    "list_ptr": "*i32",
    "full_ptr": "*i32",
    "live_ptr": "*i32",
}

_NO_TCGEN05 = (
    "tcgen05 takes 64 keys at least, and two accumulators of 64 x 256 come back to registers between walks: tiles of "
    "16 or 32 queries spill 592 and 608 bytes with 8 warps, 120 and 160 without a pipeline, 1456 with 4 warps; with 16 "
    "warps Triton takes mma.sync and spills 208"
)


def _case(kernel: str, dtype: str, size: int, **flags: bool) -> StaticCase:
    """One specialisation, for the strides of a model's [B, T, H, d] views."""
    data = f"*{dtype}"
    tensors = {"forward": "q k v out", "dq": "q k v out grad_out dq", "dkv": "q k v grad_out dk dv"}[kernel].split()
    signature: dict[str, str] = {f"{name}_ptr": data for name in tensors}
    signature |= {"lse_ptr": "*fp32"}
    if kernel == "dq":
        signature |= {"grad_lse_ptr": "*fp32"}
    if kernel != "forward":
        signature |= {"delta_ptr": "*fp32"}
    signature |= _LISTS | dict.fromkeys(("Tq", "T", "group"), "i32")
    if kernel == "dkv":
        signature |= {"kv_heads": "i32"}
    signature |= {"list_width": "i32", "window": "i32"}
    strides = [f"{name}_stride_{side}" for name in tensors for side in _SIDES]
    if kernel == "dkv":
        strides += ["dk_stride_split", "dv_stride_split"]
    signature |= dict.fromkeys(strides, "i32")
    signature |= {"product_scale" if kernel != "forward" else "scale": "fp32", "cap": "fp32"}
    if kernel != "forward":
        signature |= {"scale": "fp32"}
    padded = max(16, 1 << (size - 1).bit_length())
    constants: dict[str, Any] = {"D": size, "DV": size, "PAD_D": padded, "PAD_V": padded}
    constants |= {name: flags.get(name, False) for name in ("ROWS", "WINDOW", "SOFTCAP")}
    precision = constants["PRECISION"] = "tf32" if flags.get("TF32") else "ieee"
    if kernel == "dq":
        constants["GRAD_LSE"] = flags.get("GRAD_LSE", False)
    products, capped = precision if dtype == "fp32" else "half", flags.get("SOFTCAP", False)
    named = " ".join([f"attention_{kernel}", dtype, f"d{size}", *(f.lower() for f in flags)])
    return StaticCase(
        name=named,
        kernel=_kernel(kernel),
        signature=signature,
        configs={arch: candidates(kernel, arch, padded, products, softcap=capped) for arch in ARCHITECTURES},
        constants=constants,
        aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
        products=dtype != "fp32",
        mma_sync={100: _NO_TCGEN05} if (kernel, padded) == ("dkv", 256) else {},
    )


def _kernel(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from tuna_kernels.attention.triton import backward, forward

        kernels = {"dq": backward.dq_kernel, "dkv": backward.dkv_kernel}
        return forward.forward_kernel if name == "forward" else kernels[name]

    return load


STATIC: tuple[StaticCase, ...] = tuple(
    _case(kernel, dtype, size, **flags)
    for kernel in ("forward", "dq", "dkv")
    for dtype, size, flags in (
        ("bf16", 64, {}),
        ("bf16", 80, {}),
        ("bf16", 96, {}),
        ("bf16", 128, {}),
        ("bf16", 256, {}),
        ("fp16", 128, {}),
        ("fp32", 64, {}),
        ("fp32", 64, {"TF32": True}),
        ("fp32", 128, {}),
        ("fp32", 128, {"TF32": True}),
        ("bf16", 128, {"SOFTCAP": True}),
        ("bf16", 128, {"WINDOW": True}),
        ("bf16", 128, {"ROWS": True}),
    )
)
