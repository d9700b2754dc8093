"""Tiny random models of every causal-LM family of transformers, and what the tree makes of each."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tuna_kernels.tiny_models import GROUPS, VOCABULARY, randomized, separate_scores
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model, score_groups
from tuna_kernels.integrations.two_phase import two_phase_ranking_loss, why_not_two_phase
from tuna_kernels.tree import pack_groups

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "is_decoder": True,
    "sliding_window": 4,
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "activation_dropout",
         "attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop", "decoder_layerdrop"), 0.0),
}


@dataclass(frozen=True)
class Result:
    """What the tree makes of a family.

    Attributes:
        status: "tree", "dense", "refused" or "not built".
        note: why it is refused or was not built.
        error: largest difference of a score, and of a parameter's gradient, relative to the largest of each.
        two_phase: the largest difference of a gradient by two phases, or why they are refused.
    """

    status: str
    note: str = ""
    scores: float = float("nan")
    gradients: float = float("nan")
    two_phase: float | str = float("nan")


OVERRIDES: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**SMALL, **OVERRIDES.get(model_type, {})})


def tiny_family(model_type: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in model.parameters()) > 5e6:
        raise ValueError(f"too large: {sum(p.numel() for p in model.parameters())}")
    model = AutoModelForCausalLM.from_config(config)
    try:
        model.set_experts_implementation("eager")
    except Exception:
        pass
    return randomized(model.to(dtype), 0.2).eval()


def gradients(model: nn.Module, scores: Tensor) -> dict[str, Tensor]:
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.zero_grad(set_to_none=True)
    (scores * upstream).sum().backward()
    return taken(model)


def taken(model):
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    largest = max(g.abs().max().item() for g in b.values())
    return max((a[n] - g).abs().max().item() / max(g.abs().max().item(), 1e-3 * largest) for n, g in b.items())


def measure(model_type: str) -> Result:
    try:
        model = tiny_family(model_type)
    except Exception as e:
        return Result("not built", f"{type(e).__name__}: {e}"[:160])
    try:
        want = separate_scores(model, GROUPS)
        wanted = gradients(model, want)
    except Exception as e:
        return Result("not built", f"stock {type(e).__name__}: {e}"[:160])
    try:
        prepare_model(model)
    except ValueError as e:
        return Result("refused", str(e))
    status = "dense" if model.config.get_text_config()._attn_implementation == "tuna_tree_dense" else "tree"
    tree = pack_groups(GROUPS)
    got = score_groups(model, tree).scores
    found = gradients(model, got)
    s = ((got - want).abs().max() / want.abs().max()).item()
    g = difference(found, wanted)
    two: float | str = why_not_two_phase(model)
    if not two:
        try:
            model_ranking_loss(model, tree, margin=0.4).loss.backward()
            one = taken(model)
            model.train()
            for m in model.modules():
                if isinstance(m, nn.Dropout): m.p = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": False}) if model.supports_gradient_checkpointing else None
            two_phase_ranking_loss(model, tree, margin=0.4)
            two = difference(taken(model), one)
        except Exception as e:
            two = f"{type(e).__name__}: {e}"
    return Result(status, "", s, g, two)


if __name__ == "__main__":
    import sys, transformers, time
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for mt in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        t = time.process_time()
        try:
            r = measure(mt)
        except Exception as e:
            import traceback
            r = Result("CRASH", f"{type(e).__name__}: {e}"[:200])
        print(f"{mt:26s} {r.status:9s} {r.scores:.1e} {r.gradients:.1e} {r.two_phase if isinstance(r.two_phase,str) else format(r.two_phase,'.1e')} {r.note[:230]} [{time.process_time()-t:.1f}s]", flush=True)
