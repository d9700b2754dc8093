"""What the ranks of `test_ranking_model` run: ``torchrun -m``, this module, a folder.

Every case wraps a `RankingModel`, takes one gradient of this rank's groups, and compares it with the gradient that
one process makes of all groups in one pass without a wrapper.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tuna_kernels.integrations.tiny_models import GROUPS, tiny
from tuna_kernels.integrations.transformers import (
    RankingModel,
    model_ranking_loss,
    score_groups,
    two_phase_ranking_loss,
)
from tuna_kernels.tree import pack_groups

WATCHDOG = 90
FAMILIES = ("llama", "llama-tied-bias")
PRESET: dict[str, Any] = {"preset": "paper", "margin": 0.01}


def ddp(model: RankingModel) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: RankingModel) -> nn.Module:
    """Layers apart; embeddings, last norm and head in the outermost unit."""
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer)
    return fully_shard(model)


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "lm_head"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            assert grad is not None, name
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def run(family: str, adapt: bool, wrap: Callable[[RankingModel], nn.Module], two_phase: bool) -> float:
    """The largest difference from the reference, relative to its largest value."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()

    def fresh() -> RankingModel:
        model = tiny(family)
        return RankingModel(lora(model) if adapt else model)

    whole = pack_groups(GROUPS)
    reference = fresh()
    torch.manual_seed(0)
    model_ranking_loss(reference, whole, **PRESET).loss.backward()
    expected = gradients(reference)

    torch.manual_seed(0)
    model = wrap(fresh())
    mine = pack_groups(GROUPS[rank::world])  # two groups and one: other numbers of passes
    if two_phase:
        two_phase_ranking_loss(
            model,
            mine,
            counts=whole.loss_counts(),
            scale=world,
            pass_context=lambda last: nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync(),
            **PRESET,
        )
    else:
        (model_ranking_loss(model, mine, counts=whole.loss_counts(), **PRESET).loss * world).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    with torch.no_grad():
        score_groups(model, mine)  # every rank, outside training
    return max((found[name] - grad).abs().max().item() for name, grad in expected.items()) / largest


def main() -> None:
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.distributed.init_process_group("gloo")
    results = {}
    for family, adapt in ((FAMILIES[0], False), (FAMILIES[1], False), (FAMILIES[0], True)):
        for wrap in (ddp, fsdp):
            for two_phase in (False, True):
                name = f"{family}{'-lora' if adapt else ''}-{wrap.__name__}-{'two_phase' if two_phase else 'one_pass'}"
                results[name] = run(family, adapt, wrap, two_phase)
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
