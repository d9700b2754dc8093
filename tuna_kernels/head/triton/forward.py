"""Log-sum-exp, entropy and target logits of hidden rows under an LM head: tiles only, no logits in memory.

Grid: blocks of rows x splits of the vocabulary, one axis. A program owns BLOCK_M hidden rows and a run of vocabulary
tiles; each tile is one product [BLOCK_M, BLOCK_N] in registers, merged into an online softmax. It writes its rows'
partial (maximum, sum, weighted sum) at [split, row], and v of every slot whose target is in its tiles. `finish_kernel`
merges the splits in order. No locks, no atomics, one writer for every element.

How the vocabulary is split depends on its size and on the number of multiprocessors, never on the rows: one to eight
tiles per split, at least one split per multiprocessor if there are enough tiles. So one row fills the GPU as well as
many do (with few rows reading the weight is the bottleneck, and the unused rows of a tile cost nothing), and a row's
bits do not depend on what else is in the batch, for the same configuration and GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuna_kernels.gpu import launch
from tuna_kernels.gpu.device_math import LN_2, LOG2_E
from tuna_kernels.gpu.static_case import ARCHITECTURES, Config, StaticCase
from tuna_kernels.head.slots import Slots
from tuna_kernels.head.tiled import ForwardResult, Inputs, LinearHead
from tuna_kernels.head.triton.products import HALF, in_kernel, product_type
from tuna_kernels.head.triton.tiles import (
    add_product,
    merge_softmax,
    program_tile,
    rate_of,
    row_slots,
    store_target_logit,
    to_v,
)


@triton.jit
def forward_kernel(
    hidden,  # [T, width]
    weight,  # [V, width]
    bias,  # [V] or None
    low_hidden,  # [T, rank] or None
    low_weight,  # [V, rank] or None
    rows,  # [R] int64: row of hidden
    offsets,  # [R + 1] int64
    targets,  # [S] int64
    maximum,  # [splits, R] float32, of v
    total,  # [splits, R]
    weighted,  # [splits, R] or None
    target_logit,  # [S] float32, v
    row_count,
    vocabulary,
    width,
    rank,
    hidden_stride,
    weight_stride,
    low_hidden_stride,
    low_weight_stride,
    scale,
    cap,
    tiles_per_split,
    splits,
    CAPPED: tl.constexpr,
    TYPE: tl.constexpr,
    LOW_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block, split = program_tile(row_count, splits, BLOCK_M, GROUP_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < row_count
    source = tl.load(rows + row, mask=live, other=0)
    first_slot, slots, most_slots = row_slots(offsets, row, row_count)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    t = tl.zeros([BLOCK_M], tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(vocabulary, BLOCK_N))):
        first = tile * BLOCK_N
        column = tl.arange(0, BLOCK_N)
        entries = tl.minimum(first + column, vocabulary - 1).to(tl.int64)
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        x = add_product(
            x, hidden, source, hidden_stride, weight, entries, weight_stride, width, BLOCK_K, EVEN, TYPE, PRECISION
        )
        if low_hidden is not None:
            x = add_product(
                x, low_hidden, source, low_hidden_stride, low_weight, entries, low_weight_stride, rank, 16, False,
                LOW_TYPE, PRECISION,
            )  # fmt: skip
        count = tl.minimum(vocabulary - first, BLOCK_N).to(tl.int32)
        v = to_v(x, bias, first, column, count, scale, cap, CAPPED)
        store_target_logit(v, first, column, count, target_logit, targets, first_slot, slots, most_slots)
        m, s, t = merge_softmax(v, m, s, t, rate_of(scale, CAPPED), weighted is not None)
    at = split * row_count + row
    tl.store(maximum + at, m, mask=live)
    tl.store(total + at, s, mask=live)
    if weighted is not None:
        tl.store(weighted + at, t, mask=live)


@triton.jit
def finish_kernel(
    maximum,  # [splits, R]
    total,
    weighted,  # or None
    target_logit,  # [S]
    offsets,  # [R + 1] or None: row r has slot r
    lse,  # [R] out, nats
    row_maximum,  # [R] out, of v
    log_sum,  # [R] out, nats: lse minus the largest logit
    entropy,  # [R] out or None
    logprobs,  # [S] out
    row_count,
    splits,
    spread,  # logits per unit of v
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits of each row, in order; grid: blocks of rows."""
    rate = spread * LOG2_E
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < row_count
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    t = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        at = split[None, :].to(tl.int64) * row_count + row[:, None]
        there = live[:, None] & (split < splits)[None, :]
        part_m = tl.load(maximum + at, mask=there, other=float("-inf"))
        part_s = tl.load(total + at, mask=there, other=0.0)
        larger = tl.maximum(m, tl.max(part_m, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        fall = (m - reference) * rate
        below = (part_m - reference[:, None]) * rate
        rescale = tl.exp2(fall)
        factor = tl.exp2(below)
        if weighted is not None:
            part_t = tl.load(weighted + at, mask=there, other=0.0)
            moved = part_t + part_s * tl.maximum(below, -1e4)
            t = (t + s * tl.maximum(fall, -1e4)) * rescale + tl.sum(moved * factor, 1)
        s = s * rescale + tl.sum(part_s * factor, 1)
        m = larger
    log_s = tl.log2(s)
    tl.store(lse + row, m * spread + log_s * LN_2, mask=live)
    tl.store(row_maximum + row, m, mask=live)
    tl.store(log_sum + row, log_s * LN_2, mask=live)
    if entropy is not None:
        tl.store(entropy + row, (log_s - t / s) * LN_2, mask=live)
    first_slot, slots, most_slots = row_slots(offsets, row, row_count)
    for j in range(0, most_slots):
        v = tl.load(target_logit + first_slot + j, mask=j < slots, other=0.0)
        # Subtract the largest before the logarithm: near probability 1 both differences are small and exact.
        tl.store(logprobs + first_slot + j, (v - m) * spread - log_s * LN_2, mask=j < slots)


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "GROUP_M": 8}, warps, stages)


# Chosen from compiled code (`STATIC`, `make gpu-static`): registers are the limit. A [128, 128] float32 tile takes 64
# registers per thread with 8 warps; epilogue and addresses fit beside it without a spill. Depth 64 is 128 bytes of a
# 16-bit row, one shared-memory swizzle; stages fill the shared memory (99 KiB on 86, 89, 120). Candidates for tuning:
# [128, 256], which spills a little in the epilogue and reads shared memory less; a shallower, a narrower one. A
# softcap, an adapter or the entropy need registers too: half the columns. float32 as six bfloat16 products (or TF32)
# holds the parts in registers: smaller tiles, depth 16.
_ONE = _tile(128, 128, 64, 8, 4)
CONFIGS_16: dict[int, tuple[Config, ...]] = {
    launch.INTERPRETER: (Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2}),),
    80: (_tile(128, 128, 64, 8, 3), _tile(128, 128, 32, 8, 4), _tile(128, 64, 64, 8, 3)),
    86: (_tile(128, 128, 32, 8, 3), _tile(128, 64, 64, 8, 3)),
    89: (_tile(128, 128, 32, 8, 3), _tile(128, 64, 64, 8, 3)),
    90: (_ONE, _tile(128, 256, 64, 8, 3), _tile(128, 64, 64, 8, 4)),
    100: (_ONE, _tile(128, 256, 64, 8, 3), _tile(128, 64, 64, 8, 4)),
    120: (_tile(128, 128, 32, 8, 3), _tile(128, 64, 64, 8, 3)),
}
RICH_16: dict[int, tuple[Config, ...]] = {
    launch.INTERPRETER: CONFIGS_16[launch.INTERPRETER],
    80: (_tile(128, 64, 64, 8, 3), _tile(64, 64, 64, 4, 3)),
}
CONFIGS_32: dict[int, tuple[Config, ...]] = {
    launch.INTERPRETER: CONFIGS_16[launch.INTERPRETER],
    80: (_tile(64, 64, 16, 8, 3), _tile(64, 32, 32, 4, 3)),
}


def head_table(inputs: Inputs, head: LinearHead, *, want_entropy: bool) -> launch.Table:
    """The configurations for these dtypes and terms."""
    if product_type(inputs.hidden.dtype, head.weight.dtype) not in HALF:
        return CONFIGS_32
    is_rich = want_entropy or inputs.low_rank is not None or head.softcap is not None
    return RICH_16 if is_rich else CONFIGS_16


FINISH = Config({"BLOCK_M": 32, "SPLITS": 32}, num_warps=4)


class Partials(NamedTuple):
    """Outputs of the forward kernel, the inputs of `finish_kernel`."""

    maximum: Tensor  # [splits, R] of v
    total: Tensor
    weighted: Tensor | None
    target_logit: Tensor  # [S] v; NaN if no tile contains the target

    @classmethod
    def empty(cls, splits: int, rows: int, slots: int, device: torch.device, *, weighted: bool) -> Partials:
        new = torch.empty
        shape = (splits, rows)
        target_logit = torch.full((slots,), torch.nan, device=device)
        return cls(
            new(shape, device=device),
            new(shape, device=device),
            new(shape, device=device) if weighted else None,
            target_logit,
        )


def tiles_per_split(tiles: int, num_sms: int) -> int:
    """Vocabulary tiles per program: at most eight, at least one split per multiprocessor; independent of the rows."""
    return max(1, min(8, tiles // num_sms))


def launch_forward(inputs: Inputs, head: LinearHead, slots: Slots, *, want_entropy: bool) -> Partials:
    """Run `forward_kernel` over all rows of `slots`."""
    hidden, weight, low, low_weight = inputs.hidden, head.weight, inputs.low_rank, head.low_rank_weight
    rows, (vocabulary, width) = slots.rows.numel(), weight.shape
    device = launch.device_of(hidden)
    products = in_kernel(inputs, head)

    def run(config: Config) -> Partials:
        per_split = tiles_per_split(triton.cdiv(vocabulary, config.blocks["BLOCK_N"]), device.num_sms)
        splits = triton.cdiv(vocabulary, per_split * config.blocks["BLOCK_N"])
        out = Partials.empty(splits, rows, slots.targets.numel(), hidden.device, weighted=want_entropy)
        forward_kernel[(triton.cdiv(rows, config.blocks["BLOCK_M"]) * splits,)](
            hidden,
            weight,
            head.bias,
            low,
            low_weight,
            slots.rows,
            slots.offsets,
            slots.targets,
            *out[:2],
            out.weighted,
            out.target_logit,
            rows,
            vocabulary,
            width,
            0 if low is None else low.shape[1],
            hidden.stride(0),
            weight.stride(0),
            0 if low is None else low.stride(0),
            0 if low_weight is None else low_weight.stride(0),
            head.logit_scale,
            head.softcap or 0.0,
            per_split,
            splits,
            CAPPED=head.softcap is not None,
            **products._asdict(),
            EVEN=width % config.blocks["BLOCK_K"] == 0,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return out

    key = (hidden.dtype, weight.dtype, launch.bucket(width), launch.bucket(vocabulary), low is not None)
    table = head_table(inputs, head, want_entropy=want_entropy)
    return run(launch.choose("head_forward", table, device, key, run))


def finish(
    partials: Partials, head: LinearHead, offsets: Tensor | None, rows: int, *, want_entropy: bool
) -> ForwardResult:
    """Merge the splits: log-sum-exp and entropy per row, log-probability per slot."""
    new = partials.target_logit.new_empty
    lse, maximum, log_sum, logprobs = new(rows), new(rows), new(rows), torch.empty_like(partials.target_logit)
    entropy = new(rows) if want_entropy else None
    if rows:
        finish_kernel[(triton.cdiv(rows, FINISH.blocks["BLOCK_M"]),)](
            partials.maximum,
            partials.total,
            partials.weighted,
            partials.target_logit,
            offsets,
            lse,
            maximum,
            log_sum,
            entropy,
            logprobs,
            rows,
            partials.maximum.shape[0],
            head.factor,
            **FINISH.blocks,
            num_warps=FINISH.num_warps,
        )
    return ForwardResult(logprobs, lse, partials.target_logit, maximum, log_sum, entropy, None)


# --- builds for static checks ---------------------------------------------------------------------------------

NAMES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
STRIDES = ("hidden_stride", "weight_stride", "low_hidden_stride", "low_weight_stride")
SIZES = dict.fromkeys(("row_count", "vocabulary", "width", "rank", *STRIDES), "i32")
POINTERS = {"rows": "*i64", "offsets": "*i64", "targets": "*i64"}
FINISHED = (
    *("maximum", "total", "weighted", "target_logit"),
    *("lse", "row_maximum", "log_sum", "entropy", "logprobs"),
)
ALIGNED = ("hidden", "weight", "hidden_stride", "weight_stride", "width")


def head_case(
    name: str, kernel: object, element: str, extra: dict[str, str], constants: dict[str, object], *, plain: bool
) -> StaticCase:
    """A specialisation of a kernel over (hidden, weight): plain, or with bias, adapter and softcap."""
    table = CONFIGS_32 if element == "fp32" else CONFIGS_16 if plain else RICH_16
    optional = {"bias": "*fp32", "low_hidden": "*fp32", "low_weight": f"*{element}"}
    signature = {"hidden": f"*{element}", "weight": f"*{element}"} | ({} if plain else optional) | POINTERS | extra
    signature |= SIZES | {"scale": "fp32", "cap": "fp32"}
    fixed = {
        "CAPPED": not plain,
        "TYPE": NAMES[element],
        "LOW_TYPE": tl.float32,  # h A^T is kept in float32
        "PRECISION": "bf16x6",
        "EVEN": True,
    }
    return StaticCase(
        name=f"{name} {element}{'' if plain else ' bias lora softcap'}",
        kernel=lambda: kernel,
        signature=signature,
        configs={c: launch.candidates(table, c) for c in ARCHITECTURES},
        constants=dict.fromkeys(optional) | fixed | constants if plain else fixed | constants,
        aligned=ALIGNED,
        products=element != "fp32",
    )


def _cases() -> Iterator[StaticCase]:
    for element in NAMES:
        for entropy in (False, True):
            partials = {"maximum": "*fp32", "total": "*fp32", "target_logit": "*fp32"}
            partials |= {"tiles_per_split": "i32", "splits": "i32"} | ({"weighted": "*fp32"} if entropy else {})
            name = "head_forward entropy" if entropy else "head_forward"
            constants: dict[str, object] = {} if entropy else {"weighted": None}
            yield head_case(name, forward_kernel, element, partials, constants, plain=not entropy)
    yield StaticCase(
        name="head_finish entropy",
        kernel=lambda: finish_kernel,
        signature=dict.fromkeys(FINISHED, "*fp32")
        | {"offsets": "*i64", "row_count": "i32", "splits": "i32", "spread": "fp32"},
        configs=dict.fromkeys(ARCHITECTURES, (FINISH,)),
    )


STATIC = tuple(_cases())
