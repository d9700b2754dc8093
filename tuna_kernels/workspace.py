"""Working memory of each op beyond its inputs and results, as a formula for planners.

Every formula is an upper bound on what PyTorch's allocator is asked for, as tested by
`tests/tuna_kernels/test_workspace.py`; b is the bytes per element of the compute type (float32, float64
for float64), R the rows that are scored, V the vocabulary, D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tuna_kernels.arguments import compute_dtype
from tuna_kernels.attention.block_plan import MAX_ROWS
from tuna_kernels.attention.triton import launches
from tuna_kernels.dispatch import resolve_backend
from tuna_kernels.gpu import launch
from tuna_kernels.head import cpu
from tuna_kernels.head.products import MIN_ROWS
from tuna_kernels.head.tiled import UNIT_SLOTS, TilePlan
from tuna_kernels.head.tiled_selective import CHUNK_BYTES
from tuna_kernels.head.triton import slabs
from tuna_kernels.native import native

__all__ = ["workspace_bytes"]

Shape = Mapping[str, int]

_HEAD = ("rows", "width", "vocabulary")
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear_logprobs": _HEAD,
    "linear_ranking_loss": (*_HEAD, "logits_budget"),
    "selective_logprobs": ("rows", "vocabulary"),
    "tree_attention": ("rows", "heads", "kv_heads", "head_size", "longest"),
}
_PER_SLOT = 128
"""Bytes of indices, statistics and float64 sums per scored row, independent of the width."""


def workspace_bytes(op: str, shape: Shape, dtype: torch.dtype, backend: str = "auto") -> int:
    """Peak bytes of an op, forward or backward, beyond its inputs and results.

    Args:
        op: `"linear_logprobs"`, `"linear_ranking_loss"`, `"selective_logprobs"` or `"tree_attention"`.
        shape: for the head `rows` (hidden rows that are scored; a row with several slots counts at most once per
            slot), `width` (D), `vocabulary` (V); for the ranking loss also `logits_budget` in bytes and, if
            known, `group_rows`, the rows of the largest group, and `skips`, 0 if every row has a gradient.
            For the attention `rows` (T), `heads`, `kv_heads`, `head_size`, `longest` (tokens of the
            longest sequence), and if they differ from 1 and T, `batch` and `queries`.
        dtype: dtype of hidden states and weight, of logits, or of queries, keys and values.
        backend: as in the op.

    Raises:
        ValueError: an unknown op or backend, or a missing entry of `shape`.

    Examples:
        >>> workspace_bytes("linear_logprobs", {"rows": 1, "width": 8, "vocabulary": 9}, torch.float32, "torch")
        525024
    """
    if op not in _NEEDED:
        raise ValueError(f"op = {op!r} is not one of {tuple(_NEEDED)}")
    if missing := [key for key in _NEEDED[op] if key not in shape]:
        raise ValueError(f"shape lacks {missing} for {op}")
    if op == "tree_attention":
        of_backend = _ATTENTION.get("torch" if backend in ("auto", "cpu") else backend)
        if of_backend is None:
            raise ValueError(f"backend = {backend!r} is not one of {('auto', *_ATTENTION)}")
        return of_backend(shape, dtype)
    if backend == "triton":  # also on a machine without a GPU
        return _on_triton(op, shape, dtype)
    return _HEADS[op](shape, dtype, resolve_backend(backend, torch.device("cpu"), dtype))


def _on_triton(op: str, shape: Shape, dtype: torch.dtype) -> int:
    rows, vocabulary = shape["rows"], shape["vocabulary"]
    if op == "selective_logprobs":
        return _PER_SLOT * rows
    head = slabs.workspace_bytes(rows, shape["width"], vocabulary, dtype)
    return head + min(shape.get("logits_budget", 0), 4 * max(rows, MIN_ROWS) * vocabulary) + _PER_SLOT * rows


def _linear_logprobs(shape: Shape, dtype: torch.dtype, backend: str) -> int:
    b, rows, width = compute_dtype(dtype).itemsize, shape["rows"], shape["width"]
    if backend == "reference":
        return _full_logits(shape, dtype)
    # Row gradients in the compute type; with a frozen weight the kept unit gradient twice, and gathered weight rows.
    return (
        _tiles(shape, dtype, backend, 0 if backend == "cpu" else 3)
        + b * width * (2 * rows + min(rows, UNIT_SLOTS))
        + _PER_SLOT * rows
    )


def _linear_ranking_loss(shape: Shape, dtype: torch.dtype, backend: str) -> int:
    b, rows, vocabulary = compute_dtype(dtype).itemsize, shape["rows"], shape["vocabulary"]
    if backend == "reference":
        return _full_logits(shape, dtype)
    capacity = shape["logits_budget"] // (b * vocabulary)
    group = shape.get("group_rows", rows)
    # Rows processed at once: groups beyond the budget are recomputed together.
    part = min(rows, capacity) if max(group, MIN_ROWS) <= capacity else rows
    block = b * vocabulary * min(capacity, max(rows, MIN_ROWS))
    tiles = _tiles(shape, dtype, backend, 1 if backend == "cpu" else 3)
    if max(group, MIN_ROWS) <= capacity and not shape.get("skips", 1):
        # All logits are kept, so none are computed in a tile, nor are rows of a kept block copied into one.
        tiles -= _logits_tile(shape, dtype) * (2 if backend == "cpu" else 1)
    return tiles + block + b * shape["width"] * part + _PER_SLOT * rows


def _selective_logprobs(shape: Shape, dtype: torch.dtype, backend: str) -> int:
    b, rows, vocabulary = compute_dtype(dtype).itemsize, shape["rows"], shape["vocabulary"]
    if backend == "reference":
        return 5 * b * rows * vocabulary
    chunk = min(rows, max(1, CHUNK_BYTES // (b * vocabulary)))
    return (2 if backend == "cpu" else 4) * b * chunk * vocabulary + _PER_SLOT * rows


def _full_logits(shape: Shape, dtype: torch.dtype) -> int:
    """The reference: logits, their log-softmax and its gradient, and both operands in the compute type."""
    b, rows, width, vocabulary = compute_dtype(dtype).itemsize, shape["rows"], shape["width"], shape["vocabulary"]
    return b * (5 * rows * vocabulary + 2 * width * (rows + vocabulary)) + _PER_SLOT * rows


def _tiles(shape: Shape, dtype: torch.dtype, backend: str, more: int) -> int:
    """Buffers of one walk over the tiles: logits and hidden rows; in half precision a tile of the weight's gradient
    and, unless products convert it, one of the weight; for our own products, a packed left operand.

    `more`: additional tiles of logits: one for rows copied from a kept block; torch operations need three for a
    gradient.
    """
    compute, width, plan = compute_dtype(dtype), shape["width"], _plan(shape, dtype)
    is_native = backend == "cpu" and cpu.has_products(dtype)
    weights = 0 if dtype == compute else 1 if is_native else 2
    rows, columns = plan.chunk(shape["rows"]), min(plan.columns, shape["vocabulary"])
    packed = 0
    if is_native:
        scratch = native().product_scratch
        packed = max(scratch(columns, rows), scratch(rows, columns) if cpu.multiplies(dtype) else 0)
    entries = (1 + more) * rows * plan.columns + width * (rows + weights * columns) + packed
    return compute.itemsize * entries


def _plan(shape: Shape, dtype: torch.dtype) -> TilePlan:
    return TilePlan.choose(shape["width"], converts=dtype != compute_dtype(dtype))


def _logits_tile(shape: Shape, dtype: torch.dtype) -> int:
    plan = _plan(shape, dtype)
    return compute_dtype(dtype).itemsize * plan.chunk(shape["rows"]) * plan.columns


def _attention_torch(shape: Shape, dtype: torch.dtype) -> int:
    """One block (see `attention.block_plan`): at most MAX_ROWS queries of all heads, and the longest path of keys.

    Scores and their gradient; queries, outputs and gradients of the block; keys, values, their gradients and the
    runs they are joined from. For half precision dK and dV of all rows are summed in float32.
    """
    compute = compute_dtype(dtype)
    batch, heads, kv, size = shape.get("batch", 1), shape["heads"], shape["kv_heads"], shape["head_size"]
    keys = min(shape["longest"] + MAX_ROWS, shape["rows"])
    queries = min(MAX_ROWS, shape.get("queries", shape["rows"]))
    block = 3 * heads * queries * keys + 6 * heads * queries * size + 6 * kv * keys * size
    sums = 0 if dtype == compute else 2 * kv * shape["rows"] * size
    return batch * compute.itemsize * (block + sums)


def _attention_reference(shape: Shape, dtype: torch.dtype) -> int:
    """The reference: scores of all rows against all rows in the compute type, kept for the backward."""
    b = compute_dtype(dtype).itemsize
    batch, heads, rows, size = shape.get("batch", 1), shape["heads"], shape["rows"], shape["head_size"]
    queries = shape.get("queries", rows)
    return batch * b * (5 * heads * queries * rows + 4 * heads * size * (queries + 2 * rows)) + queries * rows * 4


def _attention_triton(shape: Shape, dtype: torch.dtype) -> int:
    """On the present GPU; without one, on an H100."""
    rows = shape["rows"]
    return launches.workspace_bytes(
        shape.get("batch", 1),
        shape["heads"],
        shape["kv_heads"],
        shape.get("queries", rows),
        rows,
        shape["head_size"],
        dtype,
        launch.planned_device(),
    )


_HEADS: dict[str, Callable[[Shape, torch.dtype, str], int]] = {
    "linear_logprobs": _linear_logprobs,
    "linear_ranking_loss": _linear_ranking_loss,
    "selective_logprobs": _selective_logprobs,
}
_ATTENTION: dict[str, Callable[[Shape, torch.dtype], int]] = {
    "reference": _attention_reference,
    "torch": _attention_torch,
    "triton": _attention_triton,
}
