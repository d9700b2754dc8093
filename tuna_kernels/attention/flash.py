"""Tree attention through flash-attn's variable-length kernels.

A tree becomes a few batches of plain sequences (`segments`). The results (out_p, lse_p) of these parts are merged
exactly:

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

In the backward every part gets the *merged* out and lse: its probabilities exp(s - lse) are then those of the whole
softmax, and delta = rowsum(dO ∘ O) is the whole row's, so the gradients of the parts sum to the exact ones.

Not supported: a window shorter than some sequence (its edge in depth differs from branch to branch), `query_rows`,
a gradient of lse, values of another head size, trees with more than `MAX_LEVELS` forks on one path.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from tuna_kernels.attention.block_plan import host_bytes
from tuna_kernels.attention.call import AttentionCall, AttentionGradients, AttentionResult
from tuna_kernels.attention.segments import Part, parts_of
from tuna_kernels.errors import CannotServe

MAX_LEVELS = 16
"""Maximum number of levels. Each is one more call, forward and backward, over the rows below it."""

DEVICE = "cuda"


def why_not(q: Tensor, v: Tensor, query_rows: Tensor | None) -> str:
    """ "" if the shapes, dtypes and device are supported, else the reason why not."""
    if not installed():
        return "flash-attn is not installed (pip install 'tuna-kernels[flash]')"
    if q.device.type != DEVICE:
        return f"flash-attn computes on {DEVICE} tensors, the inputs are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn supports float16 and bfloat16, not {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or not 0 < q.shape[3] <= 256:
        return f"head sizes {q.shape[3]} and {v.shape[3]}: flash-attn requires equal multiples of 8 up to 256"
    if query_rows is not None:
        return "query_rows: it computes all rows of a tree"
    return ""


def installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def forward(call: AttentionCall) -> AttentionResult:
    """See `tuna_kernels.attention.ops`."""
    _check_window(call.position_ids, call.window)
    result = call.empty_result()
    if call.q.numel() == 0:
        return result
    parts = _parts(call.subtree_end)
    sequences = _sequences(call)
    out, lse = _forward_part(parts[0], sequences)
    out = out.float()
    for part in parts[1:]:
        part_out, part_lse = _forward_part(part, sequences)
        old_lse = lse[:, part.queries]
        new_lse = torch.logaddexp(old_lse, part_lse)
        kept, added = (torch.exp(x - new_lse).unsqueeze(-1) for x in (old_lse, part_lse))
        out[:, part.queries] = out[:, part.queries] * kept + part_out * added
        lse[:, part.queries] = new_lse
    result.out.copy_(out.transpose(1, 2))
    result.lse.copy_(lse.transpose(1, 2))
    return result


def backward(
    call: AttentionCall, result: AttentionResult, grad_out: Tensor, grad_lse: Tensor | None
) -> AttentionGradients:
    """See `tuna_kernels.attention.ops`; summed over parts in float32."""
    if grad_lse is not None:
        raise CannotServe("backend = 'flash' does not support a gradient of lse: flash-attn's backward has none")
    grads = call.empty_gradients()
    if call.q.numel() == 0:
        return grads._replace(k=grads.k.zero_(), v=grads.v.zero_())
    sequences = _sequences(call)
    grad_out, out, lse = (x.transpose(1, 2) for x in (grad_out, *result))
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in sequences[:3]]
    for part in _parts(call.subtree_end):
        of_part = _backward_part(part, sequences, grad_out, AttentionResult(out, lse))
        for total, grad, index in zip(sums, of_part, (part.queries, part.keys, part.keys), strict=True):
            if index is None:
                total += grad
            else:
                total[:, index] += grad
    for grad, total in zip(grads, sums, strict=True):
        grad.copy_(total.transpose(1, 2))
    return grads


def _sequences(call: AttentionCall) -> AttentionCall:
    """q, k and v in flash-attn's layout, [B, T, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in call[:3])
    return call._replace(q=q, k=k, v=v)


def _check_window(position_ids: Tensor | None, window: int | None) -> None:
    if window is None or position_ids is None or not len(position_ids):
        return
    longest = int(torch.frombuffer(bytearray(host_bytes(position_ids)), dtype=torch.int64).max()) + 1
    if longest > window:
        raise CannotServe(
            f"backend = 'flash' does not support window = {window} with a sequence of {longest} tokens: the window's "
            "edge in depth differs from branch to branch; use 'triton' or 'torch'"
        )


def _parts(subtree_end: Tensor) -> tuple[Part, ...]:
    parts = parts_of(host_bytes(subtree_end), subtree_end.device)
    if len(parts) - 1 > MAX_LEVELS:
        raise CannotServe(
            f"backend = 'flash' does not support a tree with {len(parts) - 1} forks on one path, more than "
            f"{MAX_LEVELS}; pack it with share='prompt' or use 'triton' or 'torch'"
        )
    return parts


def _forward_part(part: Part, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out [B, n, Hq, d], lse [B, n, Hq] float32) of a part; q, k and v are [B, T, H, d]."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    batch = call.q.shape[0]
    out, lse, _, _ = _flash_attn_varlen_forward(
        _flat(call.q, part.queries),
        _flat(call.k, part.keys),
        _flat(call.v, part.keys),
        **_lengths(part, batch),
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=part.causal,
        softcap=call.softcap or 0.0,
    )
    return _unflat(out, batch), _unflat(lse.T, batch)


def _backward_part(
    part: Part, call: AttentionCall, grad_out: Tensor, result: AttentionResult
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), [B, n, H, d], of a part; `result` is the merged one."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    batch = call.q.shape[0]
    flat_q, flat_k, flat_v = _flat(call.q, part.queries), _flat(call.k, part.keys), _flat(call.v, part.keys)
    dq, dk, dv = torch.empty_like(flat_q), torch.empty_like(flat_k), torch.empty_like(flat_v)
    _flash_attn_varlen_backward(
        _flat(grad_out, part.queries),
        flat_q,
        flat_k,
        flat_v,
        _flat(result.out, part.queries),
        _flat(result.lse, part.queries).T.contiguous(),
        dq,
        dk,
        dv,
        **_lengths(part, batch),
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=part.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=call.softcap or 0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return _unflat(dq, batch), _unflat(dk, batch), _unflat(dv, batch)


def _flat(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows of all trees of the batch, concatenated: [B n, …]."""
    return (x if index is None else x.index_select(1, index)).flatten(0, 1).contiguous()


def _unflat(x: Tensor, batch: int) -> Tensor:
    return x.reshape(batch, -1, *x.shape[1:])


def _lengths(part: Part, batch: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": _repeated(part.query_offsets, batch),
        "cu_seqlens_k": _repeated(part.key_offsets, batch),
        "max_seqlen_q": part.longest_query,
        "max_seqlen_k": part.longest_key,
    }


def _repeated(offsets: Tensor, batch: int) -> Tensor:
    """Offsets of the same sequences repeated `batch` times."""
    shifts = torch.arange(batch, device=offsets.device, dtype=torch.int32)[:, None] * offsets[-1]
    return torch.cat([offsets[:1], (offsets[1:] + shifts).flatten()])
