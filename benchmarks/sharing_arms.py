"""Ways to train on k responses of one prompt: the arms of `benchmarks.sharing`.

All compute the loss (preset `released`) of the same groups under the same small Llama and the gradient of every
parameter. They differ in what the trunk is given and in how attention keeps the responses apart; from "padded, fused
head" on all take our loss on the last hidden states, so that only the trunk differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Arm
from tuna.compare.baseline import baseline_step_loss, padded_batch
from tuna.compare.side_by_side import gradients_of
from tuna_kernels import Group, PackedTree, linear_ranking_loss, pack_groups
from tuna_kernels.attention.reference import visible
from tuna_kernels.integrations.transformers import model_ranking_loss
from tuna_kernels.losses import Preset
from tuna_kernels.tree import Share

PRESET: Preset = "released"
GROUPER = "bench_prefix_grouper"
NO_FLEX = "FlexAttention has no backward on CPU"
Loss = Callable[[nn.Module, Sequence[Group]], Tensor]


@dataclass(frozen=True)
class SharingCase:
    """Some groups and the model that all arms start from."""

    model: LlamaForCausalLM
    groups: Sequence[Group]


def small_llama(*, layers: int, width: int, vocab: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of random weights, heads of 64, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
        initializer_range=0.05,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).train()
    return model


def baseline(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """k padded copies, full logits."""
    return baseline_step_loss(model, groups, preset=PRESET).loss


def padded_fused(model: Any, groups: Sequence[Group]) -> Tensor:
    """k padded copies through the trunk, our loss on the rows that are no padding."""
    input_ids, attention_mask, _ = padded_batch(groups, 0)
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    return _loss(hidden[attention_mask.bool()], model, pack_groups(groups, share="none"))


def tree_dense_mask(model: Any, groups: Sequence[Group]) -> Tensor:
    """The packed tree with SDPA and a [T, T] mask: what a few lines of plain torch give."""
    tree = pack_groups(groups)
    sees = visible(tree.subtree_end)
    return _loss(_trunk(model, tree, attention_mask=sees[None, None]), model, tree)


def prefix_grouper(model: Any, groups: Sequence[Group]) -> Tensor:
    """Two attention calls a layer and group, as PrefixGrouper (arXiv 2506.05433) does: the prompt by itself, then all
    responses, padded to the longest, over copies of the prompt's keys and their own."""
    tree = pack_groups(groups, share="prompt")
    return _loss(_trunk(model, tree, bench_layout=_prompt_layout(tree, groups)), model, tree)


def ours(share: Share) -> Loss:
    """`model_ranking_loss` over groups packed with `share`."""

    def loss(model: nn.Module, groups: Sequence[Group]) -> Tensor:
        return model_ranking_loss(model, pack_groups(groups, share=share), preset=PRESET).loss

    return loss


def sharing_arms() -> list[Arm[SharingCase]]:
    """All arms, in the order of the tables."""
    return [
        _arm("baseline", baseline, "k padded copies, full logits (the released code)"),
        _arm("padded, fused head", padded_fused, "k padded copies, linear_ranking_loss"),
        _arm("PrefixGrouper method", prefix_grouper, "prompt once; suffixes padded, prompt keys copied", GROUPER),
        _arm("tree, dense mask", tree_dense_mask, "packed tree, SDPA with a [T, T] mask"),
        Arm("FlexAttention", lambda _: {}, "packed tree, block mask", "torch", refuses=lambda _: NO_FLEX),
        _arm("tuna none", ours("none"), "k sequences, no padding"),
        _arm("tuna prompt", ours("prompt"), "the prompt once"),
        _arm("tuna tree", ours("tree"), "every common prefix once"),
    ]


def _arm(name: str, loss: Loss, note: str, attention: str = "sdpa") -> Arm[SharingCase]:
    @lru_cache(maxsize=1)
    def model_of(case_model: LlamaForCausalLM) -> LlamaForCausalLM:
        _register()
        model = copy.deepcopy(case_model)
        model.set_attn_implementation(attention)
        return model

    def call(case: SharingCase) -> Any:
        model = model_of(case.model)
        model.zero_grad()
        value = loss(model, case.groups)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), model

    def results(found: Any) -> dict[str, Tensor]:
        value, model = found
        return {"loss": value, **gradients_of(model)}

    return Arm(name, call, note, results=results)


def sharing_oracle(case: SharingCase) -> dict[str, Tensor]:
    """Loss and gradients of the baseline in float64."""
    model = copy.deepcopy(case.model).double()
    loss = baseline(model, case.groups)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach(), **gradients_of(model)}


def _loss(hidden: Tensor, model: Any, tree: PackedTree) -> Tensor:
    return linear_ranking_loss(hidden, model.lm_head.weight, tree, preset=PRESET).loss


def _trunk(model: Any, tree: PackedTree, *, attention_mask: Tensor | None = None, **extra: Any) -> Tensor:
    """Last hidden states [T, D] of a packed row."""
    mask = torch.ones_like(tree.input_ids)[None] if attention_mask is None else attention_mask
    output = model.model(
        input_ids=tree.input_ids[None],
        position_ids=tree.position_ids[None],
        attention_mask=mask,
        use_cache=False,
        **extra,
    )
    hidden: Tensor = output[0][0]
    return hidden


@dataclass(frozen=True)
class _PromptGroup:
    """Rows of one group in a row packed with `share="prompt"`: its prompt, and its responses one after another."""

    prompt: slice
    responses: slice
    padded: Tensor  # [k, S] places among the responses' rows, 0 where padded
    real: Tensor  # [k, S] bool
    mask: Tensor  # [k, 1, S, P + S] bool


def _prompt_layout(tree: PackedTree, groups: Sequence[Group]) -> list[_PromptGroup]:
    layout = []
    for group, (start, end) in zip(groups, pairwise(tree.group_rows_host.tolist()), strict=True):
        lengths = torch.tensor([len(response) for response in group.responses])
        prompt, longest = len(group.prompt), int(lengths.max())
        place = torch.arange(longest)
        real = place < lengths[:, None]
        first = lengths.cumsum(0) - lengths
        own = (place[None, :] <= place[:, None]) & real[:, None, :]
        mask = torch.cat([torch.ones(len(lengths), longest, prompt, dtype=torch.bool), own], dim=-1)
        padded = torch.where(real, first[:, None] + place, 0)
        layout.append(
            _PromptGroup(slice(start, start + prompt), slice(start + prompt, end), padded, real, mask[:, None])
        )
    return layout


def _grouper_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs["scaling"]
    parts = []
    for group in kwargs["bench_layout"]:
        q, k, v = (x[:, :, group.prompt] for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        suffix = [x[0, :, group.responses][:, group.padded].transpose(0, 1) for x in (query, key, value)]
        count = len(group.padded)
        keys = torch.cat([k.expand(count, -1, -1, -1), suffix[1]], dim=2)
        values = torch.cat([v.expand(count, -1, -1, -1), suffix[2]], dim=2)
        out = F.scaled_dot_product_attention(suffix[0], keys, values, attn_mask=group.mask, scale=scaling)
        parts.append(out.transpose(0, 1)[:, group.real][None])
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _register() -> None:
    AttentionInterface.register(GROUPER, _grouper_attention)
    AttentionMaskInterface.register(GROUPER, _no_mask)
