"""Builds to check without a GPU: each kernel file lists its launches.

A kernel file has `STATIC: tuple[StaticCase, ...]`: one entry per specialisation worth checking (dtype, flags), with
every launch configuration that may be chosen on each architecture, the fixed choice first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

# Compute capability -> bytes of shared memory one block may take (CUDA C++ programming guide, table "Technical
# Specifications per Compute Capability": the opt-in maximum). Consumer and workstation cards have 99 KiB.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED_MEMORY)


PACKAGES = ("tuna_kernels.head.triton", "tuna_kernels.attention.triton")


def kernel_modules() -> dict[str, ModuleType]:
    """Every module that may contain kernels or a `STATIC`, by name; imports triton."""
    return {
        f"{package}.{found.name}": import_module(f"{package}.{found.name}")
        for package in PACKAGES
        for found in iter_modules(import_module(package).__path__)
    }


@dataclass(frozen=True)
class Config:
    """One launch configuration: block sizes (constexpr arguments of the kernel), warps, pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class StaticCase:
    """One specialisation of a kernel.

    Attributes:
        name: kernel and specialisation, e.g. `"head_forward bf16 entropy"`.
        kernel: returns the jitted function (a callable, so that triton is not imported before it is needed).
        signature: every non-constexpr argument in order -> Triton type (`"*bf16"`, `"i64"`, `"fp32"`).
        constants: constexpr arguments other than the block sizes; None stands for an omitted pointer.
        configs: compute capability -> configurations, the fixed choice first.
        aligned: arguments known to be multiples of 16 (pointers: bytes; integers: the value), as Triton's launcher
            finds them for ordinary tensors; without them there are no asynchronous copies.
        products: whether it multiplies 16-bit matrices, so that it must contain tensor-core instructions.
        mma_sync: compute capability -> why the fixed choice uses mma.sync, the older instruction.
    """

    name: str
    kernel: Callable[[], Any]
    signature: Mapping[str, str]
    configs: Mapping[int, tuple[Config, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    products: bool = False
    mma_sync: Mapping[int, str] = field(default_factory=dict)


def compile_case(case: StaticCase, config: Config, capability: int) -> Any:
    """Compile for an architecture, without a GPU; returns Triton's `CompiledKernel` (`.asm`, `.metadata`).

    Not with `TRITON_INTERPRET=1`, which does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel()
    constants = {**case.constants, **config.blocks}
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    if missing := [n for n, kind in signature.items() if kind == "constexpr" and n not in constants]:
        raise ValueError(f"{case.name}: arguments {missing} have neither a type nor a constant")
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
