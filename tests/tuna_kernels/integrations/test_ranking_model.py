"""Law: under DDP and FSDP2 on two ranks, a `RankingModel` has the gradient of one process, in one pass and in two
phases, with tied embeddings and with adapters on trunk and head; also where ranks have other numbers of passes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tuna.launching import ROOT, run
from tests.tuna_kernels.integrations.tiny_models import GROUPS, tiny
from tuna_kernels.integrations.transformers import RankingModel, model_ranking_loss, score_groups
from tuna_kernels.tree import pack_groups


def test_two_ranks_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    run(2, "tests.tuna_kernels.integrations.ranks_ranking_model", [str(tmp_path)], cwd=ROOT)
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == 12
    for name, error in results.items():
        # float64 models that take norms in float32
        assert error < 16 * torch.finfo(torch.float32).eps, f"{name}: {error}"


def test_owned_and_bare_are_the_same() -> None:
    model, tree = tiny("opt"), pack_groups(GROUPS)
    owner = RankingModel(model)
    assert torch.equal(score_groups(owner, tree).scores, score_groups(model, tree).scores)
    assert torch.equal(model_ranking_loss(owner, tree).loss, model_ranking_loss(model, tree).loss)
    assert owner.config is model.config
