"""Packed trees through any Hugging Face causal LM: scores and ranking losses of all candidates in one pass.

    model = prepare_model(AutoModelForCausalLM.from_pretrained(...))
    tree = pack_groups(groups)
    loss = model_ranking_loss(model, tree).loss

Only public seams are used: the two attention registries and the keywords of ``forward``; no class or module
is patched. The backbone runs to its last hidden states, its LM head is never called: log-probabilities come
from `linear_logprobs` with the head's weight, bias, scale, softcap and LoRA adapter, and no logits are held.

Dropout outside attention (residual, LoRA in the trunk) stays as the model has it, and is drawn once for a
shared token. Mixture-of-experts routers see every shared token once, so their auxiliary losses, which are not
part of these scores, would count it once too.

How far a score depends on what else is packed: the attention of a group comes out in the same bits, but the
matrix products of the trunk take all T rows at once, and BLAS may choose another order of summation for
another T. So the same group alone and in company agrees to rounding (about 1e-6 relative in float32), not to
the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuna_kernels.integrations import _attention, _selfcheck
from tuna_kernels.integrations._heads import base_causal_lm, compute_device, read_head
from tuna_kernels.logprobs import linear_logprobs
from tuna_kernels.losses import Kind, LossCounts, Preset
from tuna_kernels.ranking import RankingLossOutput, linear_ranking_loss
from tuna_kernels.scores import sequence_scores
from tuna_kernels.tree import PackedTree

__all__ = ["GroupScores", "model_ranking_loss", "prepare_model", "score_groups"]

Model = TypeVar("Model", bound=nn.Module)

_checked: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Differentiable scores of a tree's candidates.

    Attributes:
        scores: [C] ``sum(logprobs) / length ** length_penalty``, float32 (float64 for float64 models).
        logprobs: [M] log-probability of every response token.
        entropy: [M] entropy of the distribution each token was drawn from, or None where not asked for.
    """

    scores: Tensor
    logprobs: Tensor
    entropy: Tensor | None


def prepare_model(model: Model, *, attention: str = "auto") -> Model:
    """Switch a causal LM's attention to ``"tuna_tree"``, for good, and return the same model.

    It stays switched on because activation checkpointing computes layers again during backward, when a switch
    that is turned back would silently compute something else. Calls without a tree go to transformers' own
    SDPA attention (softcap included, which SDPA lacks), so forward and ``generate`` work as before. Calling
    it twice does nothing.

    Args:
        model: a transformers causal LM, or one wrapped by peft.
        attention: backend of `tree_attention` for the check below.

    A model type that the test suite does not cover is checked once: a tiny tree against separate sequences
    through the model's own forward.

    Raises:
        TypeError: not a transformers or peft model.
        ValueError: a model this cannot serve: attention outside the registry (ALiBi families), sinks, chunked
            or bidirectional masks, a head that is more than scaled, capped linear, a sharded head, or a
            failed check. The model then has the attention it came with.
    """
    _attention.register()
    base = base_causal_lm(model)
    if base in _checked and _is_switched_on(base):
        return model
    if not type(base)._can_set_attn_implementation():
        raise ValueError(
            f"{type(base).__name__} does not take its attention from transformers' registry (families with ALiBi or "
            "an attention of their own do not), so the tree cannot reach it"
        )
    read_head(base)
    unknown = base.config.model_type not in _selfcheck.TESTED_FAMILIES and base not in _checked
    before = _implementations(base.config)
    with _selfcheck.quiet(model):
        stock = _selfcheck.stock_logprobs(model, _selfcheck.small_groups(base)) if unknown else None
        base.set_attn_implementation(_attention.NAME)
        try:
            if stock is not None:
                _selfcheck.compare(base, stock, lambda tree: _score(base, tree, 1.0, False, "auto", attention).logprobs)
        except Exception as error:
            base.set_attn_implementation(before)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{type(base).__name__} cannot run on a tree: {error}") from error
    _checked.add(base)
    return model


def score_groups(
    model: nn.Module,
    tree: PackedTree,
    *,
    length_penalty: float = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
    attention: str = "auto",
) -> GroupScores:
    """Scores of all candidates of a packed tree under a causal LM, in one pass, differentiable.

    Args:
        model: a transformers causal LM or one wrapped by peft; prepared by `prepare_model` if it is not yet.
        tree: from `pack_groups`; moved to the model's device where it is elsewhere.
        length_penalty: exponent of the length that a candidate's log-probability is divided by.
        return_entropy: also the entropy at every response token.
        backend: of the head (and `"reference"` of the attention too, where that is left to `"auto"`).
        attention: backend of `tree_attention` (docs/attention.md says which serves what).

    Raises:
        ValueError: an empty tree, or a model or setting that cannot be served (see `prepare_model`):
            attention dropout in training mode, positions beyond the model's range, an unknown ``attention``.
        RuntimeError: a backend that cannot serve the model here, with the reason.
        IndexError: a token outside the vocabulary.
    """
    prepare_model(model, attention=attention)
    return _score(base_causal_lm(model), tree, length_penalty, return_entropy, backend, attention)


def model_ranking_loss(
    model: nn.Module,
    tree: PackedTree,
    *,
    kind: Kind = "tuna",
    preset: Preset = "paper",
    margin: float = 0.1,
    length_penalty: float = 1.0,
    mle_weight: float = 1.0,
    counts: LossCounts | None = None,
    logits_budget: int | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> RankingLossOutput:
    """The ranking loss of a packed tree under a causal LM: backbone, then `linear_ranking_loss` on its head.

    Args:
        model, tree, backend, attention: as in `score_groups`.
        kind, preset, margin, length_penalty, mle_weight, counts, logits_budget: as in `linear_ranking_loss`.

    Raises:
        As `score_groups` and `linear_ranking_loss`.
    """
    prepare_model(model, attention=attention)
    base = base_causal_lm(model)
    head = read_head(base)
    hidden, tree = _hidden_states(base, tree, backend, attention)
    return linear_ranking_loss(
        hidden,
        head.weight,
        tree,
        kind=kind,
        preset=preset,
        margin=margin,
        length_penalty=length_penalty,
        mle_weight=mle_weight,
        counts=counts,
        logits_budget=logits_budget,
        backend=backend,
        **head.options(),
    )


def _score(
    base: PreTrainedModel,
    tree: PackedTree,
    length_penalty: float,
    return_entropy: bool,
    backend: str,
    attention: str,
) -> GroupScores:
    head = read_head(base)
    hidden, tree = _hidden_states(base, tree, backend, attention)
    found = linear_logprobs(
        hidden,
        head.weight,
        tree.targets,
        rows=tree.rows,
        return_entropy=return_entropy,
        backend=backend,
        **head.options(),
    )
    logprobs, entropy = found if isinstance(found, tuple) else (found, None)
    scores = sequence_scores(logprobs, tree.candidate_offsets, length_penalty=length_penalty)
    return GroupScores(scores, logprobs, entropy)


def _hidden_states(base: PreTrainedModel, tree: PackedTree, backend: str, attention: str) -> tuple[Tensor, PackedTree]:
    """Last hidden states [T, D] of the packed rows, and the tree on their device."""
    if tree.num_tokens == 0:
        raise ValueError("tree holds no groups: there is nothing to run the model on")
    device = compute_device(base)
    if tree.input_ids.device != device:
        tree = tree.to(device)
    if attention == "auto" and backend == "reference":
        attention = "reference"
    tree_pass = _attention.TreePass(tree.subtree_end, tree.position_ids, attention)
    _selfcheck.check_positions(base, lambda: tree_pass.longest)
    backbone = _backbone(base)
    with tree_pass.under_way():
        # A mask of ones keeps transformers from guessing packed documents from positions that start again.
        output = backbone(
            input_ids=tree.input_ids.unsqueeze(0),
            position_ids=tree.position_ids.unsqueeze(0),
            attention_mask=torch.ones_like(tree.input_ids).unsqueeze(0),
            use_cache=False,
            tuna_tree=tree_pass,
        )
    hidden: Tensor = output[0].squeeze(0)  # the last hidden state, in tuples and in model outputs alike
    return hidden, tree.to(hidden.device) if hidden.device != device else tree


def _backbone(base: PreTrainedModel) -> nn.Module:
    """The model below its head."""
    found = base.base_model
    if found is base:  # a few families name another prefix than the attribute that holds their backbone
        found = getattr(base, "model", base)
    if found is base:
        raise ValueError(f"{type(base).__name__} has no backbone apart from its head")
    return found


def _implementations(config: Any) -> dict[str, str]:
    """The attention of a model and its parts, in the form `set_attn_implementation` takes."""
    found = {"": config._attn_implementation}
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            found[name] = part._attn_implementation
    return found


def _is_switched_on(base: PreTrainedModel) -> bool:
    return bool(base.config.get_text_config()._attn_implementation == _attention.NAME)
