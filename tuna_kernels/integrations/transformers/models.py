"""Packed trees through any Hugging Face causal LM: scores and ranking losses of all candidates in one pass.

    model = prepare_model(AutoModelForCausalLM.from_pretrained(...))
    tree = pack_groups(groups)
    loss = model_ranking_loss(model, tree).loss

Only public interfaces are used: the two attention registries and the keywords of `forward`; no class or module
is patched. The backbone runs up to its last hidden states and the LM head is never called: log-probabilities come
from `linear_logprobs` with the head's weight, bias, scale, softcap and LoRA adapter, without full logits.

Dropout outside attention (residual, LoRA in the trunk) is left unchanged and is drawn once per shared
token. Mixture-of-experts routers see every shared token once, so their auxiliary losses, which are not
part of these scores, would count it once too.

Dependence on the batch: a group's attention is reproducible bit for bit, but the trunk's matrix products take
all T rows at once, and the BLAS may sum in another order for another T. So a group alone and batched agrees up to
rounding (about 1e-6 relative in float32), not bit for bit.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuna_kernels.attention.tree_attention import check_backend
from tuna_kernels.head.logprobs import linear_logprobs
from tuna_kernels.head.ranking_loss import RankingLossOutput, linear_ranking_loss
from tuna_kernels.integrations.transformers import attention_hook, check, dense_mask
from tuna_kernels.integrations.transformers.head import base_causal_lm, compute_device, read_head
from tuna_kernels.integrations.transformers.ranking_model import Carrier, RankingModel, carrier
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import Kind, Preset
from tuna_kernels.scores import sequence_scores
from tuna_kernels.tree import Group, PackedTree

__all__ = ["GroupScores", "LossOptions", "RankingModel", "model_ranking_loss", "prepare_model", "score_groups"]

Model = TypeVar("Model", bound=nn.Module)

_checked: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
_chosen_attention: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Differentiable scores of a tree's candidates.

    Attributes:
        scores: [C] `sum(logprobs) / length ** length_penalty`, float32 (float64 for float64 models).
        logprobs: [M] log-probability of every response token.
        entropy: [M] entropy of the distribution at each response token, or None if not requested.
    """

    scores: Tensor
    logprobs: Tensor
    entropy: Tensor | None


def prepare_model(model: Model, *, attention: str | None = None) -> Model:
    """Switch a causal LM's attention to trees, permanently, and return the same model.

    It stays switched because activation checkpointing recomputes layers during backward, and would silently compute
    something else if it were switched back. Calls without a tree use the model's original attention, so forward and
    `generate` work as before. Repeated calls have no effect.

    The model is checked once, and again when a forward or a hook anywhere in it has changed: a tiny tree against
    separate sequences through the model's own forward, about ten short forwards (docs/families.md).

    Args:
        model: a transformers causal LM, or one wrapped by peft.
        attention: the backend of `tree_attention` (docs/attention.md) for this model from now on; None keeps the
            previous choice, initially `"auto"`.

    Raises:
        TypeError: not a transformers or peft model.
        ValueError: an unknown `attention`; an unsupported model: recurrent layers, chunked or bidirectional
            masks, positions counted by row, a head that is not linear up to scale and softcap, a sharded head, or a
            failed check. The model's attention is then left unchanged.
    """
    attention_hook.register()
    base = base_causal_lm(model)
    if attention is not None:
        check_backend(attention, "attention")
        _chosen_attention[base] = attention
    _prepare(model, base)
    return model


def _prepare(model: nn.Module, base: PreTrainedModel) -> None:
    if _is_switched_on(base) and _checked.get(base) == check.signature(model, *base.modules()):
        return
    read_head(base, ahead=True)
    if reason := check.why_not(base):
        raise ValueError(f"{type(base).__name__} cannot run on a tree: {reason}")
    before = _implementations(base)
    try:
        if not check.can_run(base):  # ZeRO-3 gathers weights only in a wrapped call, so the check runs there
            _switch(base)
            return
        with check.quiet(model), check.in_float32(model):
            _check(model, base)
    except Exception as error:
        for config, name in before:
            config._attn_implementation = name
        if isinstance(error, ValueError):
            raise
        why = "it uses its attention mask as a tensor, which a tree is not" if "TreeMask" in str(error) else error
        raise ValueError(f"{type(base).__name__} cannot run on a tree: {why}") from error
    _checked[base] = check.signature(model, *base.modules())  # includes hooks installed by the first forward


def _check(model: nn.Module, base: PreTrainedModel) -> None:
    """Switch the model's attention and compare small trees with its own forward."""
    own = [(config, _stock(config, name)) for config, name in _implementations(base)]

    def stock(groups: list[Group]) -> tuple[Tensor, Tensor]:
        for config, name in own:
            config._attn_implementation = name
        try:
            return check.stock_logprobs(model, groups)
        except Exception as error:
            raise ValueError(f"{type(base).__name__} cannot be checked: its own forward fails: {error}") from error
        finally:
            _switch(base)

    try:
        check.compare(base, stock, lambda tree: _score(base, tree, 1.0, False, "auto").logprobs)
    except Exception as error:
        for config, name in own:
            config._attn_implementation = name
        if why := check.convolution(base) or check.before_head(model, base, _backbone(base)):
            raise ValueError(f"{type(base).__name__} cannot run on a tree: {why}") from error
        raise


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss and its kernels, as in `linear_ranking_loss`."""

    kind: Kind = "tuna"
    preset: Preset = "paper"
    margin: float = 0.1
    length_penalty: float = 1.0
    mle_weight: float = 1.0
    counts: LossCounts | None = None
    logits_budget: int | None = None
    backend: str = "auto"


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """`score_groups` as a request; returns (scores, logprobs) or (scores, logprobs, entropy)."""

    tree: PackedTree
    length_penalty: float
    return_entropy: bool
    backend: str

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        prepare_model(model)
        options = (self.length_penalty, self.return_entropy, self.backend)
        found = _score(base_causal_lm(model), self.tree, *options)
        return (found.scores, found.logprobs, *([] if found.entropy is None else [found.entropy]))


@dataclass(frozen=True, eq=False)
class LossRequest:
    """`model_ranking_loss` as a request; returns the fields of `RankingLossOutput`."""

    tree: PackedTree
    settings: LossOptions

    def __call__(self, model: nn.Module) -> tuple[Tensor, ...]:
        prepare_model(model)
        base = base_causal_lm(model)
        hidden, tree = _hidden_states(base, self.tree, self.settings.backend)
        head = read_head(base)  # after the trunk: ZeRO-3 partitions a tied embedding again when its layer is done
        found = linear_ranking_loss(hidden, head.weight, tree, **vars(self.settings), **head.options())
        return found.loss, found.ranking, found.mle, found.scores, found.logprobs, found.active


def score_groups(
    model: nn.Module | Carrier,
    tree: PackedTree,
    *,
    length_penalty: float = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
) -> GroupScores:
    """Differentiable scores of all candidates of a packed tree under a causal LM, in one pass.

    Args:
        model: a transformers causal LM or one wrapped by peft, prepared by `prepare_model` if it is not yet; or a
            `RankingModel`, or a wrapper (DDP, FSDP, DeepSpeed) around one.
        tree: from `pack_groups`; moved to the model's device if needed.
        length_penalty: exponent of the length by which a candidate's log-probability is divided.
        return_entropy: also return the entropy at every response token.
        backend: backend of the head (`"reference"` also sets the attention, unless `prepare_model` chose one).

    Raises:
        ValueError: an empty tree, or an unsupported model or setting (see `prepare_model`):
            attention dropout in training mode, positions beyond the model's range.
        IndexError: a token outside the vocabulary.
    """
    scores, logprobs, *entropy = carrier(model)(ScoreRequest(tree, length_penalty, return_entropy, backend))
    return GroupScores(scores, logprobs, entropy[0] if entropy else None)


def model_ranking_loss(
    model: nn.Module | Carrier,
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
) -> RankingLossOutput:
    """Ranking loss of a packed tree under a causal LM: the backbone, then `linear_ranking_loss` on its head.

    Args:
        model: as in `score_groups`.
        tree: as in `score_groups`.
        kind: as in `linear_ranking_loss`.
        preset: as in `linear_ranking_loss`.
        margin: as in `linear_ranking_loss`.
        length_penalty: as in `linear_ranking_loss`.
        mle_weight: as in `linear_ranking_loss`.
        counts: as in `linear_ranking_loss`.
        logits_budget: as in `linear_ranking_loss`.
        backend: as in `score_groups`.

    Raises:
        ValueError, IndexError: as `score_groups` and `linear_ranking_loss`.
    """
    settings = LossOptions(kind, preset, margin, length_penalty, mle_weight, counts, logits_budget, backend)
    return RankingLossOutput(*carrier(model)(LossRequest(tree, settings)))


def _score(
    base: PreTrainedModel,
    tree: PackedTree,
    length_penalty: float,
    return_entropy: bool,
    backend: str,
) -> GroupScores:
    hidden, tree = _hidden_states(base, tree, backend)
    head = read_head(base)  # after the trunk: ZeRO-3 partitions a tied embedding again when its layer is done
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


def _hidden_states(base: PreTrainedModel, tree: PackedTree, backend: str) -> tuple[Tensor, PackedTree]:
    """Last hidden states [T, D] of the packed rows, and the tree on their device."""
    if tree.num_tokens == 0:
        raise ValueError("tree holds no groups")
    device = compute_device(base)
    if tree.input_ids.device != device:
        tree = tree.to(device)
    tree_pass = attention_hook.TreePass(tree.subtree_end, tree.position_ids, attention_backend(base, backend))
    hidden = run_backbone(base, tree.input_ids, tree_pass)
    return hidden, tree.to(hidden.device) if hidden.device != device else tree


def attention_backend(base: PreTrainedModel, backend: str) -> str:
    """The backend chosen for the model's tree attention; if none, `"reference"` when the head's is `"reference"`."""
    chosen = _chosen_attention.get(base, "auto")
    return "reference" if chosen == "auto" and backend == "reference" else chosen


def run_backbone(base: PreTrainedModel, input_ids: Tensor, tree_pass: attention_hook.TreePass) -> Tensor:
    """Last hidden states [Tq, D] of the pass's rows, with tokens `input_ids` [Tq]."""
    check.check_positions(base, lambda: tree_pass.longest)
    check.check_embedding_noise(base)
    rows = tree_pass.query_rows
    positions = tree_pass.position_ids if rows is None else tree_pass.position_ids[rows]
    if base.config.get_text_config()._attn_implementation == attention_hook.DENSE:
        dense_mask.check_rows(base, len(tree_pass.position_ids))
    backbone = _backbone(base)
    keywords = {"position_ids": positions.unsqueeze(0)} if _takes_positions(backbone) else {}
    with tree_pass.under_way():
        # A mask of ones keeps transformers from inferring packed documents from restarting positions.
        output = backbone(
            input_ids=input_ids.unsqueeze(0),
            attention_mask=torch.ones_like(input_ids).unsqueeze(0),
            use_cache=False,
            **keywords,
        )
    hidden: Tensor = output[0].squeeze(0)  # the last hidden state, in tuples and in model outputs
    return hidden


def _takes_positions(backbone: nn.Module) -> bool:
    """False if positions are attention biases (BLOOM, MPT)."""
    parameters = inspect.signature(backbone.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _backbone(base: PreTrainedModel) -> nn.Module:
    """The model below its head."""
    found = base.base_model
    if found is base:  # in a few families base_model_prefix is not the attribute that holds the backbone
        found = getattr(base, "model", base)
    if found is base:
        raise ValueError(f"{type(base).__name__} has no backbone separate from its head")
    return found


def _implementations(base: PreTrainedModel) -> list[tuple[Any, str]]:
    """The configurations of a model and its parts, each with its attention implementation."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in base.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return [(config, config._attn_implementation) for config in found.values()]


def _stock(config: Any, name: str) -> str:
    """The attention of the model's own forward: SDPA has no softcap, and some transformers releases ignore it."""
    return "eager" if name == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None else name


def _switch(base: PreTrainedModel) -> None:
    """Switch the attention of the model and its parts to trees."""
    dense = not _takes_attention_from_registry(base)
    for config, name in _implementations(base):
        if dense:
            config._attn_implementation = attention_hook.DENSE
        elif name not in _OURS:
            eager = _stock(config, name) == "eager" or not type(base)._supports_sdpa
            config._attn_implementation = attention_hook.EAGER if eager else attention_hook.SDPA
    if dense:
        dense_mask.hook_biases(_backbone(base))


_OURS = (attention_hook.SDPA, attention_hook.EAGER, attention_hook.DENSE)


def _takes_attention_from_registry(base: PreTrainedModel) -> bool:
    kinds = {
        kind for module in base.modules() for kind in type(module).__mro__ if not isinstance(module, PreTrainedModel)
    }
    return any(hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS") for kind in kinds)


def _is_switched_on(base: PreTrainedModel) -> bool:
    return base.config.get_text_config()._attn_implementation in _OURS
