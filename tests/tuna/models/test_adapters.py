"""A merged model computes what its adapter did, tied embeddings included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tuna.models.adapters import merged
from tuna.models.loading import tiny_model
from tuna.train.export import export, merged_from
from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import score_groups

TREE = pack_groups(
    [Group(list(range(5, 15)), [list(range(30, 38)), list(range(50, 57))]), Group([9, 8, 7], [[40, 41], [42, 43]])]
)

KINDS: dict[str, dict[str, Any]] = {
    "trunk": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "embeddings by DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "adapters tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "both whole and tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "rank-stabilised head": {"target_modules": ["lm_head"], "use_rslora": True},
}


def adapted(kind: str, base: Any) -> Any:
    """With adapters that are far from what they start as."""
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=torch.arange(5, 45)[None]).logits
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_merged_saved_and_loaded_it_is_the_adapted_one(kind: str, tied: bool, tmp_path: Path) -> None:
    """By logits and, where the tree serves the head, by scores; the adapter itself loads as before."""
    base, tokenizer = tiny_model(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = adapted(kind, base)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    through_weights = merged_from(model, weights)
    plain: Any = merged(model)
    plain.save_pretrained(tmp_path / "plain")
    for found in (plain, through_weights, AutoModelForCausalLM.from_pretrained(tmp_path / "plain")):
        assert (logits(found) - wanted).abs().max() < 1e-4
    head, embeddings = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    assert (head is embeddings) == torch.equal(head, embeddings) == plain.config.tie_word_embeddings
    if kind in ("trunk", "head", "embeddings", "whole head"):
        assert (head is embeddings) == (tied and kind == "trunk")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert (logits(again) - wanted).abs().max() < 1e-4
    with torch.no_grad():
        scores = score_groups(again, TREE).scores
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (score_groups(loaded, TREE).scores - scores).abs().max() < 1e-4


@pytest.mark.parametrize("state", ["trainer_state.json", None])
@pytest.mark.parametrize("kind", ["head", "embeddings", "whole head"])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_checkpoint_is_the_adapted_model(kind: str, state: str | None, tmp_path: Path) -> None:
    """So is the adapter alone, as a run leaves it and as others hand it on."""
    base, tokenizer = tiny_model(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = adapted(kind, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    checkpoint = tmp_path / "checkpoint-1"
    model.save_pretrained(checkpoint)
    if state is not None:
        (checkpoint / state).write_text("{}")
    export(checkpoint, tmp_path / "out", model=str(tmp_path / "base"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(found) - logits(model)).abs().max() < 1e-4
