"""What the static check reads off the compiler, and that its budgets bite; and that every kernel keeps them."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from benchmarks import gpu_static
from benchmarks.roofline import CARDS, WORKS, roofline_rows
from tuna_kernels.gpu.availability import is_interpreted
from tuna_kernels.gpu.static_case import ARCHITECTURES, SHARED_MEMORY, Config

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")
# What `make test` compiles, a sample that is quick; `make gpu-static` compiles everything.
SAMPLE = [
    ("head_forward bf16", 80),
    ("head_forward bf16", 90),
    ("head_forward bf16", 100),
    ("head_gradient bf16", 86),
    ("head_gradient bf16", 90),
    ("head_gradient entropy filter bf16 bias lora softcap", 89),
    ("attention_forward bf16 d64", 80),
    ("attention_dq bf16 d64", 80),
    ("attention_dkv bf16 d64", 80),
    ("attention_forward bf16 d128", 90),
    ("attention_forward bf16 d128 rows", 80),
    ("attention_dkv bf16 d96", 120),
    ("attention_forward fp32 d64", 90),
    ("head_forward fp32", 86),
    ("logits_forward bf16", 120),
]


def case(name: str) -> gpu_static.StaticCase:
    return next(one for one in gpu_static.all_cases() if one.name == name)


def test_every_kernel_lists_itself_for_every_architecture_within_its_shared_memory_once() -> None:
    cases = gpu_static.all_cases()
    names = [one.name for one in cases]
    assert len(names) == len(set(names))
    assert {name.split("_")[0] for name in names} >= {"head", "attention"}
    for one in cases:
        assert set(one.configs) == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "capability"), SAMPLE)
def test_a_sample_keeps_its_budgets(name: str, capability: int) -> None:
    kernel = case(name)
    built = gpu_static.examine(kernel, kernel.configs[capability][0], capability, default=True)
    assert built.faults == (), built
    assert 0 < built.occupancy <= 1 and (not kernel.products or built.tensor_core > 0 < built.async_copies)
    assert 16 < built.registers <= 255 and 0 < built.shared_bytes <= SHARED_MEMORY[capability]


@pytest.mark.slow
def test_every_kernel_keeps_its_budgets() -> None:
    chosen = list(gpu_static.jobs(gpu_static.all_cases(), ARCHITECTURES, defaults_only=False))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        assert [built for built in pool.map(gpu_static.build, chosen) if built.faults] == []


def test_a_configuration_that_breaks_budgets_is_named() -> None:
    kernel = case("head_forward bf16")
    greedy = Config({"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}, num_warps=4, num_stages=4)
    built = gpu_static.examine(kernel, greedy, 80, default=True)
    assert any("bytes of shared memory" in fault for fault in built.faults)
    assert any(fault.startswith("spills") for fault in built.faults)
    small = Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 8}, num_warps=1, num_stages=1)
    unaligned = replace(kernel, aligned=())
    assert "no asynchronous copies" in gpu_static.examine(unaligned, small, 80, default=True).faults


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "share"),
    [
        (80, 32, 0, 4, 1.0),  # 64 registers a thread would halve it
        (80, 128, 0, 4, 0.25),  # 65536 / (128 * 128) = 4 blocks of 128 threads of 2048
        (80, 255, 0, 8, 0.125),
        (90, 64, 100 << 10, 8, 0.25),  # two blocks of 100 KiB in 228
        (120, 32, 0, 4, 1.0),  # 12 blocks of 128 threads fill 1536
    ],
)
def test_occupancy_is_what_registers_shared_memory_and_threads_allow(
    capability: int, registers: int, shared: int, warps: int, share: float
) -> None:
    assert gpu_static.occupancy(capability, registers, shared, warps) == pytest.approx(share)


def test_the_roofline_is_the_larger_of_arithmetic_and_traffic() -> None:
    for work in WORKS:
        for card in CARDS:
            assert work.seconds(card) == max(work.flops / card.flops, work.bytes / card.bandwidth)
    header, *rows = roofline_rows()
    assert len(rows) == len(WORKS) and all(len(row) == len(header) for row in rows)
    llama = next(work for work in WORKS if work.name == "head forward, N 8192, D 4096, V 32000")
    assert llama.flops == 2 * 8192 * 4096 * 32000
