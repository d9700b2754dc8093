"""QLoRA and 8-bit optimizers, where bitsandbytes is installed: trained for real, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tuna.train.test_trainer import config, ragged, tiny_llama, weights
from tuna.compare.baseline import baseline_step_loss
from tuna.models.loading import load_model, tiny_model
from tuna.train.trainer import TunaTrainer
from tuna_kernels import pack_groups
from tuna_kernels.integrations.transformers import model_ranking_loss

pytest.importorskip("bitsandbytes")


def _saved_llama(folder: Path) -> Path:
    """A small Llama and a tokenizer on disk, as `load_model` takes them. Widths are multiples of 64: bitsandbytes packs
    no others where the processor multiplies bfloat16."""
    model, tokenizer = tiny_model(intermediate_size=128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_on_four_bits_trains_and_the_rest_stays(tmp_path: Path) -> None:
    model, _ = load_model(_saved_llama(tmp_path / "base"), load_in_4bit=True)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    groups = [item.group for item in ragged(2)]
    ours = model_ranking_loss(adapted, pack_groups(groups), preset="released").loss
    baseline = baseline_step_loss(adapted, groups, preset="released").loss
    assert ours.item() == pytest.approx(baseline.item(), rel=1e-4)

    before = weights(adapted)
    trainer = TunaTrainer(adapted, config(tmp_path / "run", max_steps=2), ragged(4))
    trainer.train()
    moved = {name for name, value in weights(adapted).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {value.dtype for name, value in before.items() if name.endswith("q_proj.base_layer.weight")} == {torch.uint8}


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_its_optimizers_move_the_weights_as_adamw_does(name: str, tmp_path: Path) -> None:
    """Eight bits hold a moment to within a few percent; most of a first step is the sign of the gradient anyway."""

    def after(optim: str) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        TunaTrainer(model, config(tmp_path / optim, optim=optim, max_steps=3, learning_rate=1e-3), ragged(3)).train()
        return weights(model)

    start, exact, found = weights(tiny_llama()), after("adamw_torch"), after(name)
    way = torch.cat([(exact[key] - start[key]).flatten() for key in start])
    other = torch.cat([(found[key] - start[key]).flatten() for key in start])
    assert way.norm() > 0 and torch.cosine_similarity(way, other, dim=0) > 0.99
