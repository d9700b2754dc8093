"""Kernels for training on ranked responses: per-token log-probabilities, sequence scores and ranking losses over
all candidates of a prompt, without full-vocabulary logits and without recomputing shared prefixes.

Needs torch and numpy only. Start with `pack_groups` and `linear_ranking_loss`.
"""

from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.dispatch import available_backends
from tuna_kernels.environment import show_config
from tuna_kernels.head import ops
from tuna_kernels.head.logprobs import linear_logprobs, selective_logprobs
from tuna_kernels.head.ranking_loss import RankingLossOutput, linear_ranking_loss
from tuna_kernels.loss_counts import LossCounts
from tuna_kernels.losses import ranking_loss
from tuna_kernels.scores import sequence_scores
from tuna_kernels.tree import Group, PackedTree, pack_groups, plan_rows, tree_tokens
from tuna_kernels.workspace import workspace_bytes

__version__ = "0.1.0"

__all__ = [
    "Group",
    "LossCounts",
    "PackedTree",
    "RankingLossOutput",
    "available_backends",
    "linear_logprobs",
    "linear_ranking_loss",
    "ops",
    "pack_groups",
    "plan_rows",
    "ranking_loss",
    "selective_logprobs",
    "sequence_scores",
    "show_config",
    "tree_attention",
    "tree_tokens",
    "workspace_bytes",
]
