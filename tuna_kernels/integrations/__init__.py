"""Other libraries' models on our kernels. Nothing here is imported by `tuna_kernels` itself."""

from tuna_kernels.integrations.ranking_model import RankingModel

__all__ = ["RankingModel"]
