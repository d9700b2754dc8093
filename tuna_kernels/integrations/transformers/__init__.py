"""Causal language models of transformers on packed trees. Start with `prepare_model` and `model_ranking_loss`."""

from tuna_kernels.integrations.transformers.models import model_ranking_loss, prepare_model, score_groups
from tuna_kernels.integrations.transformers.ranking_model import RankingModel
from tuna_kernels.integrations.transformers.two_phase.loss import two_phase_ranking_loss

__all__ = ["RankingModel", "model_ranking_loss", "prepare_model", "score_groups", "two_phase_ranking_loss"]
