"""Launches of tree attention in Triton. The kernels are in `forward` and `backward`, their block lists in
`attention.bounds`.

Kept for the backward: q, k, v, out and lse. Workspace: delta [B, Hq, Tq] float32, the block lists and, if there are
too few key blocks to fill the GPU, `splits` float32 copies of dK and dV (see `_splits`). All strides but the last,
which is 1, are passed to the kernels. Results are reproducible bit for bit on the same GPU and configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import check_values
from tuna_kernels.attention.bounds import BlockMap, block_map
from tuna_kernels.attention.call import AttentionCall, AttentionGradients, AttentionResult
from tuna_kernels.attention.triton.config import candidates
from tuna_kernels.gpu import availability, launch
from tuna_kernels.gpu.static_case import Config

Result = TypeVar("Result")
MAX_SIZE = 256
"""Largest head size: above it the accumulators of one program do not fit its registers."""

MAX_SPLITS = 16
_MAKING_A_LIST = 24
"""Temporary bytes per pair of blocks while the lists are built: flags, sort keys and indices, beyond the int32 kept."""


def why_not(q: Tensor, v: Tensor) -> str:
    """ "" if these inputs are supported, else the reason why not."""
    if reason := availability.why_not(q.device, q.dtype):
        return reason
    for name, x in (("q and k", q), ("v", v)):
        if x.shape[3] > MAX_SIZE:
            return f"the head size of {name} is {x.shape[3]}, above {MAX_SIZE}"
    if q.shape[3] == 0 or v.shape[3] == 0:
        return "the head size is 0"
    return ""


def forward(call: AttentionCall) -> AttentionResult:
    """See `tuna_kernels.attention.ops`."""
    from tuna_kernels.attention.triton.forward import forward_kernel

    blocks, result = _map(call), call.empty_result()
    if result.out.numel() == 0:
        return result
    q, k, v, window = call.q, call.k, call.v, call.window

    def run(config: Config) -> None:
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        _launch(
            forward_kernel,
            (-(-q.shape[2] // block_m), q.shape[1], q.shape[0]),
            config,
            q.device,
            (q, k, v, *result, *_arrays(blocks, block_m, block_n)),
            (q.shape[2], k.shape[2], q.shape[1] // k.shape[1], -(-k.shape[2] // block_n), window or 0),
            (q, k, v, result.out),
            _score_factors(call),
            _flags(call, blocks),
        )

    _run_chosen("forward", call, run)
    return result


def backward(
    call: AttentionCall, result: AttentionResult, grad_out: Tensor, grad_lse: Tensor | None
) -> AttentionGradients:
    """See `tuna_kernels.attention.ops`."""
    from tuna_kernels.attention.triton.backward import dkv_kernel, dq_kernel

    dq, dk, dv = gradients = call.empty_gradients()
    if call.q.numel() == 0:
        return gradients._replace(k=dk.zero_(), v=dv.zero_())
    blocks, (out, lse) = _map(call), result
    q, k, v, window = call.q, call.k, call.v, call.window
    batch, heads, queries, _ = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    delta = torch.empty_like(lse)
    factors = (*_score_factors(call), call.scale)
    flags = _flags(call, blocks)
    of_queries = (q, k, v, out, grad_out, dq, lse, delta if grad_lse is None else grad_lse, delta)

    def run_dq(config: Config) -> None:
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        _launch(
            dq_kernel,
            (-(-queries // block_m), heads, batch),
            config,
            q.device,
            (*of_queries, *_arrays(blocks, block_m, block_n)),
            (queries, total, heads // kv_heads, -(-total // block_n), window or 0),
            (q, k, v, out, grad_out, dq),
            factors,
            {**flags, "GRAD_LSE": grad_lse is not None},
        )

    def run_dkv(config: Config) -> list[Tensor]:
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        query_blocks, key_blocks = -(-queries // block_m), -(-total // block_n)
        splits = _splits(key_blocks * kv_heads * batch, query_blocks, launch.device_of(q).num_sms)
        parts = [x.unsqueeze(0) for x in (dk, dv)]
        if splits > 1:
            parts = [x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (dk, dv)]
        _launch(
            dkv_kernel,
            (key_blocks, batch * kv_heads, splits),
            config,
            q.device,
            (q, k, v, grad_out, *parts, lse, delta, *_arrays(blocks, block_m, block_n, of_keys=True)),
            (queries, total, heads // kv_heads, kv_heads, query_blocks, window or 0),
            (q, k, v, grad_out, *parts),
            factors,
            flags,
        )
        return parts

    _run_chosen("dq", call, run_dq)
    parts = _run_chosen("dkv", call, run_dkv)
    if len(parts[0]) > 1:
        dk.copy_(parts[0].sum(0))
        dv.copy_(parts[1].sum(0))
    return gradients


def workspace_bytes(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    rows: int,
    size: int,
    dtype: torch.dtype,
    device: launch.Device,
) -> int:
    """Peak bytes of forward or backward beyond inputs, out, lse and gradients, on a GPU of this kind.

    Delta and a gradient of lse, the summands of dK and dV with one of their sums, and the tree's int32 arrays and
    block lists, which the first layer builds and all others share. An upper bound for any configuration, tuned or not.
    """
    most, sums = {"forward": 0, "dq": 0, "dkv": 0}, 0
    for kernel in most:
        for config in candidates(kernel, device.capability, _padded(size), _products(dtype)):
            query_blocks, key_blocks = -(-queries // config.blocks["BLOCK_M"]), -(-rows // config.blocks["BLOCK_N"])
            most[kernel] = max(most[kernel], query_blocks * key_blocks)
            splits = _splits(max(1, key_blocks * kv_heads * batch), query_blocks, device.num_sms)
            if kernel == "dkv" and splits > 1:
                sums = max(sums, (2 * splits + 1) * 4 * batch * kv_heads * rows * size)
    lists = 4 * sum(most.values()) + _MAKING_A_LIST * max(most.values())
    return lists + 16 * rows + 24 * queries + 8 * batch * heads * queries + sums


def _map(call: AttentionCall) -> BlockMap:
    check_values(call.subtree_end, call.query_rows)  # skipped on a GPU, where wrong values give wrong rows or NaN
    return block_map(call.subtree_end, call.query_rows, call.position_ids, call.window)


def _arrays(blocks: BlockMap, block_m: int, block_n: int, *, of_keys: bool = False) -> tuple[Tensor, ...]:
    lists = blocks.lists(block_m, block_n, of_keys=of_keys)
    unused = blocks.end
    optional = (unused if x is None else x for x in (blocks.rows, blocks.order, blocks.depth))
    return (blocks.end, *optional, lists.index, lists.full, lists.live)


def _score_factors(call: AttentionCall) -> tuple[float, float]:
    """(factor on products, cap) such that `base2_scores` gives log2(e) times the scores."""
    if call.softcap is None:
        return call.scale * launch.LOG2_E, 1.0
    return call.scale / call.softcap, call.softcap * launch.LOG2_E


def _flags(call: AttentionCall, blocks: BlockMap) -> dict[str, Any]:
    size, values = call.q.shape[3], call.v.shape[3]
    return {
        "D": size,
        "DV": values,
        "PAD_D": _padded(size),
        "PAD_V": _padded(values),
        "ROWS": blocks.rows is not None,
        "WINDOW": blocks.window is not None,
        "SOFTCAP": call.softcap is not None,
        "PRECISION": launch.float32_precision("ieee"),
    }


def _products(dtype: torch.dtype) -> str:
    """Precision of the products, as an argument of `candidates`."""
    return launch.float32_precision("ieee") if dtype == torch.float32 else "half"


def _padded(size: int) -> int:
    """Tiles are powers of two, and a matrix product takes at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def _run_chosen(kernel: str, call: AttentionCall, run: Callable[[Config], Result]) -> Result:
    """`run` with the fixed or tuned configuration for these dtypes and sizes."""
    device, dtype, capped = launch.device_of(call.q), call.q.dtype, call.softcap is not None
    size = max(_padded(call.q.shape[3]), _padded(call.v.shape[3]))
    configs = candidates(kernel, device.capability, size, _products(dtype), softcap=capped)
    table = {launch.INTERPRETER: configs}
    key = (dtype, size, _products(dtype), call.window is not None, capped)
    return run(launch.choose(f"attention_{kernel}", table, device, key, run))


def _splits(programs: int, query_blocks: int, num_sms: int) -> int:
    """Number of programs among which a key block is split, if the GPU needs more: up to 8 programs per multiprocessor.

    A prompt's key block may be seen by every query, and the kernel takes at least as long as its walk. With that many
    programs the longest walk is about an even share of all work. The workspace is then bounded by the GPU, not by the
    problem: some 8 programs per multiprocessor, each with its BLOCK_N rows of dK and dV.
    """
    return max(1, min(MAX_SPLITS, query_blocks, -(-8 * num_sms // programs)))


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    config: Config,
    device: torch.device,
    pointers: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    strided: tuple[Tensor, ...],
    factors: tuple[float, ...],
    flags: dict[str, Any],
) -> None:
    """Launch a kernel; all of them take their arguments in this order. Rows are dense."""
    strides = [stride for x in strided for stride in x.stride()[:-1]]
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](
            *pointers,
            *sizes,
            *strides,
            *factors,
            **flags,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
