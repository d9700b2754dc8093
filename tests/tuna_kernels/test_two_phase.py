"""The two-phase schedule: loss, scores and every gradient equal those of the one-pass loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tuna_kernels.tiny_models import FAMILIES, GROUPS, assert_close, assert_same_gradients, bound, tiny
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model
from tuna_kernels.integrations.two_phase import two_phase_ranking_loss
from tuna_kernels.tree import pack_groups


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, and taken off the parameters."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_pass(family: str) -> None:
    """Every family, one to four candidates a pass, with and without activation checkpointing."""
    model = prepare_model(tiny(family))
    tree = pack_groups(GROUPS)
    for preset in ("paper", "released"):
        expected = model_ranking_loss(model, tree, preset=preset, margin=0.4)
        expected.loss.backward()
        wanted = gradients(model)
        for size in (1, 2, 4):
            found = two_phase_ranking_loss(model, tree, preset=preset, margin=0.4, candidates_per_pass=size)
            assert_close(found.loss, expected.loss, bound(family))
            assert_close(found.scores, expected.scores, bound(family))
            assert torch.equal(found.active, expected.active)
            assert_same_gradients(gradients(model), wanted, bound(family))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    two_phase_ranking_loss(model, tree, preset="released", margin=0.4)
    assert_same_gradients(gradients(model), wanted, bound(family))
