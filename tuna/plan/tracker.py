"""Peak memory and FLOPs of a simulated step at each of its moments.

Torch's `MemTracker` tracks every storage from its creation by an operation until it is freed. It sees the ops of
`tuna_kernels` from outside: their results are counted, their workspace is not. The workspace is given by
`tuna_kernels.workspace_bytes` and is added here while the op runs.

A step is divided into moments, so that each grows linearly with the number of layers (`tuna.plan.simulate`):
per call of the backbone `forward`, `head` (from the last hidden states through the loss to their gradient),
`top` (backward of the last layer), `middle`, `bottom` (the first layer) and `embedding`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from tuna_kernels import workspace_bytes
from tuna_kernels.arguments import named_arguments

__all__ = ["StepTracker"]

Moment = tuple[int, str]
"""(call of the backbone, counted from 1; part of the step)."""

# FLOPs of attention in units of visible pairs · query heads · head size: two products forward, five backward.
_ATTENTION_FLOPS = {"tree_attention": 4, "tree_attention_backward": 10}
_FLASH_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 4,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 10,
}


class StepTracker(MemTracker):  # type: ignore[no-untyped-call]
    """Tracks one micro-batch of a model with fake tensors.

    Attributes:
        peaks: maximum bytes above the start at each moment.
        saved: bytes above the start at the end of each call of the backbone: what it keeps for the backward.
        flops: FLOPs of the products of the step (a multiplication and an addition count two).
    """

    def __init__(self, attention_backend: str = "auto", head_backend: str = "auto") -> None:
        super().__init__()
        self.peaks: dict[Moment, int] = {}
        self.saved: dict[int, int] = {}
        self.flops = 0
        self._moment: Moment = (0, "forward")
        self._pass: tuple[tuple[int, ...], int] | None = None
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._flops_of: dict[tuple[int, ...], int] = {}
        self._start = 0
        self._table: torch.Size | None = None
        self._backends = {"attention": attention_backend, "head": head_backend}

    @contextmanager
    def follow(self, model: nn.Module, backbone: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """A context that tracks memory; parameters, buffers and gradients of the model are not counted."""
        self.track_external(model)
        self._start = self.held()
        inner: Any = backbone
        self._table = inner.get_input_embeddings().weight.shape
        hooks = [
            backbone.register_forward_pre_hook(self._backbone_begins),
            backbone.register_forward_hook(self._backbone_ends),
            *(
                layer.register_forward_pre_hook(self._layer_begins(i), with_kwargs=True)
                for i, layer in enumerate(layers)
            ),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def wanted(self, kind: tuple[int, ...], differ: int) -> bool:
        """Whether a pass of this kind must run: after the first `differ`, passes count like the last that ran."""
        if self._pass is not None:
            known, before = self._pass
            self._flops_of[known] = self.flops - before
        self._seen[kind] += 1
        if self._seen[kind] > differ:
            self._pass = None
            self.flops += self._flops_of[kind]
            return False
        self._pass = (kind, self.flops)
        return True

    def held(self) -> int:
        """Bytes currently held on all devices."""
        return sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())

    # Hooks called by torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        extra = 0
        if func.namespace == "tuna_kernels":
            given = named_arguments(func)(*args, **(kwargs or {}))
            extra = self._workspace(func._opname, given)
            self.flops += self._kernel_flops(func._opname, given)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        elif func.overloadpacket in _FLASH_FLOPS:
            self.flops += _flash_flops(_FLASH_FLOPS[func.overloadpacket], args)
        elif func is torch.ops.aten.add.Tensor and self._moment[1] == "embedding" and result.shape == self._table:
            # The gradients of a tied embedding: autograd adds one to the other in place, except with fake tensors.
            extra = -result.nbytes
        self._note(extra)
        return result

    # The parent's statistics by module are not needed, and would fail with frozen weights or a second call.

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None: ...

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None: ...

    def _pre_bw_hook(self, module: nn.Module, args: Any) -> None: ...

    def _post_bw_hook(self, module: nn.Module, args: Any) -> None: ...

    # Moments

    def _note(self, extra: int) -> None:
        now = self.held() - self._start + extra
        if now > self.peaks.get(self._moment, 0):
            self.peaks[self._moment] = now

    def _backbone_begins(self, *_: Any) -> None:
        self._moment = (self._moment[0] + 1, "forward")

    def _backbone_ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        call = self._moment[0]
        self.saved[call] = self.held() - self._start
        self._moment = (call, "head")
        hidden: Tensor = output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter((call, "top")))  # type: ignore[no-untyped-call]

    def _layer_begins(self, index: int) -> Any:
        # When the gradient of a layer's input is computed, the layer is done and the one below begins.
        below = "embedding" if index == 0 else "bottom" if index == 1 else "middle"

        def hook(module: nn.Module, inputs: Any, kwargs: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # the layer is recomputed in the backward
                return
            call, hidden = self._moment[0], inputs[0] if inputs else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter((call, below)))

        return hook

    def _enter(self, moment: Moment) -> None:
        self._moment = moment

    # Ops of tuna_kernels

    def _workspace(self, op: str, given: Any) -> int:
        if op.startswith("tree_attention"):
            q, k = given.q, given.k
            shape = {
                "batch": q.shape[0],
                "heads": q.shape[1],
                "kv_heads": k.shape[1],
                "queries": q.shape[2],
                "rows": k.shape[2],
                "head_size": q.shape[3],
                "longest": _depths(given)[0],
            }
            return workspace_bytes("tree_attention", shape, q.dtype, self._backends["attention"])
        weight = given.weight
        shape = {"rows": _scored_rows(given), "width": weight.shape[1], "vocabulary": weight.shape[0]}
        if op == "linear_ranking_loss":
            # under "released" the likelihood of every response counts, so every row has a gradient
            shape |= {"logits_budget": given.logits_budget, "skips": int(given.preset == "paper")}
            shape |= {"group_rows": _largest_group(given)}
            return workspace_bytes(op, shape, weight.dtype, self._backends["head"])
        return workspace_bytes("linear_logprobs", shape, weight.dtype, self._backends["head"])

    def _kernel_flops(self, op: str, given: Any) -> int:
        """FLOPs of the ops of `tuna_kernels`, which `flop_registry` does not know."""
        if op.startswith("tree_attention"):
            q: Tensor = given.q
            return _ATTENTION_FLOPS[op] * q.shape[0] * q.shape[1] * q.shape[3] * _depths(given)[1]
        product: int = 2 * _scored_rows(given) * given.weight.numel()
        if op == "linear_logprobs":
            return product * (2 if given.keep_unit else 1)  # with the unit gradient of a frozen weight
        if op == "linear_logprobs_backward" and given.unit.numel():
            return 0
        wanted: list[bool] = given.needs[:2]
        return product * (1 + sum(wanted))  # logits, then the gradients of hidden states and weight


def _scored_rows(given: Any) -> int:
    rows: int = min(given.hidden.shape[0], given.targets.shape[0])
    return rows


def _depths(given: Any) -> tuple[int, int]:
    """Longest sequence and number of visible pairs of rows in an attention call; the tree is not fake."""
    rows, positions = given.k.shape[2], given.position_ids
    if positions is None or isinstance(positions, FakeTensor):
        return rows, given.q.shape[2] * rows
    with _disable_current_modes():
        return int(positions.max()) + 1, int(positions.sum()) + rows


def _largest_group(given: Any) -> int:
    """Number of slots of the largest group in a call of `linear_ranking_loss`."""
    if isinstance(given.candidate_offsets, FakeTensor):
        return int(given.targets.shape[0])
    with _disable_current_modes():
        return int(given.candidate_offsets[given.group_offsets].diff().max())


def _flash_flops(units: int, args: Any) -> int:
    """FLOPs of PyTorch's CPU flash attention with a full mask; q is the first argument with four dimensions."""
    q, k = [x for x in args if isinstance(x, Tensor) and x.ndim == 4][units // 10 :][:2]
    return units * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
